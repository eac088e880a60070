"""How long the whole reproduction of the paper's simulated figures takes, method by method.

The job is the simulation behind the figures of A. Bernacchia, "Meta-learning with negative
learning rates" (ICLR 2021): two problems, one overparameterized and one underparameterized, and
for each of them the test loss along 25 inner rates of the test (panel a) and along 25 inner rates
of meta-training (panel b). Five methods do the same job, each written as a competent user of that
tool would write it, in the tool's default dtype:

    numpy-loop      a Python loop over runs, rates and tasks, least squares for each
    numpy-batched   arrays batched over runs, in chunks, and one batched solve of the Gram matrix
    torch           the same in torch
    jax-vmap        the obvious vmap over runs, rates and tasks, with jnp.linalg.pinv
    negmaml         negmaml.simulate

Draws are "shared" (one draw of the data per run serves all the rates of a panel) or "independent"
(fresh data for every rate and run). Every method writes only the shared form; the independent one
calls it once per rate, with one rate and a seed of its own.

Every method runs in a fresh process, so that its peak memory and its threads are its own. Run it on
an otherwise idle machine: threads that wait for a core another process holds can slow a method
tenfold.

    python benchmarks/reproduction.py --fraction 0.05
    python benchmarks/reproduction.py --draws both
"""

import argparse
import json
import math
import os
import sys
import time
from typing import NamedTuple

import harness

# This process imports neither numpy nor JAX: on Linux the peak memory that a child reports is at
# least that of the process which started it.

POINTS = 25
RATES = [-0.6 + 1.2 * i / (POINTS - 1) for i in range(POINTS)]
FIXED_RATE = 0.2
FEWEST_RUNS = 20  # a z-score of fewer runs has tails too heavy for the bound below
AGREEMENT = 4.5  # worst |z| of a hundred points of which all agree: exceeded once in 1500 times
CHUNK = 2**19  # numbers drawn at once by the batched methods: the fastest power of two for both
COMPILED = ("jax-vmap", "negmaml")
OPENBLAS_SETTINGS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")


class Problem(NamedTuple):
    """Sizes and variances in the paper's symbols; w0 and omega0 are zero."""

    p: int
    m: int
    n_t: int
    n_v: int
    n_r: int
    sigma: float
    nu: float


class Panel(NamedTuple):
    """One simulated curve: one of the two lists has the 25 rates, the other the fixed one."""

    problem: Problem
    train_rates: list
    adapt_rates: list
    runs: int
    full_runs: int


OVERPARAMETERIZED = Problem(p=60, m=3, n_t=30, n_v=2, n_r=20, sigma=1.0, nu=0.5)
UNDERPARAMETERIZED = Problem(p=30, m=40, n_t=5, n_v=25, n_r=10, sigma=0.2, nu=0.2)


def panels(runs_a, runs_b, fraction):
    """The four curves of the job, with their run counts scaled by `fraction`."""

    def scaled(runs):
        return min(runs, max(FEWEST_RUNS, round(fraction * runs)))

    curves = []
    for problem in (OVERPARAMETERIZED, UNDERPARAMETERIZED):
        curves.append(Panel(problem, [FIXED_RATE], RATES, scaled(runs_a), runs_a))
        curves.append(Panel(problem, RATES, [FIXED_RATE], scaled(runs_b), runs_b))
    return curves


def expected_loss(problem, adapt_rate, distance):
    r"""E L_test = sigma^2/2 (1 + a^2 p/n_r) + h_r/2 (nu^2 + |omega - w0|^2), a the test's rate.

    h_r = (1-a)^2 + a^2 (p+1)/n_r. Exact given omega, so no method has to simulate test tasks.
    """
    p, n_r = problem.p, problem.n_r
    shrinkage = (1 - adapt_rate) ** 2 + adapt_rate**2 * (p + 1) / n_r
    noise = problem.sigma**2 * (1 + adapt_rate**2 * p / n_r)
    return noise / 2 + shrinkage / 2 * (problem.nu**2 + distance)


