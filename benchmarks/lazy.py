"""Lazy and learning networks: agreement with their kernels, and the effect of the training rate.

    python benchmarks/lazy.py widths    networks of growing width and their kernels, to lazy.npz
    python benchmarks/lazy.py rates     the best training rates of kernels and networks: a table

Both save results in a store (--store), from which they resume. `benchmarks/figures.py lazy` draws
lazy.npz. Rates are in units of 1/lambda,
where lambda is the largest eigenvalue of the infinite kernel over inputs. A loss is half the mean
squared error. Training uses a fixed set of few tasks, so that it converges.

Networks of `widths` are centred (their initial output is subtracted), since the prior mean of the
infinite kernel is zero, and a ridge pulls their parameters to the start. `output` scales their
outputs: the kernel is multiplied by output^2, and rates and ridge are divided by it, which does not
change the prediction of the kernel. But parameters have to move 1/output as far, out of the lazy
regime (Chizat, Oyallon and Bach, NeurIPS 2019).
"""

import tempfile
from functools import cache
from itertools import pairwise
from pathlib import Path

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.tree_util import Partial

import negmaml as nm
from negmaml._core import plotting
from negmaml._core.plotting import INK, SERIES, number
from negmaml.examples import digits, mlp
from negmaml.kernels.system import systems, task_blocks

BIAS = 0.5  # variance of biases, in networks and in the infinite kernel
RIDGE = 0.01  # meta-ridge over rows of the query and lambda
UNITS = np.linspace(-1.2, 1.2, 7)  # training rates times lambda
TEST_UNIT = 0.4  # the adaptation rate times lambda
MARKS = {64: ("s", SERIES[1]), 256: ("^", SERIES[4]), 4096: ("o", SERIES[2])}
SHIFT = 0.06  # between points of different widths, which would hide each other
STEPS = 200
LIMIT_SEEDS = 400  # of the exact solution in the infinite kernel
# Hidden layers, width, output; and seeds for each.
PLAN = {
    (1, 64, 1.0): 6,
    (1, 256, 1.0): 6,
    (1, 1024, 1.0): 6,
    (1, 4096, 1.0): 4,
    (2, 64, 1.0): 6,
    (2, 256, 1.0): 6,
    (1, 256, 0.1): 6,
    (2, 256, 0.1): 6,
}


def quadratic(m, n_t, n_v):
    return nm.tasks.Quadratic(p=10, m=m, n_t=n_t, n_v=n_v, sigma=0.5, nu=1.0)


def sinusoid(m, n_t, n_v):
    family = nm.tasks.Sinusoid(m=m, n_t=n_t, n_v=n_v)
    return lambda key: nm.Tasks(*((x, y[..., 0]) for x, y in family(key)))


# Family, sizes (m, n_t, n_v) of training and of testing, inputs, standard deviation of noise.
FAMILIES = {
    "quadratic": (quadratic, (3, 20, 4), (50, 20, 20), 10, 0.5),
    "sinusoid": (sinusoid, (4, 10, 5), (50, 10, 20), 1, 0.0),
}


def init(key, sizes):
    keys = iter(jax.random.split(key, 2 * len(sizes)))
    shapes = pairwise(sizes)
    return [
        (jax.random.normal(next(keys), s), jax.random.normal(next(keys), s[1:])) for s in shapes
    ]


def network(params, x):
    """ReLU layers in the scaling of `relu_network`, one output."""
    for i, (weight, shift) in enumerate(params):
        x = jax.nn.relu(x) if i else x
        x = (2 / len(weight)) ** 0.5 * (x @ weight) + BIAS**0.5 * shift
    return x[:, 0]


def centred(start, output, params, x):
    return output * (network(params, x) - network(start, x))


def infinite(depth):
    return nm.kernels.relu_network(depth, bias_variance=BIAS)


@cache
def largest_eigenvalue(name, depth):
    with jax.ensure_compile_time_eval():
        x = FAMILIES[name][0](400, 1, 1)(jax.random.key(99)).support[0].reshape(400, -1)
        return float(jnp.linalg.eigvalsh(infinite(depth)(x, x) / 400)[-1])


