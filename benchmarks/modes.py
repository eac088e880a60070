"""The ways through the inner steps: time, memory and compilation of each, over sizes and steps.

ReLU networks, 25 tasks; one meta-gradient, compiled. Memory is what XLA allots besides arguments
and results. The table is behind the defaults of `maml_value_and_grad`.
"""

import time

import jax
import jax.numpy as jnp

import negmaml as nm
from negmaml.examples import mlp

TASKS = 25
WAYS = [("reverse", None), ("mixed", None), ("remat", None), ("low-rank", None)]
WAYS += [("reverse", 1), ("mixed", 1)]  # one task at a time
# (sizes of the layers, points a task, inner steps)
CASES = [((1, 40, 40, 1), 10, 1), ((1, 40, 40, 1), 100, 5), ((1, 128, 128, 1), 10, 1)]
CASES += [((1, 128, 128, 1), 40, 1), ((1, 256, 256, 1), 50, 1), ((1, 256, 256, 1), 100, 1)]
CASES += [((1, 256, 256, 1), 10, 5), ((1, 256, 256, 1), 100, 5), ((1, 1024, 1024, 1), 10, 1)]
CASES += [((1, 1024, 1024, 1), 10, 5)]


def setting(sizes, points):
    """Parameters and tasks of random numbers; their values do not matter here."""
    keys = iter(jax.random.split(jax.random.key(0), 5))
    ends = [(TASKS, points, n) for n in (sizes[0], sizes[-1])] * 2
    parts = [jax.random.normal(next(keys), shape) for shape in ends]
    return mlp.init(next(keys), sizes), nm.Tasks(tuple(parts[:2]), tuple(parts[2:]))


def seconds_a_call(function, *arguments, repetitions=5, least=0.1):
    """The best mean of several bursts of calls."""
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
    """One cell: milliseconds, megabytes and seconds of compilation."""
    params, tasks = setting(sizes, points)
    rule = nm.GradientDescent(1e-3, steps)
    function = nm.maml_value_and_grad(mlp.loss, rule, method=method, batch_size=batch_size)
    start = time.perf_counter()
    compiled = jax.jit(function).lower(params, tasks).compile()
    compilation = time.perf_counter() - start
    megabytes = compiled.memory_analysis().temp_size_in_bytes / 1e6
    return (
        f"{1e3 * seconds_a_call(compiled, params, tasks):.3g}, {megabytes:.3g}, {compilation:.1f}"
    )


def main():
    """Print the table: ms, MB, seconds to compile."""
    print(f"JAX {jax.__version__}, {jnp.zeros(()).device}; ms a call, MB, s to compile\n")
    names = [method if size is None else f"{method}, 1 at a time" for method, size in WAYS]
    print("| network | points | steps | " + " | ".join(names) + " |")
    print("|---|---:|---:|" + "---:|" * len(names))
    for sizes, points, steps in CASES:
        cells = [measure(sizes, points, steps, *way) for way in WAYS]
        network = "-".join(map(str, sizes))
        print(f"| {network} | {points} | {steps} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