# The methods. Each takes the seed, imports its tool and returns a function of (problem,
# train_rates, adapt_rates, runs, address) to losses of shape (train rates, adapt rates, runs).
# Calls with different addresses draw different data.


def numpy_loop(seed):
    """One task, one rate and one run at a time."""
    import numpy as np

    def draw_task(rng, problem):
        p, n_t, n_v, sigma = problem.p, problem.n_t, problem.n_v, problem.sigma
        w = problem.nu / math.sqrt(p) * rng.standard_normal(p)
        x_t, x_v = rng.standard_normal((n_t, p)), rng.standard_normal((n_v, p))
        y_t = x_t @ w + sigma * rng.standard_normal(n_t)
        y_v = x_v @ w + sigma * rng.standard_normal(n_v)
        return x_v, y_v, x_t.T @ x_t / n_t, x_t.T @ y_t / n_t

    def solve(tasks, rate):
        features = [x_v - rate * (x_v @ hessian) for x_v, _, hessian, _ in tasks]
        targets = [y_v - rate * (x_v @ pull) for x_v, y_v, _, pull in tasks]
        return np.linalg.lstsq(np.concatenate(features), np.concatenate(targets), rcond=None)[0]

    def losses(problem, train_rates, adapt_rates, runs, address):
        rng = np.random.default_rng([seed, address])
        result = np.empty((len(train_rates), len(adapt_rates), runs))
        for run in range(runs):
            tasks = [draw_task(rng, problem) for _ in range(problem.m)]
            for i, train_rate in enumerate(train_rates):
                omega = solve(tasks, train_rate)
                for j, adapt_rate in enumerate(adapt_rates):
                    result[i, j, run] = expected_loss(problem, adapt_rate, omega @ omega)
        return result

    return losses


