"""Sweeps: speed against other ways to do them, overhead, memory, workers, a million cells.

python benchmarks/sweep.py rates|peers|overhead|memory|workers|million
"""

import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import negmaml as nm
from negmaml.linear.data import normals_per_run
from negmaml.sweeps.planning import index_of, planned, regions

RATES = np.linspace(-0.6, 0.6, 25)
OVER = {20: (3, 10, 2), 60: (3, 30, 2), 200: (5, 50, 8)}  # p: m, n_t, n_v
LIMIT = 60.0


def grid(p: int, under: bool = False) -> dict:
    """The linear model with 25 rates and four noises."""
    m, n_t, n_v = (20, 10, 5) if under else OVER[p]
    return {"p": p, "m": m, "n_t": n_t, "n_v": n_v, "n_r": 20, "nu": 0.5,
            "sigma": [0.1, 0.5, 1.0, 2.0], "train_rate": RATES, "adapt_rate": 0.2}  # fmt: skip


def seconds(function, repeats: int = 3) -> float:
    """The fastest of some calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return min(times)


def ready(cells: dict, seeds: int, block: int | None = None):
    """A runner that has compiled and chosen its blocks, and a function that runs all of them."""
    work = nm.sweeps.prepare(nm.sweeps.linear, cells, seeds)
    runner = work.runner(work.grid.shape, None, None)
    runner.block = planned(work, None, block, None)[0].block
    todo = regions(work.grid, runner.block)
    full = [np.ones([part.stop - part.start for part in region], bool) for region in todo]

    def run():
        for region, wanted in zip(todo, full, strict=True):
            runner.compute(index_of(region, wanted))

    return runner, run


def rates() -> None:
    """What 25 rates cost next to one, through a sweep."""
    print("| p | parameterized | 25 rates, s | one rate, s | ratio |\n|---|---|---:|---:|---:|")
    for p, seeds, under in ((20, 8000, False), (60, 1500, False), (200, 100, False),
                            (20, 800, True)):  # fmt: skip
        many, one = (
            ready(grid(p, under) | {"train_rate": values}, seeds, block=10**6)[1]
            for values in (RATES, [0.2])
        )
        many(), one()
        pairs = [(seconds(many, 1), seconds(one, 1)) for _ in range(15)]
        a, b = (min(column) for column in zip(*pairs, strict=True))
        kind = "under" if under else "over"
        print(f"| {p} | {kind} | {a:.3f} | {b:.3f} | {a / b:.2f} |", flush=True)


def numpy_cells(arguments) -> int:
    """Batched NumPy over cells: Gram matrices are quadratics in the rate here too."""
    p, m, n_t, n_v, sigma, nu, cells, seed = arguments
    random = np.random.default_rng(seed)

    def normal(*shape):
        return random.standard_normal(shape, np.float32)

    X_t, X_v = normal(cells, m, n_t, p), normal(cells, m, n_v, p)
    w = nu / p**0.5 * normal(cells, m, p, 1)
    y_t = X_t @ w + sigma * normal(cells, m, n_t, 1)
    y_v = X_v @ w + sigma * normal(cells, m, n_v, 1)
    C = X_v @ X_t.swapaxes(-1, -2) / n_t
    A, a = X_v.reshape(cells, -1, p), y_v.reshape(cells, -1, 1)
    B, c = (C @ X_t).reshape(cells, -1, p), (C @ y_t).reshape(cells, -1, 1)
    AB = A @ B.swapaxes(-1, -2)
    AA, AB, BB = A @ A.swapaxes(-1, -2), AB + AB.swapaxes(-1, -2), B @ B.swapaxes(-1, -2)
    rate = RATES.astype(np.float32)[:, None, None, None]
    z = np.linalg.solve(AA - rate * AB + rate**2 * BB, a - rate * c)[..., 0]
    At, Bt = A.swapaxes(-1, -2), B.swapaxes(-1, -2)
    omega = np.einsum("cpn,rcn->rcp", At, z) - rate[..., 0] * np.einsum("cpn,rcn->rcp", Bt, z)
    return np.square(omega).sum(-1).size


def peers() -> None:
    """Cells a second of the same grid along four methods."""
    print("| p | sweep | loop of jitted calls | one flat vmap | NumPy, two processes |")
    print("|---|---:|---:|---:|---:|")
    for p, seeds in ((20, 8000), (60, 1500), (200, 60)):
        cells, (m, n_t, n_v) = 4 * seeds, OVER[p]
        _, run = ready(grid(p), seeds)
        run()
        speed = [cells / seconds(run)]
        fixed = {n: v for n, v in grid(p).items() if n not in ("sigma", "train_rate")}
        sizes = {n: fixed[n] for n in ("p", "m", "n_t", "n_v", "n_r")}
        train, adapt = nm.GradientDescent(jnp.asarray(RATES, jnp.float32)), nm.GradientDescent(0.2)

        def one(key, sigma, sizes=sizes, train=train, adapt=adapt):
            problem = nm.MixedLinearRegression(**sizes, sigma=sigma, nu=0.5)
            return nm.simulate(key, problem, train, adapt, runs=1).test_loss

        jitted, few = jax.jit(one), min(cells, 300)
        keys = jax.random.split(jax.random.key(0), cells)
        jitted(keys[0], 0.5)
        speed.append(few / seconds(lambda: [jitted(k, 0.5) for k in keys[:few]], 2))  # noqa: B023
        sigmas = jnp.tile(jnp.array([0.1, 0.5, 1.0, 2.0]), seeds)
        flat = jax.jit(jax.vmap(one))
        flat(keys, sigmas)
        speed.append(cells / seconds(lambda: flat(keys, sigmas), 2))  # noqa: B023
        part = max(1, 400_000 // (m * (n_t + n_v) * p))
        jobs = [(p, m, n_t, n_v, 0.5, 0.5, part, i) for i in range(max(4, cells // part // 2))]
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            list(pool.map(numpy_cells, jobs[:2]))
            speed.append(len(jobs) * part / seconds(lambda: list(pool.map(numpy_cells, jobs)), 2))  # noqa: B023
        print(f"| {p} | " + " | ".join(f"{x:,.0f}" for x in speed) + " |", flush=True)


def overhead() -> None:
    """A sweep into a store against its programs called with nothing around them."""
    from negmaml.sweeps.session import here
    from negmaml.sweeps.store import create

    print("| p | block, s | sweep to store, s | kernel alone, s | overhead |")
    print("|---|---|---:|---:|---:|")
    for p, seeds in ((20, 100_000), (60, 20_000)):
        work = nm.sweeps.prepare(nm.sweeps.linear, grid(p), seeds)
        runner = work.runner(work.grid.shape, None, None)
        block = planned(work, None, work.grid.cells // 4, None)[0].block
        runner.block = block
        program = runner.compiler.program(0)
        calls = sum(
            -(-np.prod([x.stop - x.start for x in r]) // program.batch)
            for r in regions(work.grid, block)
        )
        keys = np.arange(2 * program.batch, dtype=np.uint32).reshape(-1, 2)
        numbers = {name: np.full(program.batch, 0.5) for name in ("sigma", "nu")}

        def kernel():
            for _ in range(int(calls)):  # noqa: B023
                jax.block_until_ready(program(keys, numbers, runner.whole))  # noqa: B023

        kernel()
        ratios = []
        for _ in range(9):
            with tempfile.TemporaryDirectory() as folder:
                made = create(f"{folder}/x.zarr", replace(work.manifest(), block=block), {})
                todo = regions(work.grid, block)
                start = time.perf_counter()
                blocks = ((r, made.completed(r) == 0) for r in todo)
                write = partial(_write, made)
                count = sum(1 for _ in here(runner, blocks, write))
                swept = time.perf_counter() - start
            start = time.perf_counter()
            kernel()
            alone = time.perf_counter() - start
            ratios.append((swept / alone, swept, alone, alone / count))
        ratio, swept, alone, each = sorted(ratios)[len(ratios) // 2]
        print(f"| {p} | {each:.2f} | {swept:.2f} | {alone:.2f} | {ratio - 1:+.1%} |", flush=True)


def _write(store, region, wanted, values) -> None:
    store.write(region, 0, wanted, values)


def memory() -> None:
    """Peak memory of sweeps of a thousand to a million cells, in processes of their own."""
    print("| cells | budget, MiB | peak above start, MiB | wall, s |\n|---|---:|---:|---:|")
    for seeds in (250, 2500, 25_000, 250_000):
        done = subprocess.run(
            [sys.executable, __file__, "_memory", str(seeds)], capture_output=True, text=True
        )
        print(done.stdout.strip() or done.stderr, flush=True)


def _memory(seeds: int) -> None:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        warm = {n: v for n, v in grid(20).items() if n != "sigma"} | {"sigma": 1.0}
        nm.sweep(nm.sweeps.linear, warm, 2, store=f"{folder}/warm.zarr")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        nm.sweep(nm.sweeps.linear, grid(20), seeds, store=f"{folder}/x.zarr")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    wall = time.perf_counter() - start
    print(f"| {4 * seeds:,} | 256 | {grown:.0f} | {wall:.1f} |")


def workers() -> None:
    """Strong scaling: the same blocks on one and on two worker processes of one core each.

    The last line is what the machine has to give: two processes that share nothing.
    """
    from distributed import Client, LocalCluster

    print("| workers | seconds | speed-up |\n|---|---:|---:|")
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    taken = []
    for count in (1, 2):
        cluster = LocalCluster(n_workers=count, threads_per_worker=1, dashboard_address=None)
        with tempfile.TemporaryDirectory() as folder, cluster, Client(cluster) as client:
            pids = client.run(os.getpid)
            for core, pid in enumerate(sorted(pids.values())):  # threads inherit at start
                for thread in os.listdir(f"/proc/{pid}/task"):
                    os.sched_setaffinity(int(thread), {core})
            path, cells = f"{folder}/x.zarr", grid(20)
            marks: list[tuple[int, float]] = []
            nm.sweep(
                nm.sweeps.linear, cells, 200_000, store=path, block=20_000, client=client,
                progress=lambda done, _, m=marks: m.append((done, time.perf_counter())),
            )  # fmt: skip
            warm = next(i for i, (done, _) in enumerate(marks) if done >= 20_000 * 2 * count)
            (a, start), (b, stop) = marks[warm], marks[-1]
            taken.append((stop - start) / (b - a))
        print(f"| {count} | {taken[-1] * 800_000:.1f} | {taken[0] / taken[-1]:.2f} |", flush=True)
    alone, both = _pinned_together(1), _pinned_together(2)
    print(f"| 2, nothing shared | {both:.1f} | {2 * alone / both:.2f} |")


def _pinned_together(count: int) -> float:
    """Seconds of the slowest of some processes that do the same work, a core each."""
    start = time.time() + 15
    started = [
        subprocess.Popen(
            [sys.executable, __file__, "_pinned", str(core), str(int(start))],
            stdout=subprocess.PIPE, text=True,
        )
        for core in range(count)
    ]  # fmt: skip
    return max(float(process.communicate()[0]) for process in started)


def _pinned(core: int, start: int) -> None:
    os.sched_setaffinity(0, {core})
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    _, run = ready(grid(20), 10_000, block=20_000)
    run()
    time.sleep(max(0, start - time.time()))
    print(seconds(lambda: [run() for _ in range(8)], 1))


def million() -> None:
    """A million cells of 25 rates, half of them underparameterized, into a store."""
    for under, name in ((False, "overparameterized"), (True, "underparameterized")):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            result = nm.sweep(nm.sweeps.linear, grid(20, under), 125_000, store=f"{folder}/x.zarr")
            wall = time.perf_counter() - start
            cells = int(result["finite"].size)
            problem = nm.MixedLinearRegression(
                **{n: grid(20, under)[n] for n in ("p", "m", "n_t", "n_v", "n_r")},
                sigma=1.0,
                nu=0.5,
            )
        print(f"{name}: {cells:,} cells, {normals_per_run(problem)} normals each, {wall:.1f} s")


if __name__ == "__main__":
    command, *rest = sys.argv[1:] or ["peers"]
    commands = [rates, peers, overhead, memory, _memory, workers, _pinned, million]
    {function.__name__: function for function in commands}[command](*map(int, rest))
