"""Time of the exact simulation once compiled, at 25 rates and at one.

python benchmarks/rates.py
"""

import harness
import jax
import jax.numpy as jnp

import negmaml as nm
from negmaml.linear.data import normals_per_run
from negmaml.paper.reproduce import FIXED_RATE, PROBLEMS, RATES

RUNS = 1000
REPEATS = 8


def simulation(problem, rates):
    """A simulation at the paper's number of runs, at the given training rates."""
    key = jax.random.key(0)
    train, adapt = nm.GradientDescent(jnp.asarray(rates)), nm.GradientDescent(jnp.asarray(RATES))
    return lambda: nm.simulate(key, problem, train, adapt, runs=RUNS)


def main(_, report) -> None:
    head = "normals", "25 rates, s", "one rate, s", "ratio", "M normals/s"
    report.table(f"problem, {RUNS} runs", *head)
    for name, problem in PROBLEMS.items():
        functions = [simulation(problem, rates) for rates in (RATES, [FIXED_RATE])]
        many, one = harness.best_seconds(*functions, repeats=REPEATS)
        normals = RUNS * normals_per_run(problem) / 1e6
        report.row(
            name, f"{normals:.1f} M", f"{many:.3f}", f"{one:.3f}", f"{many / one:.2f}",
            f"{normals / many:.0f}",
        )  # fmt: skip


if __name__ == "__main__":
    harness.run(main, __doc__)