def chunks(problem, runs):
    """Sizes of the batches of runs that draw at most CHUNK numbers each."""
    size = max(1, CHUNK // (problem.m * (problem.n_t + problem.n_v) * problem.p))
    return [min(size, runs - start) for start in range(0, runs, size)]


def stacked_system(x_t, y_t, x_v, y_v):
    """(features, targets), each constant and linear in the training rate, tasks stacked.

    For NumPy arrays and torch tensors alike, of shapes (batch, m, points, p or 1).
    """
    overlap = x_v @ x_t.swapaxes(-1, -2) / x_t.shape[-2]
    pairs = (x_v, overlap @ x_t), (y_v, overlap @ y_t)
    return [[part.reshape(len(part), -1, part.shape[-1]) for part in pair] for pair in pairs]


def numpy_batched(seed):
    """A chunk of runs at a time, in stacked matrix products and one stacked solve per rate."""
    import numpy as np

    def draw(rng, problem, batch):
        p, m, n_t, n_v, _, sigma, nu = problem
        w = nu / math.sqrt(p) * rng.standard_normal((batch, m, p, 1))
        x_t, x_v = rng.standard_normal((batch, m, n_t, p)), rng.standard_normal((batch, m, n_v, p))
        y_t = x_t @ w + sigma * rng.standard_normal((batch, m, n_t, 1))
        y_v = x_v @ w + sigma * rng.standard_normal((batch, m, n_v, 1))
        return stacked_system(x_t, y_t, x_v, y_v)

    def distance(features, targets, rate):
        phi, r = features[0] - rate * features[1], targets[0] - rate * targets[1]
        phi_t = phi.swapaxes(-1, -2)
        if phi.shape[-2] < phi.shape[-1]:
            omega = phi_t @ np.linalg.solve(phi @ phi_t, r)
        else:
            omega = np.linalg.solve(phi_t @ phi, phi_t @ r)
        return (omega**2).sum((-2, -1))

    def losses(problem, train_rates, adapt_rates, runs, address):
        rng = np.random.default_rng([seed, address])
        parts = []
        for batch in chunks(problem, runs):
            data = draw(rng, problem, batch)
            parts.append(np.stack([distance(*data, rate) for rate in train_rates]))
        rates = np.asarray(adapt_rates)[:, None]
        return expected_loss(problem, rates, np.concatenate(parts, axis=-1)[:, None])

    return losses


def torch_batched(seed):
    """The batched method in torch, on its default device and in its default dtype."""
    import torch

    def draw(generator, problem, batch):
        def normal(*shape):
            return torch.randn(batch, problem.m, *shape, generator=generator)

        p, _, n_t, n_v, _, sigma, nu = problem
        w = nu / math.sqrt(p) * normal(p, 1)
        x_t, x_v = normal(n_t, p), normal(n_v, p)
        y_t, y_v = x_t @ w + sigma * normal(n_t, 1), x_v @ w + sigma * normal(n_v, 1)
        return stacked_system(x_t, y_t, x_v, y_v)

    def distance(features, targets, rate):
        phi, r = features[0] - rate * features[1], targets[0] - rate * targets[1]
        if phi.shape[-2] < phi.shape[-1]:
            omega = phi.mT @ torch.linalg.solve(phi @ phi.mT, r)
        else:
            omega = torch.linalg.solve(phi.mT @ phi, phi.mT @ r)
        return (omega**2).sum((-2, -1))

    @torch.inference_mode()
    def losses(problem, train_rates, adapt_rates, runs, address):
        generator = torch.Generator().manual_seed(1000 * seed + address)
        parts = []
        for batch in chunks(problem, runs):
            data = draw(generator, problem, batch)
            parts.append(torch.stack([distance(*data, rate) for rate in train_rates]))
        rates = torch.tensor(adapt_rates)[:, None]
        return expected_loss(problem, rates, torch.cat(parts, dim=-1)[:, None]).numpy()

    return losses


def jax_vmap(seed):
    """A function of one run, mapped; vmap keeps what does not depend on a rate out of its axis."""
    import jax
    import jax.numpy as jnp

    root = jax.random.key(seed)

    def draw_task(key, problem):
        p, _, n_t, n_v, _, sigma, nu = problem
        keys = jax.random.split(key, 5)
        w = nu / math.sqrt(p) * jax.random.normal(keys[0], (p,))
        x_t, x_v = jax.random.normal(keys[1], (n_t, p)), jax.random.normal(keys[2], (n_v, p))
        y_t = x_t @ w + sigma * jax.random.normal(keys[3], (n_t,))
        y_v = x_v @ w + sigma * jax.random.normal(keys[4], (n_v,))
        return x_v, y_v, x_t.T @ x_t / n_t, x_t.T @ y_t / n_t

    def run_loss(train_rate, adapt_rate, key, problem):
        task_keys = jax.random.split(key, problem.m)
        x_v, y_v, hessian, pull = jax.vmap(lambda key: draw_task(key, problem))(task_keys)
        phi = x_v - train_rate * (x_v @ hessian)
        r = y_v - train_rate * jnp.einsum("mvp,mp->mv", x_v, pull)
        omega = jnp.linalg.pinv(phi.reshape(-1, problem.p)) @ r.reshape(-1)
        return expected_loss(problem, adapt_rate, omega @ omega)

    def panel(key, train_rates, adapt_rates, problem, runs):
        over_adapt = jax.vmap(run_loss, in_axes=(None, 0, None, None))
        over_train = jax.vmap(over_adapt, in_axes=(0, None, None, None))
        result = jax.lax.map(  # a vmap over the runs, in batches that fit in memory
            lambda key: over_train(train_rates, adapt_rates, key, problem),
            jax.random.split(key, runs),
            batch_size=min(runs, 50),
        )
        return jnp.moveaxis(result, 0, -1)

    compiled = jax.jit(panel, static_argnames=("problem", "runs"))

    def losses(problem, train_rates, adapt_rates, runs, address):
        rates = jnp.asarray(train_rates), jnp.asarray(adapt_rates)
        key = jax.random.fold_in(root, address)
        return jax.block_until_ready(compiled(key, *rates, problem=problem, runs=runs))

    return losses


def package(seed):
    """negmaml.simulate, as its users call it."""
    import jax
    import jax.numpy as jnp

    import negmaml

    root = jax.random.key(seed)

    def losses(problem, train_rates, adapt_rates, runs, address):
        key = jax.random.fold_in(root, address)
        model = negmaml.MixedLinearRegression(**problem._asdict())
        train = negmaml.GradientDescent(jnp.asarray(train_rates))
        adapt = negmaml.GradientDescent(jnp.asarray(adapt_rates))
        result = negmaml.simulate(key, model, train, adapt, runs=runs)
        return jax.block_until_ready(result.test_loss)

    return losses


METHODS = {
    "numpy-loop": numpy_loop,
    "numpy-batched": numpy_batched,
    "torch": torch_batched,
    "jax-vmap": jax_vmap,
    "negmaml": package,
}


# The worker: one method in its own process.


def curve(losses, panel, draws, address):
    """Losses of one panel, as (25 points, runs); independent points have addresses of their own."""
    import numpy as np

    problem, train_rates, adapt_rates, runs, _ = panel
    if draws == "shared":
        result = losses(problem, train_rates, adapt_rates, runs, address)
        return np.asarray(result).reshape(POINTS, runs)
    pairs = [(t, a) for t in train_rates for a in adapt_rates]
    points = [
        losses(problem, [t], [a], runs, address + i) for i, (t, a) in enumerate(pairs, start=1)
    ]
    return np.stack([np.asarray(point).reshape(runs) for point in points])


def measure(losses, panel, draws, address, compiled, repeats):
    """First-call and warm seconds of one panel, with the mean and its variance at each point."""
    first, seconds = None, []
    if compiled:
        first = harness.timed(lambda: curve(losses, panel, draws, address))
    else:  # nothing to compile: a few runs are enough to start the threads
        curve(losses, panel._replace(runs=2), draws, address)
    for _ in range(repeats):
        start = time.perf_counter()
        values = curve(losses, panel, draws, address)
        seconds.append(time.perf_counter() - start)
    return {
        "first": first,
        "warm": min(seconds),
        "scale": panel.full_runs / panel.runs,
        "dtype": str(values.dtype),
        "mean": values.mean(1, dtype=float).tolist(),
        "variance": (values.var(1, dtype=float, ddof=1) / panel.runs).tolist(),
    }


def work(method, draws, runs_a, runs_b, fraction, repeats):
    """Run one method through the four panels, in a worker process."""
    # Methods draw different data: with the same data they could not disagree.
    seed = list(METHODS).index(method)
    try:
        losses = METHODS[method](seed)
    except ModuleNotFoundError as error:
        return {"skipped": f"{error.name} is not installed"}
    idle = harness.peak_mib()
    measured = [
        measure(losses, panel, draws, 100 * i, method in COMPILED, repeats)
        for i, panel in enumerate(panels(runs_a, runs_b, fraction))
    ]
    return {"panels": measured, "idle": idle, "peak": harness.peak_mib()}


# The parent process: starts the workers and compares their results.


def run_worker(python, task):
    """Run one method in a fresh interpreter, with one OpenBLAS thread and no other tuning.

    OpenBLAS gains nothing from a second thread on such small matrices. If another process uses a
    core, its waiting threads make the NumPy methods tens of times slower.
    """
    environment = {k: v for k, v in os.environ.items() if k not in OPENBLAS_SETTINGS}
    environment["OPENBLAS_NUM_THREADS"] = "1"
    arguments = "--worker", json.dumps(task)
    return harness.in_process("reproduction.py", *arguments, python=python, environment=environment)


def seconds(result):
    """Measured warm time, and warm and first-call time of the whole job.

    The warm time is scaled by the number of runs, the compilation of a first call is not.
    """
    parts = result["panels"]
    measured = sum(part["warm"] for part in parts)
    whole = sum(part["warm"] * part["scale"] for part in parts)
    if parts[0]["first"] is None:
        return measured, whole, None
    return measured, whole, whole + sum(part["first"] - part["warm"] for part in parts)


def z_scores(result, reference):
    """Differences of the means at every point of every panel, in their standard errors."""
    scores = []
    for ours, theirs in zip(result["panels"], reference["panels"], strict=True):
        points = zip(
            ours["mean"], theirs["mean"], ours["variance"], theirs["variance"], strict=True
        )
        scores += [(a - b) / math.sqrt(u + v) for a, b, u, v in points]
    return scores


def agreement(result, reference):
    """The cells: worst |z|, its root mean square, and the verdict."""
    if result is reference:
        return ["reference", "", ""]
    scores = z_scores(result, reference)
    worst = max(map(abs, scores))
    agree = all(abs(z) < AGREEMENT for z in scores)  # false for NaN, which `worst` can miss
    rms = math.sqrt(sum(z * z for z in scores) / len(scores))
    return [f"{worst:.2f}", f"{rms:.2f}", "agree" if agree else "DISAGREE"]


def cells_of(result, reference):
    """The numbers of one row of the table."""
    if "skipped" in result:
        return [result["skipped"], *[""] * 9]
    measured, whole, first = seconds(result)
    ratio = whole / seconds(reference)[1]
    return [
        result["panels"][0]["dtype"],
        f"{measured:.2f}",
        f"{whole:.2f}",
        "" if first is None else f"{first:.2f}",
        f"{ratio:.1f}",
        f"{result['peak']:.0f}",
        f"{result['idle']:.0f}",
        *agreement(result, reference),
    ]


def main(options, report):
    if options.worker:
        print(json.dumps(work(*options.worker)))
        return
    counts = options.runs_a, options.runs_b, options.fraction
    kinds = ["shared", "independent"] if options.draws == "both" else [options.draws]
    results = {}
    for draws in kinds:
        for method in options.methods:
            harness.progress(f"{draws} {method} ...")
            python = options.torch_python if method == "torch" else sys.executable
            task = [method, draws, *counts, options.repeats]
            results[draws, method] = run_worker(python, task)
    reference = reference_method(options.methods, results)
    for line in preamble(options, *(panel.runs for panel in panels(*counts)[:2])):
        report.note(line)
    head = ["dtype", "measured, s", "whole job, s", "first call, s", f"time / {reference}"]
    head += ["peak MiB", "of it imports", "worst abs z", "RMS z", f"with {reference}"]
    report.table("draws", "method", *head)
    for (draws, method), result in results.items():
        report.row(draws, method, *cells_of(result, results[draws, reference]))


def preamble(options, runs_a, runs_b):
    """Sentences on the conditions and on the columns."""
    yield (
        f"2 problems, {POINTS} rates; {runs_a} runs per point in panel a, {runs_b} in panel b; "
        f"fastest of {options.repeats} warm passes."
    )
    if (runs_a, runs_b) != (options.runs_a, options.runs_b):
        yield (
            f"A short run: whole job and first call are EXTRAPOLATED to {options.runs_a} and "
            f"{options.runs_b} runs per point, in proportion to the runs; the peak memory is that "
            "of the short run."
        )
    yield "Imports are in the peak memory but not in any time; OpenBLAS has one thread."


def reference_method(methods, results):
    """negmaml, or the last method that ran everywhere if negmaml did not."""
    skipped = {method for (_, method), result in results.items() if "skipped" in result}
    done = [method for method in methods if method not in skipped]
    if not done:
        reasons = "; ".join(f"{method}: {v['skipped']}" for (_, method), v in results.items())
        sys.exit(f"no method ran ({reasons})")
    return "negmaml" if "negmaml" in done else done[-1]


if __name__ == "__main__":
    harness.run(
        main,
        __doc__,
        harness.option("--runs-a", type=int, default=100, help="runs per point in panel a"),
        harness.option("--runs-b", type=int, default=1000, help="runs per point in panel b"),
        harness.option(
            "--methods", type=harness.choice_of(METHODS), default=list(METHODS),
            metavar=",".join(METHODS),
        ),
        harness.option("--draws", choices=("shared", "independent", "both"), default="shared"),
        harness.option("--fraction", type=float, default=1.0, help="of the runs; times are scaled"),
        harness.option("--repeats", type=int, default=1, help="warm passes; the fastest counts"),
        harness.option("--torch-python", default=sys.executable, help="interpreter with torch"),
        harness.option("--worker", type=json.loads, help=argparse.SUPPRESS),
    )  # fmt: skip