def rates_and_ridge(name, depth):
    """Training and adaptation rates, and the ridge."""
    scale, (m, _, n_v) = largest_eigenvalue(name, depth), FAMILIES[name][1]
    return jnp.asarray(UNITS, jnp.float32) / scale, TEST_UNIT / scale, RIDGE * m * n_v * scale


def data(key, name):
    family, sizes, test_sizes, *_ = FAMILIES[name]
    return family(*sizes)(jax.random.fold_in(key, 0)), family(*test_sizes)(
        jax.random.fold_in(key, 1)
    )


def exact(kernel, tasks, test, rates, adapt, ridge):
    """Test losses of the exact solution in the kernel over the training rate."""
    model = nm.kernels.meta_train(kernel, tasks, nm.GradientDescent(rates), meta_ridge=ridge)
    return model.loss(test, nm.GradientDescent(adapt))


def compare(key, tasks, depth, width, output):
    """Test losses of trained networks, of their kernel and of the infinite one over `UNITS`."""
    name, (_, (m, n_t, n_v), _, inputs, _) = tasks, FAMILIES[tasks]
    rates, adapt, ridge = rates_and_ridge(name, depth)
    tasks, test = data(key, name)
    start = init(jax.random.fold_in(key, 2), (inputs, *(width,) * depth, 1))
    tangent = nm.kernels.empirical_ntk(network, start)
    losses = {
        which: exact(kernel, tasks, test, rates, adapt, ridge)
        for which, kernel in (("kernel", tangent), ("limit", infinite(depth)))
    }
    x = jnp.concatenate([part[0].reshape(-1, inputs) for part in tasks])
    K, rows, square = tangent(x, x), m * n_v, output**2
    at, entries = systems(K, task_blocks(K, m, n_t), nm.GradientDescent(rates))

    def loss(params, data):
        x, y = data
        return jnp.mean((centred(start, output, params, x) - y) ** 2) / 2

    def trained(pair):
        rate, entry = pair
        algorithm = nm.maml_value_and_grad(loss, nm.GradientDescent(rate / square))
        largest = jnp.linalg.eigvalsh(at(entry).G)[-1] + ridge
        root = jnp.sqrt(ridge / largest)  # Nesterov's momentum for this condition number
        momentum = (1 - root) / (1 + root)
        optimizer = Partial(_nesterov, rows / (largest * square), momentum)

        def with_ridge(params, tasks):
            value, gradient = algorithm(params, tasks)
            pull = square * ridge / rows
            pulled = jax.tree.map(lambda g, p, s: g + pull * (p - s), gradient, params, start)
            return value, pulled

        params = nm.fit(key, start, with_ridge, tasks, optimizer, STEPS).params
        return nm.maml(loss, nm.GradientDescent(adapt / square))(params, test)

    return losses | {"network": lax.map(trained, (rates, entries))}


def _nesterov(rate, momentum):
    return optax.sgd(rate, momentum, nesterov=True)


def limits(name, depth, seeds=LIMIT_SEEDS):
    """The exact solution in the infinite kernel, (seeds, rates), as in `compare`."""

    @jax.jit
    def one(key):
        return exact(infinite(depth), *data(key, name), *rates_and_ridge(name, depth))

    keys = [jax.random.fold_in(jax.random.key(1), i) for i in range(seeds)]
    return np.stack([one(key) for key in keys])


def theory(name, depth, points=1500, count=5_000):
    """Test loss over `UNITS` by the anisotropic theory, from the spectrum of the infinite kernel.

    A task is linear in the eigenfunctions of the kernel. The theory uses the mean and the variance
    of its coefficients over many tasks, and assumes Gaussian features.
    """
    family, (m, n_t, n_v), (_, n_r, _), inputs, sigma = FAMILIES[name]
    key = jax.random.key(5)
    (x, _), _ = family(points, 1, 1)(key)
    x = np.asarray(x, np.float64).reshape(points, inputs)
    with jax.enable_x64(True):
        K = np.asarray(infinite(depth)(x, x))
    s, V = np.linalg.eigh(K / points)
    keep = s > 1e-7 * s[-1]
    s, V = s[keep], V[:, keep]
    y = functions(name, x, np.random.default_rng(6), count)
    w = y @ V / (points * s) ** 0.5  # coefficients of sqrt(s) times an eigenfunction
    rates, adapt, ridge = rates_and_ridge(name, depth)
    with jax.enable_x64(True):
        problem = nm.MixedLinearRegression(
            p=len(s), m=m, n_t=n_t, n_v=n_v, n_r=n_r, sigma=sigma, nu=1.0,
            w0=w.mean(0), input_covariance=s, weight_covariance=len(s) * w.var(0),
        )  # fmt: skip
        train = nm.GradientDescent(np.asarray(rates, np.float64))
        return np.asarray(
            nm.theory.test_loss(problem, train, nm.GradientDescent(adapt), meta_ridge=ridge)
        )


