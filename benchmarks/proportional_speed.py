"""What a prediction costs: cold, warm in a vmap of 10^5, and a 200 x 200 phase diagram.

python benchmarks/proportional_speed.py        (each line in a process of its own)
"""

import subprocess
import sys
import time

import numpy as np

LINES = ("cold", "warm", "warm with ridge", "batch", "phase diagram")
COUNT = 100_000


def measure(line):
    import jax
    import jax.numpy as jnp

    import negmaml as nm

    jax.config.update("jax_enable_x64", True)
    problem = nm.MixedLinearRegression(p=60, m=3, n_t=20, n_v=10, n_r=20, sigma=0.5, nu=1.0)
    rates = jnp.linspace(-5, 5, COUNT)

    def seconds(function, *arguments):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        return time.perf_counter() - start

    if line == "cold":
        rule = nm.GradientDescent(0.2)
        return f"{seconds(nm.theory.test_loss, problem, rule, rule):.2f} s, first call"
    if line == "phase diagram":
        x = np.geomspace(0.05, 5, 200)
        arguments = 100.0, 10.0, 100 * x[:, None], 10 * x, 0.5, 1.0
        cold, warm = (seconds(nm.theory.phase_diagram, *arguments) for _ in range(2))
        return f"{cold:.1f} s first call, {warm:.1f} s again"

    def one(rate):
        ridge = 2.0 if line == "warm with ridge" else 0.0
        return nm.theory.weight_error(problem, nm.GradientDescent(rate), meta_ridge=ridge)

    function = jax.jit(one if line == "batch" else jax.vmap(one))
    seconds(function, rates)
    best = min(seconds(function, rates) for _ in range(3))
    return f"{best / COUNT * 1e6:.1f} microseconds a prediction"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(f"{sys.argv[1]:<16} {measure(sys.argv[1])}")
    else:
        for line in LINES:
            subprocess.run([sys.executable, __file__, line], check=True)
