"""What the exact simulation costs once compiled, and what 25 rates cost next to one.

python benchmarks/rates.py
"""

import time

import jax
import jax.numpy as jnp

import negmaml as nm
from negmaml.linear.data import normals_per_run
from negmaml.paper.reproduce import FIXED_RATE, PROBLEMS, RATES

RUNS = 1000
REPEATS = 9


def best_seconds(functions) -> list[float]:
    """The fastest of several runs of each function, taken in turns so that noise hits them all."""
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(REPEATS):
        for times, function in zip(seconds, functions, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(function())
            times.append(time.perf_counter() - start)
    return [min(times[1:]) for times in seconds]  # the first call compiles


def simulation(problem, rates):
    """One simulation at the paper's run count, over `rates` of meta-training."""
    key = jax.random.key(0)
    train, adapt = nm.GradientDescent(jnp.asarray(rates)), nm.GradientDescent(jnp.asarray(RATES))
    return lambda: nm.simulate(key, problem, train, adapt, runs=RUNS)


def main() -> None:
    print(f"| problem, {RUNS} runs | normals | 25 rates, s | one rate, s | ratio | M normals/s |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, problem in PROBLEMS.items():
        many, one = best_seconds([simulation(problem, r) for r in (RATES, [FIXED_RATE])])
        normals = RUNS * normals_per_run(problem) / 1e6
        print(
            f"| {name} | {normals:.1f} M | {many:.3f} | {one:.3f} | {many / one:.2f} "
            f"| {normals / many:.0f} |"
        )


if __name__ == "__main__":
    main()
