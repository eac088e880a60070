"""What a prediction costs for inputs with a covariance: p = 1000 eigenvalues, float64.

python benchmarks/structured_speed.py

CPU time of a process, least of several; the first call counts tracing and compiling.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

import negmaml as nm

P, RATES, GRID, RIDGES = 1000, 1000, 25, 25


def cpu_seconds(function, repeats):
    """The least of a few calls."""
    found = []
    for _ in range(repeats):
        start = time.process_time()
        jax.block_until_ready(function())
        found.append(time.process_time() - start)
    return min(found)


def main():
    jax.config.update("jax_enable_x64", True)
    problem = nm.MixedLinearRegression(
        p=P, m=5, n_t=200, n_v=50, n_r=100, sigma=0.5, nu=1.0,
        input_covariance=np.arange(1, P + 1.0) ** -0.8,
    )  # fmt: skip
    adapt = nm.GradientDescent(0.2)

    def loss(rates, adapt=adapt, **options):
        return nm.theory.test_loss(problem, nm.GradientDescent(rates), adapt, **options)

    print(f"first call            {cpu_seconds(lambda: loss(-0.2), 1):6.2f} s")
    print(f"one prediction, warm  {1e3 * cpu_seconds(lambda: loss(-0.2), 50):6.2f} ms")
    rates = jnp.linspace(-3, 3, RATES)
    loss(rates)
    each = cpu_seconds(lambda: loss(rates), 5) / RATES
    print(f"a batch of {RATES} rates  {1e6 * each:6.0f} us each")
    mapped = jax.jit(jax.vmap(loss))
    mapped(rates)
    each = cpu_seconds(lambda: mapped(rates), 5) / RATES
    print(f"a vmap of {RATES} rates   {1e6 * each:6.0f} us each")

    grid, ridges = jnp.linspace(-2, 2, GRID), jnp.geomspace(1e-4, 1e4, RIDGES) * problem.rows

    @jax.jit
    def lowest():
        both = nm.GradientDescent(grid)
        return jnp.min(jax.lax.map(lambda ridge: loss(grid, both, meta_ridge=ridge), ridges), 0)

    lowest()
    seconds = cpu_seconds(lowest, 5)
    print(f"{GRID} x {GRID} rates, each at the best of {RIDGES} ridges  {seconds:6.2f} s")


if __name__ == "__main__":
    main()
