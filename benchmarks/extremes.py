"""The theory on inputs of all sizes: counts results that are NaN, infinite or imprecise.

python benchmarks/extremes.py [--groups 100] [--seed 0] [--only NUMBER ...] [--examples]

A group has fixed sizes, and rules of any family for training and adapting. Its 40 inputs differ in
everything else. Every input is evaluated three times on the same numbers: by a plain call (NumPy's
float64, returned as float32), by a vmap in float64, and by a vmap in float32. Derivatives are those
of the test loss in sigma, nu, the tuned parameter and the ridge. The counts are

NaN             by the method in the row
infinite        in float32, where the float64 result fits in float32
1%, 10%, 2x     differences of more than that between float32 and float64
gradient        derivatives that are not finite, where the loss and the float64 derivative are
"""

import collections
import time
import warnings

import harness
import jax
import jax.numpy as jnp
import numpy as np

import negmaml as nm
from negmaml.theory import standard_deviation, test_loss, train_task_error, weight_error
from negmaml.theory.isotropic.spectral_density import EXACT_UP_TO, EXACT_UP_TO_ENTIRE

EACH = 40
LARGEST = float(np.finfo(np.float32).max)
QUANTITIES = ("test loss", "weight error", "task error", "deviation of the loss")


def sizes(rng):
    """p, m, n_t, n_v, n_r log-uniform with n_v m/p of 1e-3 to 1e3; some at or next to n_v m = p."""
    while True:
        p, m, n_t, n_r = np.exp(rng.uniform(0, np.log([1e5, 1e4, 1e4, 1e4]))).round().astype(int)
        rows = p * np.exp(rng.uniform(-1, 1) * np.log(1e3))
        n_v = max(1, round(rows / m)) if rng.random() > 0.1 else max(1, round(p / m))
        if 1e-3 <= n_v * m / p <= 1e3:
            return dict(p=int(p), m=int(m), n_t=int(n_t), n_v=int(n_v), n_r=int(n_r))


def signed(rng, largest, smallest=1e-3):
    """Both signs; uniform, log-uniform or zero."""
    kind = rng.random(EACH)
    spread = np.sign(rng.uniform(-1, 1, EACH)) * np.exp(
        rng.uniform(np.log(smallest), np.log(largest), EACH)
    )
    values = np.where(kind < 0.5, rng.uniform(-largest, largest, EACH), spread)
    return np.where(kind > 0.95, 0.0, values).astype(np.float32)


def positive(rng, zeros=0.1):
    """0 to 1e3: uniform, log-uniform or zero."""
    kind = rng.random(EACH)
    spread = np.exp(rng.uniform(np.log(1e-3), np.log(1e3), EACH))
    values = np.where(kind < 0.3, rng.uniform(0, 1e3, EACH), spread)
    return np.where(kind > 1 - zeros, 0.0, values).astype(np.float32)


def strengths(rng, n, p):
    """Of `Proximal`: half of the negative ones within the spectrum and near its edges."""
    edges = (1 + np.array([-1.0, 1.0]) * np.sqrt(p / n)) ** 2
    within = -rng.uniform(0, 1.1 * edges[1], EACH)
    edge = -edges[rng.integers(2, size=EACH)] * (1 + rng.choice([0, 1e-6, 1e-3, -1e-3], EACH))
    kind = rng.random(EACH)
    any_size = signed(rng, 1e3)
    near = np.where(kind < 0.15, within, np.where(kind < 0.25, edge, any_size))
    return near.astype(np.float32)


def draw_rule(rng, n, p):
    """(build, numbers): a rule of numbers (EACH, ...)."""
    family = rng.integers(8)
    if family <= 1:
        return nm.GradientDescent, (signed(rng, 5),)
    if family == 2:
        return lambda rate: nm.GradientDescent(rate, 10), (signed(rng, 5),)
    if family == 3:
        momentum = rng.uniform(-1, 1, EACH).astype(np.float32)
        return lambda r, b: nm.Momentum(r, b, 4), (signed(rng, 5), momentum)
    if family == 4:
        values = np.stack([signed(rng, 5) for _ in range(3)], -1)
        return lambda values: nm.GradientDescent(nm.rules.Schedule(values), 3), (values,)
    if family == 5:
        return nm.Proximal, (strengths(rng, n, p),)
    return nm.GradientFlow, (signed(rng, 5),)


def draw(rng):
    """Draw the sizes, the two rules, and the inputs of a group, a dict of arrays (EACH, ...)."""
    size = sizes(rng)
    train, numbers = draw_rule(rng, size["n_t"], size["p"])
    adapt, others = draw_rule(rng, size["n_r"], size["p"])
    ridge = positive(rng, 0.3) if rng.random() < 0.7 else None
    w0 = np.where(rng.random(EACH) < 0.5, 0.0, positive(rng)).astype(np.float32)
    inputs = dict(sigma=positive(rng), nu=positive(rng), w0=w0, train=numbers, adapt=others)
    return size, train, adapt, inputs | ({} if ridge is None else {"ridge": ridge})


def predictions(size, train, adapt, of_loss_alone=False):
    """A function of one input that returns QUANTITIES, or the first."""

    def function(inputs):
        variances = {name: inputs[name] for name in ("sigma", "nu", "w0")}
        problem = nm.MixedLinearRegression(**size, **variances)
        rules = train(*inputs["train"]), adapt(*inputs["adapt"])
        options = {"meta_ridge": inputs.get("ridge", 0.0)}
        loss = test_loss(problem, *rules, **options)
        if of_loss_alone:
            return loss
        return (
            loss,
            weight_error(problem, rules[0], **options),
            train_task_error(problem, rules[0], **options),
            standard_deviation(problem, *rules, **options).test_loss,
        )

    return function


