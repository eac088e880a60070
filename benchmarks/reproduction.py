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
import resource
import subprocess
import sys
import time
from typing import NamedTuple

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


# The methods. Each takes the seed, imports its tool and returns a function of (problem, train_rates,
# adapt_rates, runs, address) to losses of shape (train rates, adapt rates, runs). The address
# says which data to draw: two calls with different addresses share none.


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


# The worker: one method, in a process of its own.


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


def timed(function, *args):
    """The result and the seconds it took."""
    start = time.perf_counter()
    result = function(*args)
    return result, time.perf_counter() - start


def peak_mebibytes():
    """Peak resident memory of this process; ru_maxrss counts bytes on macOS, KiB elsewhere."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def measure(losses, panel, draws, address, compiled, repeats):
    """First-call and warm seconds of one panel, with the mean and its variance at each point."""
    first = None
    if compiled:
        _, first = timed(curve, losses, panel, draws, address)
    else:  # nothing to compile: a few runs are enough to start the threads
        curve(losses, panel._replace(runs=2), draws, address)
    passes = [timed(curve, losses, panel, draws, address) for _ in range(repeats)]
    values = passes[0][0]
    return {
        "first": first,
        "warm": min(seconds for _, seconds in passes),
        "scale": panel.full_runs / panel.runs,
        "dtype": str(values.dtype),
        "mean": values.mean(1, dtype=float).tolist(),
        "variance": (values.var(1, dtype=float, ddof=1) / panel.runs).tolist(),
    }


def work(method, draws, runs_a, runs_b, fraction, repeats):
    """What the hidden --worker option runs: one method through the four panels, as one dictionary."""
    seed = list(METHODS).index(
        method
    )  # no two methods draw the same data, or they could not disagree
    try:
        losses = METHODS[method](seed)
    except ModuleNotFoundError as error:
        return {"skipped": f"{error.name} is not installed"}
    idle = peak_mebibytes()
    measured = [
        measure(losses, panel, draws, 100 * i, method in COMPILED, repeats)
        for i, panel in enumerate(panels(runs_a, runs_b, fraction))
    ]
    return {"panels": measured, "idle": idle, "peak": peak_mebibytes()}


# The parent: starts the workers and compares what they bring back.


def run_worker(python, task):
    """A fresh interpreter, with one OpenBLAS thread and no other tuning of the calling shell.

    OpenBLAS gains nothing from a second thread on matrices this small, and when another process
    holds a core its waiting threads make the NumPy methods tens of times slower.
    """
    environment = {k: v for k, v in os.environ.items() if k not in OPENBLAS_SETTINGS}
    environment["OPENBLAS_NUM_THREADS"] = "1"
    command = [python, os.path.abspath(__file__), "--worker", json.dumps(task)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"skipped": f"failed with status {done.returncode}: {reason}"}
    return json.loads(done.stdout.splitlines()[-1])


def seconds(result):
    """Measured warm time, and warm and first-call time of the whole job.

    Runs scale the warm time; what a first call adds to it is compilation, which they do not.
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
    agree = all(abs(z) < AGREEMENT for z in scores)  # false for a NaN, which `worst` can miss
    rms = math.sqrt(sum(z * z for z in scores) / len(scores))
    return [f"{worst:.2f}", f"{rms:.2f}", "agree" if agree else "DISAGREE"]


def row(draws, method, result, reference):
    """One line of the table."""
    if "skipped" in result:
        return [draws, method, result["skipped"], *[""] * 9]
    measured, whole, first = seconds(result)
    ratio = whole / seconds(reference)[1]
    return [
        draws,
        method,
        result["panels"][0]["dtype"],
        f"{measured:.2f}",
        f"{whole:.2f}",
        "" if first is None else f"{first:.2f}",
        f"{ratio:.1f}",
        f"{result['peak']:.0f}",
        f"{result['idle']:.0f}",
        *agreement(result, reference),
    ]


def table(results, reference_method):
    """The results as a markdown table, one line for each kind of draws and method."""
    head = ["draws", "method", "dtype", "measured s", "whole job s", "first call s"]
    head += [f"time / {reference_method}", "peak MiB", "of it imports", "worst abs z", "RMS z"]
    lines = [[*head, f"with {reference_method}"], ["---"] * 3 + ["---:"] * 8 + ["---"]]
    for (draws, method), result in results.items():
        lines.append(row(draws, method, result, results[draws, reference_method]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def preamble(options):
    """What was run, where, and what the columns mean."""
    runs_a, runs_b = (panel.runs for panel in panels(*run_counts(options))[:2])
    lines = [
        f"{os.cpu_count()} CPU cores; 2 problems, {POINTS} rates; {runs_a} runs a point in "
        f"panel a, {runs_b} in panel b; fastest of {options.repeats} warm passes.",
    ]
    if (runs_a, runs_b) != (options.runs_a, options.runs_b):
        lines.append(
            f"A short run: whole job and first call are EXTRAPOLATED to {options.runs_a} and "
            f"{options.runs_b} runs a point, the warm time in proportion to the runs; "
            "the peak memory is that of the short run."
        )
    lines.append("Imports are in the peak memory but not in any time; OpenBLAS has one thread.\n")
    return "\n".join(lines)


def run_counts(options):
    """The three numbers which fix the run counts, in the order `panels` takes them."""
    return options.runs_a, options.runs_b, options.fraction


def compare(options):
    """Run every method in turn and print the table."""
    results = {}
    kinds = ["shared", "independent"] if options.draws == "both" else [options.draws]
    for draws in kinds:
        for method in options.methods:
            print(f"{draws} {method} ...", file=sys.stderr, flush=True)
            python = options.torch_python if method == "torch" else sys.executable
            task = [method, draws, *run_counts(options), options.repeats]
            results[draws, method] = run_worker(python, task)
    print(preamble(options))
    print(table(results, reference_method(options.methods, results)))


def reference_method(methods, results):
    """negmaml, or the last method that ran everywhere when negmaml did not."""
    done = [
        r for r in methods if not any("skipped" in v for (_, x), v in results.items() if x == r)
    ]
    if not done:
        reasons = "; ".join(f"{method}: {v['skipped']}" for (_, method), v in results.items())
        sys.exit(f"no method ran ({reasons})")
    return "negmaml" if "negmaml" in done else done[-1]


def method_list(text):
    """The value of --methods, checked."""
    methods = text.split(",")
    unknown = sorted(set(methods) - set(METHODS))
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown {unknown}; choose from {','.join(METHODS)}")
    return methods


def parse():
    """The command line."""
    parser = argparse.ArgumentParser(description="Time the reproduction of the paper's figures.")
    parser.add_argument("--runs-a", type=int, default=100, help="runs a point in panel a")
    parser.add_argument("--runs-b", type=int, default=1000, help="runs a point in panel b")
    parser.add_argument(
        "--methods", type=method_list, default=list(METHODS), metavar=",".join(METHODS)
    )
    parser.add_argument("--draws", choices=("shared", "independent", "both"), default="shared")
    parser.add_argument("--fraction", type=float, default=1.0, help="of the runs; times are scaled")
    parser.add_argument("--repeats", type=int, default=1, help="warm passes; the fastest counts")
    parser.add_argument(
        "--torch-python", default=sys.executable, help="interpreter of the torch method"
    )
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse()
    if arguments.worker:
        print(json.dumps(work(*arguments.worker)))
    else:
        compare(arguments)
