"""Modes of differentiation through the inner steps: time, memory and compilation.

ReLU networks, 25 tasks; one compiled meta-gradient. Memory is the temporary memory of XLA, besides
arguments and results. The defaults of `maml_value_and_grad` follow this table.
"""

import time

import harness
import jax

import negmaml as nm
from negmaml.examples import mlp

TASKS = 25
MODES = [("reverse", None), ("mixed", None), ("remat", None), ("low-rank", None)]
MODES += [("reverse", 1), ("mixed", 1)]  # one task at a time
# (sizes of the layers, points a task, inner steps)
CASES = [((1, 40, 40, 1), 10, 1), ((1, 40, 40, 1), 100, 5), ((1, 128, 128, 1), 10, 1)]
CASES += [((1, 128, 128, 1), 40, 1), ((1, 256, 256, 1), 50, 1), ((1, 256, 256, 1), 100, 1)]
CASES += [((1, 256, 256, 1), 10, 5), ((1, 256, 256, 1), 100, 5), ((1, 1024, 1024, 1), 10, 1)]
CASES += [((1, 1024, 1024, 1), 10, 5)]


def random_case(sizes, points):
    """Parameters and tasks of random numbers, whose values do not matter here."""
    keys = iter(jax.random.split(jax.random.key(0), 5))
    ends = [(TASKS, points, n) for n in (sizes[0], sizes[-1])] * 2
    parts = [jax.random.normal(next(keys), shape) for shape in ends]
    return mlp.init(next(keys), sizes), nm.Tasks(tuple(parts[:2]), tuple(parts[2:]))


def seconds_per_call(function, *arguments, repetitions=5, least=0.1):
    """The least mean time over several bursts of calls of at least 0.1 s."""
    jax.block_until_ready(function(*arguments))
    best = float("inf")
    for _ in range(repetitions):
        start, calls = time.perf_counter(), 0
        while time.perf_counter() - start < least:
            jax.block_until_ready(function(*arguments))
            calls += 1
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def measure(sizes, points, steps, method, batch_size):
    """Return one cell: milliseconds, megabytes and seconds of compilation."""
    params, tasks = random_case(sizes, points)
    rule = nm.GradientDescent(1e-3, steps)
    function = nm.maml_value_and_grad(mlp.loss, rule, method=method, batch_size=batch_size)
    start = time.perf_counter()
    compiled = jax.jit(function).lower(params, tasks).compile()
    compilation = time.perf_counter() - start
    megabytes = compiled.memory_analysis().temp_size_in_bytes / 1e6
    return (
        f"{1e3 * seconds_per_call(compiled, params, tasks):.3g}, {megabytes:.3g}, {compilation:.1f}"
    )


def main(_, report):
    report.note("Cells: ms per call, MB, s to compile")
    names = [method if size is None else f"{method}, 1 at a time" for method, size in MODES]
    report.table("network", "points", "steps", *names)
    for sizes, points, steps in CASES:
        cells = [measure(sizes, points, steps, *mode) for mode in MODES]
        report.row("-".join(map(str, sizes)), points, steps, *cells)


if __name__ == "__main__":
    harness.run(main, __doc__)