def functions(name, x, rng, count):
    """Values of many tasks at points x, without noise: (count, points)."""
    if name == "sinusoid":
        amplitude, phase = rng.uniform(0.1, 5, (count, 1)), rng.uniform(0, np.pi, (count, 1))
        return amplitude * np.sin(x[:, 0] + phase)
    w, b = rng.standard_normal((count, x.shape[1])), rng.standard_normal((count, 1))
    return (w @ x.T / x.shape[1] ** 0.5 + b) ** 2


def widths(report, store, out):
    """Train networks of every width, and save their losses."""
    head = "mean at infinite width", "standard errors", "theory", "median gap"
    report.table("hidden layers, tasks", *head, texts=4)
    found = {}
    for name in FAMILIES:
        for depth in sorted({depth for depth, *_ in PLAN}):
            limit, predicted = limits(name, depth), theory(name, depth)
            error = limit.std(0, ddof=1) / LIMIT_SEEDS**0.5
            # The first two seeds are for the test that compares them with current results.
            found[f"{name} {depth} exact"] = np.stack([limit.mean(0), error, predicted, *limit[:2]])
            gap = np.abs(predicted / limit.mean(0) - 1)
            rows = (" ".join(f"{x:.3f}" for x in row) for row in (limit.mean(0), error, predicted))
            report.row(f"{depth}, {name}", *rows, f"{np.median(gap):.1%}")
    head = "network to kernel", "kernel to infinite width", "network to infinite width"
    report.table("hidden layers, tasks, width, output, seeds", *head)
    for (depth, width, output), seeds in PLAN.items():
        for name in FAMILIES:
            three = losses(name, depth, width, output, seeds, store)
            found[f"{name} {depth} {width} {output:g}"] = three
            net, own, limit = three
            gaps = [
                np.median(np.abs(a / b - 1)) for a, b in ((net, own), (own, limit), (net, limit))
            ]
            name = f"{depth}, {name}, {width}, {output:g}, {seeds}"
            report.row(name, *(f"{gap:.2%}" for gap in gaps))
    np.savez_compressed(out, **found)


def losses(name, depth, width, output, seeds, store):
    """Losses of networks, of their kernels and at infinite width: (3, seeds, rates)."""
    grid = {"tasks": list(FAMILIES), "depth": depth, "width": width, "output": output}
    result = nm.sweep(
        compare, grid, seeds, store / f"widths_{depth}_{width}_{output}.zarr",
        output_dims={which: ["rate"] for which in ("network", "kernel", "limit")},
        common_random_numbers=("depth", "width", "output"), block=1,
    ).sel(tasks=name)  # fmt: skip
    return np.stack([result[which].values for which in ("network", "kernel", "limit")])


def draw(found):
    """Draw the saved losses of `widths`, one panel for each family and depth; a Figure.

    Points are medians and quartiles over seeds of the difference of networks from the limit, added
    to the mean of the limit over many seeds.
    """
    depths = sorted({depth for depth, *_ in PLAN})
    with plotting.style():
        figure, axes = plotting.panels(len(FAMILIES), len(depths), 6.6)
        for row, name in zip(axes, FAMILIES, strict=True):
            for axis, depth in zip(row, depths, strict=True):
                _draw_panel(axis, found, name, depth)
            row[0].set_ylabel(f"test loss, {name}")
        for axis in axes[-1]:
            axis.set_xlabel(r"training rate $\alpha_t$, times largest eigenvalue")
        plotting.share_legend(figure, 3)
    return figure