def gradients(size, train, adapt):
    """The derivatives of the test loss in all but the offset and the rule at test time."""
    function = predictions(size, train, adapt, of_loss_alone=True)

    def loss(moving, fixed):
        return function(moving | fixed)

    def slopes(inputs):
        fixed = {name: inputs[name] for name in ("w0",)}
        moving = {name: value for name, value in inputs.items() if name not in fixed}
        return jax.grad(loss)(moving, fixed)

    return slopes


def at(inputs, i):
    """The i-th input."""
    return jax.tree.map(lambda x: x[i], inputs)


def of_type(inputs, dtype):
    """The same numbers in another type."""
    return jax.tree.map(lambda x: np.asarray(x, dtype), inputs)


def flat(tree):
    """The leaves of a batch side by side, (EACH, k)."""
    return np.concatenate([np.asarray(x).reshape(EACH, -1) for x in jax.tree.leaves(tree)], 1)


def evaluate(group):
    """Values by method (EACH, quantities), and derivatives by method (EACH, k)."""
    *form, inputs = group
    values, slopes = {}, {}
    function, derivative = predictions(*form), gradients(*form)
    for name, dtype in (("float64", np.float64), ("float32", np.float32)):
        with jax.enable_x64(dtype is np.float64):
            own = jax.tree.map(jnp.asarray, of_type(inputs, dtype))
            values[name] = flat(jax.vmap(function)(own))
            slopes[name] = flat(jax.vmap(derivative)(own))
            if name == "float32":
                plain = [function(at(of_type(inputs, dtype), i)) for i in range(EACH)]
                values["float32, plain call"] = np.array(plain, dtype)
    return values, slopes


def faults(values, slopes):
    """{(fault, method): inputs (EACH, quantities) that have it}."""
    found = {(f"NaN, {method}", ""): np.isnan(x) for method, x in values.items()}
    exact = values["float64"]
    holds = np.isfinite(exact) & (np.abs(exact) <= LARGEST)
    for method in ("float32", "float32, plain call"):
        value = values[method].astype(np.float64)
        both = holds & np.isfinite(value)
        with np.errstate(all="ignore"):
            off = np.abs(value - exact) - 1e-37
            ratio = np.maximum(value / exact, exact / value)
        found[f"infinite, {method}", ""] = holds & np.isinf(value)
        for label, beyond in (("1%", off > 0.01 * exact), ("10%", off > 0.1 * exact)):
            found[f"{label} off, {method}", ""] = both & beyond
        found[f"2x off, {method}", ""] = both & ((ratio >= 2) & (off > 0))
    slope = slopes["float64"]
    for method in ("float64", "float32"):
        finite = np.isfinite(values[method][:, :1])
        held = np.isfinite(slope) & (np.abs(slope) <= LARGEST) if method == "float32" else True
        bad = finite & held & ~np.isfinite(slopes[method])
        found[f"gradient, {method}", ""] = np.pad(bad.any(1)[:, None], ((0, 0), (0, 3)))
    return {name: where for (name, _), where in found.items()}


def kind(group):
    """The properties of a group that determine its programs, besides the sizes."""
    size, train, adapt, inputs = group
    one = at(inputs, 0)
    rule, smaller = train(*one["train"]), min(size["n_t"], size["p"])
    return (
        "ridge" in inputs,
        smaller <= (EXACT_UP_TO_ENTIRE if rule.spectral().entire else EXACT_UP_TO),
        str(jax.tree.structure(rule)),
        str(jax.tree.structure(adapt(*one["adapt"]))),
    )


def example(number, name, where, group, values, slopes):
    """The first input of a group that has a fault, in full."""
    i = int(np.argmax(where.any(1)))
    size, train, adapt, inputs = group
    own = at(inputs, i)
    rest = {k: v for k, v in own.items() if k not in ("train", "adapt")}
    found = "  ".join(f"{method}: {x[i]}" for method, x in values.items())
    return (
        f"[{number}:{i}] {name} x{where.sum(0)}\n   {size} {train(*own['train'])} "
        f"{adapt(*own['adapt'])} {rest}\n   {found}\n   slopes {slopes['float64'][i]} "
        f"{slopes['float32'][i]}"
    )


def main(options, report):
    rng = np.random.default_rng(options.seed)
    counts = collections.defaultdict(lambda: np.zeros(len(QUANTITIES), int))
    warnings.simplefilter("ignore", RuntimeWarning)
    groups = dict(enumerate(draw(rng) for _ in range(options.groups)))
    order = sorted(options.only or groups, key=lambda number: kind(groups[number]))
    last, begun = None, time.perf_counter()
    for done, number in enumerate(order, 1):
        group = groups[number]
        if kind(group)[:2] != last:
            jax.clear_caches()  # thousands of programs are more mappings than a process may have
            last = kind(group)[:2]
        values, slopes = evaluate(group)
        for name, where in faults(values, slopes).items():
            counts[name] += where.sum(0)
            if options.examples and where.any():
                harness.progress(example(number, name, where, group, values, slopes))
        some = {name: count.tolist() for name, count in counts.items() if count.any()}
        passed = time.perf_counter() - begun
        harness.progress(f"{done}/{len(order)} groups, {passed:.0f} s (number {number}): {some}")
    report.table(f"fault, of {len(order) * EACH} inputs", *QUANTITIES)
    for name, count in counts.items():
        report.row(name, *count.tolist())


if __name__ == "__main__":
    harness.run(
        main,
        __doc__,
        harness.option("--groups", type=int, default=100),
        harness.option("--seed", type=int, default=0),
        harness.option("--only", type=int, nargs="*", help="numbers of groups; all by default"),
        harness.option("--examples", action="store_true", help="print the inputs that fail"),
    )
