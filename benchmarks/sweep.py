"""Sweeps: speed compared with other methods, overhead, memory, workers, a million cells, resuming.

python benchmarks/sweep.py rates|peers|overhead|memory|workers|million|engine|resume
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import harness
import jax
import jax.numpy as jnp
import numpy as np

import negmaml as nm
from negmaml.linear.data import normals_per_run
from negmaml.sweeps.planning import planned, regions

STATISTICS = ["mean", "sem", "count", "min", "max"]
RATES = np.linspace(-0.6, 0.6, 25)
OVER = {20: (3, 10, 2), 60: (3, 30, 2), 200: (5, 50, 8)}  # p: m, n_t, n_v
LIMIT = 60.0


def grid(p: int, under: bool = False) -> dict:
    """The linear model with 25 rates and four noises."""
    m, n_t, n_v = (20, 10, 5) if under else OVER[p]
    return {"p": p, "m": m, "n_t": n_t, "n_v": n_v, "n_r": 20, "nu": 0.5,
            "sigma": [0.1, 0.5, 1.0, 2.0], "train_rate": RATES, "adapt_rate": 0.2}  # fmt: skip


def seconds(function, repeats: int = 3) -> float:
    """The least time of some calls of a compiled function."""
    return min(harness.timed(function) for _ in range(repeats))


def ready(cells: dict, seeds: int, block: int | None = None):
    """A compiled runner with its block size, and a function that runs all blocks."""
    work = nm.sweeps.prepare(nm.sweeps.linear, cells, seeds)
    runner = work.runner(work.grid.shape, None, None)
    runner.block = planned(work, None, block, None)[0].block
    todo = regions(work.grid, runner.block)
    full = [np.ones([part.stop - part.start for part in region], bool) for region in todo]

    def run():
        for _ in runner.compute(zip(todo, full, strict=True)):
            pass

    return runner, run


def rates(report) -> None:
    """Time of 25 rates and of one, in a sweep."""
    report.table("p", "parameterized", "25 rates, s", "one rate, s", "ratio", texts=2)
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
        report.row(p, kind, f"{a:.3f}", f"{b:.3f}", f"{a / b:.2f}")


def numpy_cells(arguments) -> int:
    """Batched NumPy over cells, with Gram matrices as quadratics in the rate, too."""
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


def peers(report) -> None:
    """Cells per second of the same grid by four methods."""
    head = "sweep", "loop of jitted calls", "one flat vmap", "NumPy, two processes"
    report.table("p", *head)
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
        report.row(p, *(f"{x:,.0f}" for x in speed))


def overhead(report) -> None:
    """Time of a sweep into a store, compared with calls of its compiled programs only."""
    from negmaml.sweeps.store import create
    from negmaml.sweeps.worker import ListedShard, run

    report.table("p", "block, s", "sweep to store, s", "programs only, s", "overhead")
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
        positions = np.zeros(program.batch, np.int32)
        whole = np.array([[0] * len(block), work.grid.shape], np.int32)

        def kernel():
            for _ in range(int(calls)):  # noqa: B023
                jax.block_until_ready(program(positions, whole))  # noqa: B023

        kernel()
        ratios = []
        for _ in range(9):
            with tempfile.TemporaryDirectory() as folder:
                made = create(f"{folder}/x.zarr", replace(work.manifest(), block=block), {})
                todo = regions(work.grid, block)
                start = time.perf_counter()
                shard = ListedShard(0, todo, lambda r: made.completed(r) == 0)  # noqa: B023
                count = sum(1 for _ in run(runner, made, shard))
                swept = time.perf_counter() - start
            start = time.perf_counter()
            kernel()
            alone = time.perf_counter() - start
            ratios.append((swept / alone, swept, alone, alone / count))
        ratio, swept, alone, each = sorted(ratios)[len(ratios) // 2]
        report.row(p, f"{each:.2f}", f"{swept:.2f}", f"{alone:.2f}", f"{ratio - 1:+.1%}")


def memory(report) -> None:
    """Peak memory of sweeps of a thousand to a million cells, each in its own process."""
    report.table("cells, budget 256 MiB", "peak above start, MiB", "wall, s")
    for seeds in (250, 2500, 25_000, 250_000):
        found = harness.in_process("sweep.py", "_memory", seeds)
        report.row(f"{4 * seeds:,}", *found.get("cells", [found.get("skipped"), ""]))


def _memory(seeds: int) -> None:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        warm = {n: v for n, v in grid(20).items() if n != "sigma"} | {"sigma": 1.0}
        nm.sweep(nm.sweeps.linear, warm, 2, store=f"{folder}/warm.zarr")
        before = harness.peak_mib()
        nm.sweep(nm.sweeps.linear, grid(20), seeds, store=f"{folder}/x.zarr")
    increase, wall = harness.peak_mib() - before, time.perf_counter() - start
    print(json.dumps({"cells": [f"{increase:.0f}", f"{wall:.1f}"]}))


def workers(report) -> None:
    """Strong scaling: the same blocks on one and on two worker processes of one core each.

    The last row, two independent processes, is the upper bound on this machine.
    """
    from distributed import Client, LocalCluster

    report.table("workers", "seconds", "speed-up")
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
        report.row(count, f"{taken[-1] * 800_000:.1f}", f"{taken[0] / taken[-1]:.2f}")
    alone, both = _pinned_together(1), _pinned_together(2)
    report.row("2, independent", f"{both:.1f}", f"{2 * alone / both:.2f}")


def _pinned_together(count: int) -> float:
    """Seconds of the slowest of some processes that do the same work on one core each."""
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


def million(report) -> None:
    """A million cells of 25 rates, half of them underparameterized, into a store."""
    report.table("half", "cells", "normals per cell", "seconds")
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
        report.row(name, f"{cells:,}", normals_per_run(problem), f"{wall:.1f}")


def free(key, sigma, train_rate) -> dict:
    """A cell that costs nothing: one draw, and two outputs along the rates."""
    draw = sigma * jax.random.uniform(key)
    return {"test_loss": draw + train_rate, "weight_error": draw * train_rate}


def engine(report) -> None:
    """Costless cells per CPU second of this process, and the CPU time of a block.

    A cell is one seed of one point; its two outputs have 25 values each, along a vectorized axis.
    Each speed is that after the first block, so it excludes compilation.
    """
    report.table("costless cells", "measured")
    with tempfile.TemporaryDirectory() as folder:
        for where in ("memory", "store"):
            ways = {} if where == "memory" else {"store": f"{folder}/x.zarr"}
            report.row(where, f"{_speed(ways, 500_000) / 1e6:.2f} million cells per CPU second")
        ways = {"reduce": {"seed": STATISTICS}, "block": 8_000_000}
        speed = _speed(ways, 8_000_000)
        report.row("reduced over seeds", f"{speed / 1e6:.2f} million cells per CPU second")
        few, many = (_cpu_seconds(n, block=1000, store=f"{folder}/b{n}.zarr") for n in (4, 200))
        report.row("a block of 1000 cells", f"{(many - few) / 196 * 1e3:.2f} CPU ms, into a store")
        few, many = (_cpu_seconds(n, block=1000) for n in (4, 400))
        report.row("a block of 1000 cells", f"{(many - few) / 396 * 1e3:.2f} CPU ms, in memory")
        begun, start = harness.cpu_seconds(), time.perf_counter()
        with contextlib.suppress(KeyboardInterrupt):
            nm.sweep(
                free, {"sigma": np.linspace(0.1, 2.0, 100), "train_rate": RATES}, 10**7,
                f"{folder}/r.zarr", vectorized=["train_rate"], reduce={"seed": STATISTICS},
                progress=_stop,
            )  # fmt: skip
        taken = harness.cpu_seconds() - begun, time.perf_counter() - start
        report.row(
            "10^9 cells, reduced", "{:.1f} CPU s ({:.1f} s) to the first block".format(*taken)
        )


def _stop(done: int, cells: int) -> None:
    """Stop a sweep after its first block."""
    if done:
        raise KeyboardInterrupt


def _speed(ways: dict, seeds: int) -> float:
    """Cells per CPU second between the first and the last block of a sweep, the best of three."""
    found = []
    for _ in range(3):
        marks: list[tuple[float, float]] = []
        _cpu_seconds(
            4 * seeds / 1000, **ways,
            progress=lambda done, all_, m=marks: m.append((done / all_, harness.cpu_seconds())),
        )  # fmt: skip
        (a, begun), (b, ended) = next(mark for mark in marks if mark[0]), marks[-1]
        found.append(4 * seeds * (b - a) / (ended - begun))
    return max(found)


def _cpu_seconds(thousands: float, store: str | None = None, **options) -> float:
    """CPU seconds of a sweep of some thousand costless cells."""
    cells = {"sigma": [0.1, 0.5, 1.0, 2.0], "train_rate": RATES}
    if store is not None:
        shutil.rmtree(store, ignore_errors=True)
    start = harness.cpu_seconds()
    nm.sweep(free, cells, int(250 * thousands), store, vectorized=["train_rate"], **options)
    return harness.cpu_seconds() - start


def resume(report) -> None:
    """CPU time to open an unfinished store: a sweep until it computes, and `status`."""
    head = "to resume, s", "status, s", "status --check, s", "files", "peak above start, MiB"
    report.table("blocks", "cells of a block that are done", *head)
    for points in (10, 100, 1000):
        for half in (0, 1):
            found = harness.in_process("sweep.py", "_resume", points, half)
            done = "half of each" if half else "all of every second one"
            report.row(f"{100 * points:,}", done, *found.get("row", [found.get("skipped")]))


def scaled(key, x):
    """Quick to compile."""
    return {"y": x * jax.random.normal(key)}


def _resume(points: int, half: int) -> None:
    """Make a store of 100 blocks of 100 cells at each of some points, half done, and open it."""
    from negmaml.sweeps.store import create

    work = nm.sweeps.prepare(scaled, {"x": list(np.arange(points) / 4)}, 10_000)
    with tempfile.TemporaryDirectory() as folder:
        url = f"{folder}/x.zarr"
        made = create(url, replace(work.manifest(), block=(1, 100)), work.attributes())
        wanted = np.ones((1, 100), bool)
        wanted[:, 50 if half else 100 :] = False
        rows = {"y": np.zeros(wanted.sum(), np.float32), "finite": np.ones(wanted.sum(), bool)}
        made.write((slice(0, 1), slice(0, 100)), 0, wanted, rows)
        for name in ("y", "finite", "completed"):
            key = made.layouts[name].key
            content = Path(url, key((0, 0))).read_bytes()
            for at in range(2 - half, 100 * points, 2 - half):
                path = Path(url, key(divmod(at, 100)))
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content)
        nm.sweep(scaled, {"x": [0.5]}, 2)  # compiles what all sweeps share
        before, taken = harness.peak_mib(), []

        def stop(done, cells):
            assert done == cells // 2
            raise KeyboardInterrupt

        def resumed():
            try:
                nm.sweep(scaled, {"x": list(np.arange(points) / 4)}, 10_000, url, progress=stop)
            except KeyboardInterrupt:
                return

        for call in (
            resumed, lambda: nm.sweeps.status(url), lambda: nm.sweeps.status(url, check=True)
        ):  # fmt: skip
            start = time.process_time()
            call()
            taken.append(f"{time.process_time() - start:.2f}")
        files = sum(path.is_file() for path in Path(url).rglob("*"))
        increase = harness.peak_mib() - before
    print(json.dumps({"row": [*taken, f"{files:,}", f"{increase:.0f}"]}))


COMMANDS = {
    f.__name__: f for f in (rates, peers, overhead, memory, workers, million, engine, resume)
}
WORKERS = {
    "_memory": _memory,
    "_pinned": _pinned,
    "_resume": _resume,
}  # run by the commands in fresh processes


def main(options, report) -> None:
    if options.command in WORKERS:
        WORKERS[options.command](*options.arguments)
    else:
        COMMANDS[options.command](report)


if __name__ == "__main__":
    harness.run(
        main,
        __doc__,
        harness.option("command", choices=[*COMMANDS, *WORKERS], metavar="|".join(COMMANDS)),
        harness.option("arguments", nargs="*", type=int, help=argparse.SUPPRESS),
    )