def _draw_panel(axis, found, name, depth) -> None:
    mean, _, predicted = found[f"{name} {depth} exact"][:3]
    axis.plot(UNITS, mean, color=INK, label="exact, infinite width")
    axis.plot(UNITS, predicted, color=SERIES[0], ls="--", label="theory, from its spectrum")
    widths = [width for d, width, output in PLAN if (d, output) == (depth, 1.0)]
    for i, width in enumerate((widths[0], widths[-1])):
        net, _, limit = found[f"{name} {depth} {width} 1"]
        low, middle, high = np.quantile(net - limit, (0.25, 0.5, 0.75), 0)
        marker, color = MARKS[width]
        axis.errorbar(
            UNITS + SHIFT * (i - 0.5), mean + middle, (middle - low, high - middle), fmt=marker,
            elinewidth=1, color=color, label=f"networks of width {width}",
        )  # fmt: skip
    off = f"networks of width {width} off by {np.median(np.abs(net / limit - 1)):.1%}"
    least = f"{depth + 1} layers: the loss is least at {number(UNITS[np.argmin(mean)])}"
    plotting.set_finding(axis, f"{least}\n{off}")


# Does it matter? The best training rates, with the best adaptation rate and ridge for each.

TRAIN = (-3.0, -1.5, -0.75, -0.3, 0.0, 0.3, 0.75, 1.5, 3.0)  # times lambda
ADAPT = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
LAZY_SEEDS, LEARNING_SEEDS, LEARNING_STEPS = 32, 12, 600


