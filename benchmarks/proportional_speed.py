"""Time of a prediction: cold, warm in a vmap over 10^5 rates, and a 200 x 200 phase diagram.

python benchmarks/proportional_speed.py        (each line in its own process)
"""

import argparse
import json

import harness
import numpy as np

CASES = ("cold", "warm", "warm with ridge", "batch", "phase diagram")
COUNT = 100_000


def measure(case):
    import jax
    import jax.numpy as jnp

    import negmaml as nm

    jax.config.update("jax_enable_x64", True)
    problem = nm.MixedLinearRegression(p=60, m=3, n_t=20, n_v=10, n_r=20, sigma=0.5, nu=1.0)
    rates = jnp.linspace(-5, 5, COUNT)
    if case == "cold":
        rule = nm.GradientDescent(0.2)
        seconds = harness.timed(lambda: nm.theory.test_loss(problem, rule, rule))
        return f"{seconds:.2f} s, first call"
    if case == "phase diagram":
        x = np.geomspace(0.05, 5, 200)
        sizes = 100.0, 10.0, 100 * x[:, None], 10 * x, 0.5, 1.0
        cold, warm = (harness.timed(lambda: nm.theory.phase_diagram(*sizes)) for _ in range(2))
        return f"{cold:.1f} s first call, {warm:.1f} s again"

    def one(rate):
        ridge = 2.0 if case == "warm with ridge" else 0.0
        return nm.theory.weight_error(problem, nm.GradientDescent(rate), meta_ridge=ridge)

    function = jax.jit(one if case == "batch" else jax.vmap(one))
    (seconds,) = harness.best_seconds(lambda: function(rates), repeats=3)
    return f"{seconds / COUNT * 1e6:.1f} us per prediction"


def main(options, report):
    if options.case:
        print(json.dumps({"time": measure(options.case)}))
        return
    report.table("case", "time")
    for case in CASES:
        found = harness.in_process("proportional_speed.py", "--case", case)
        report.row(case, *found.values())


if __name__ == "__main__":
    hidden = harness.option("--case", choices=CASES, help=argparse.SUPPRESS)
    harness.run(main, __doc__, hidden)
