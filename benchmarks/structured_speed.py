"""Time of a prediction for inputs with a covariance: p = 1000 eigenvalues, float64.

python benchmarks/structured_speed.py

CPU time of the process, the least of several calls; the first call includes tracing and compiling.
"""

import time

import harness
import jax
import jax.numpy as jnp
import numpy as np

import negmaml as nm

P, RATES, GRID, RIDGES = 1000, 1000, 25, 25


def main(_, report):
    jax.config.update("jax_enable_x64", True)
    problem = nm.MixedLinearRegression(
        p=P, m=5, n_t=200, n_v=50, n_r=100, sigma=0.5, nu=1.0,
        input_covariance=np.arange(1, P + 1.0) ** -0.8,
    )  # fmt: skip
    adapt = nm.GradientDescent(0.2)

    def loss(rates, adapt=adapt, **options):
        return nm.theory.test_loss(problem, nm.GradientDescent(rates), adapt, **options)

    rates = jnp.linspace(-3, 3, RATES)
    mapped = jax.jit(jax.vmap(loss))
    grid, ridges = jnp.linspace(-2, 2, GRID), jnp.geomspace(1e-4, 1e4, RIDGES) * problem.rows

    @jax.jit
    def lowest():
        both = nm.GradientDescent(grid)
        return jnp.min(jax.lax.map(lambda ridge: loss(grid, both, meta_ridge=ridge), ridges), 0)

    report.table("prediction", "CPU time")
    report.row("first call", f"{harness.timed(lambda: loss(-0.2), time.process_time):.2f} s")
    for name, function, repeats, count, unit in (
        ("one, warm", lambda: loss(-0.2), 50, 1, "ms"),
        (f"each of a batch of {RATES} rates", lambda: loss(rates), 5, RATES, "us"),
        (f"each of a vmap over {RATES} rates", lambda: mapped(rates), 5, RATES, "us"),
        (f"{GRID} x {GRID} rates at the best of {RIDGES} ridges", lowest, 5, 1, "s"),
    ):
        (seconds,) = harness.best_seconds(function, repeats=repeats, clock=time.process_time)
        report.row(name, f"{seconds / count * {'s': 1, 'ms': 1e3, 'us': 1e6}[unit]:.3g} {unit}")


if __name__ == "__main__":
    harness.run(main, __doc__)