def episodes(which):
    """Labels as outputs: one-hot, minus their mean."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = data.images.reshape(-1, 64).astype(np.float32) / 8 - 0.6, data.target
    chosen, ways = (labels < 6) == (which == "train"), digits.WAYS

    def family(m, shots, queries):
        with jax.ensure_compile_time_eval():
            episode = nm.tasks.Episodes(
                images[chosen], labels[chosen], ways=ways, shots=shots, queries=queries, m=m
            )
        return lambda key: nm.Tasks(
            *((x, jax.nn.one_hot(y, ways) - 1 / ways) for x, y in episode(key))
        )

    return family


def outputs(family):
    """Labels with an axis of outputs."""
    return lambda *sizes: lambda key: nm.Tasks(*((x, y[..., None]) for x, y in family(*sizes)(key)))


# Training family, test family, sizes of training (m, n_t, n_v) and of testing, layers.
CASES = {
    "quadratic": (outputs(quadratic),) * 2 + ((10, 20, 20), (100, 20, 20), (10, 64, 64, 1)),
    "sinusoid": (outputs(sinusoid),) * 2 + ((10, 10, 10), (100, 10, 20), (1, 64, 64, 1)),
    "digits": (
        *(episodes(which) for which in ("train", "test")),
        *((10, 5, 5), (60, 5, 10), (64, 64, 64, digits.WAYS)),
    ),
}


def values(params, x):
    *hidden, (weight, bias) = params
    for w, b in hidden:
        x = jax.nn.relu(x @ w + b)
    return x @ weight + bias


def squares(params, data):
    x, y = data
    return jnp.mean((values(params, x) - y) ** 2) / 2


def entropy(params, data):
    x, y = data  # centred one-hot labels: argmax is the class
    return jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(values(params, x), y.argmax(-1))
    )


def drawn(key, case):
    train, test, sizes, test_sizes, _ = CASES[case]
    return train(*sizes)(key), test(*test_sizes)(jax.random.fold_in(key, 1))


@cache
def lambda_of(case, lazy):
    """The largest eigenvalue of the kernel, infinite or at the start of a network."""
    train, _, sizes, _, layers = CASES[case]
    with jax.ensure_compile_time_eval():
        x = train(40, *sizes[1:])(jax.random.key(99)).support[0].reshape(-1, layers[0])[:400]
        start = mlp.init(jax.random.key(98), layers, gain=2.0)
        kernel = infinite(2) if lazy else nm.kernels.empirical_ntk(values, start)
        return float(jnp.linalg.eigvalsh(kernel(x, x) / len(x))[-1])


def lazy(key, case):
    """Test losses (train rates, ridges, adapt rates) of the exact solution in the kernel."""
    tasks, fresh = drawn(key, case)
    train, adapt = (
        nm.GradientDescent(jnp.array(units, jnp.float32) / lambda_of(case, True))
        for units in (TRAIN, ADAPT)
    )
    model = nm.kernels.meta_train(infinite(2), tasks, train, meta_ridge=jnp.array(RIDGES))
    return {"loss": model.loss(fresh, adapt)}


def learning(key, case, cross_entropy, rate):
    """Test losses (adapt rates,) of a network of 64 units a layer, trained by Adam."""
    tasks, fresh = drawn(key, case)
    loss, unit = entropy if cross_entropy else squares, 1 / lambda_of(case, False)
    start = mlp.init(jax.random.fold_in(key, 2), CASES[case][-1], gain=2.0)
    algorithm = nm.maml_value_and_grad(loss, nm.GradientDescent(rate * unit))
    trained = nm.fit(key, start, algorithm, tasks, optax.adam(1e-3), LEARNING_STEPS).params

    def tested(rate):
        return nm.maml(loss, nm.GradientDescent(rate * unit))(trained, fresh)

    return {"loss": lax.map(tested, jnp.array(ADAPT, jnp.float32))}


def chosen_and_judged(losses):
    """Of (seeds, train, others): the best negative and positive rate against rate zero.

    The rate of either sign and all the others are chosen on half of the seeds and judged on the
    other half, and the other way round, so that choosing favours nobody.
    """
    losses, units = losses.reshape(*losses.shape[:2], -1), np.array(TRAIN)
    signs = {"zero": units == 0, "negative": units < 0, "positive": units > 0}
    judged, found = {}, {}
    half = np.arange(len(losses)) % 2
    for sign, mine in signs.items():
        judged[sign], found[sign] = np.empty(len(losses)), []
        for fold in (0, 1):
            mean = losses[half == fold][:, mine].mean(0)
            mean = np.where(np.isfinite(mean), mean, np.inf)
            at, other = np.unravel_index(mean.argmin(), mean.shape)
            judged[sign][half != fold] = losses[half != fold][:, mine][:, at, other]
            found[sign].append(units[mine][at])
    return judged, found


def cells_of(losses):
    """The loss at rate zero, and the differences from it at the best rates of either sign."""
    judged, found = chosen_and_judged(losses)

    def mean_error(x):
        return f"{x.mean():.4f} ± {x.std(ddof=1) / len(x) ** 0.5:.4f}"

    def against_zero(sign):
        at = ", ".join(f"{unit:+g}" for unit in found[sign])
        return f"{mean_error(judged[sign] - judged['zero'])} at {at}"

    signed = map(against_zero, ("negative", "positive"))
    return len(losses), mean_error(judged["zero"]), *signed


def rates(report, store):
    """Compare the best negative and positive training rate with rate zero, lazy and learning."""
    head = "seeds", "loss at 0", "negative, difference", "positive, difference"
    report.table("task", "regime", *head, texts=2)
    for case in CASES:
        done = nm.sweep(
            lazy, {"case": case}, LAZY_SEEDS, store / f"lazy_{case}.zarr", block=4,
            output_dims={"loss": ["train", "ridge", "adapt"]},
        )  # fmt: skip
        report.row(
            case, "lazy", *cells_of(done.loss.transpose("seed", "train", "ridge", "adapt").values)
        )
        for cross_entropy in (False, True) if case == "digits" else (False,):
            grid = {"case": case, "cross_entropy": cross_entropy, "rate": list(TRAIN)}
            done = nm.sweep(
                learning, grid, LEARNING_SEEDS, store / f"learning_{case}_{cross_entropy}.zarr",
                output_dims={"loss": ["adapt"]}, common_random_numbers=("rate",),
            )  # fmt: skip
            name = case + ", cross entropy" * cross_entropy
            report.row(
                name, "learning", *cells_of(done.loss.transpose("seed", "rate", "adapt").values)
            )


def main(options, report):
    if options.part == "widths":
        widths(report, options.store, options.out)
    else:
        rates(report, options.store)


if __name__ == "__main__":
    folder = Path(tempfile.gettempdir()) / "lazy"
    harness.run(
        main,
        __doc__,
        harness.option("part", choices=("widths", "rates")),
        harness.option("--store", type=Path, default=folder, help="folder of results"),
        harness.option("--out", type=Path, default=harness.HERE / "lazy.npz"),
    )
