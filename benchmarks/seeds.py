"""Meta-steps per second of one seed, and of 32 at once: vmapped, and over a device for each core.

The sinusoid of Finn et al.: a network of 1-40-40-1 units, 25 tasks of 10 and 10 points, Adam,
sampling included.
"""

import os
import time

import jax
import optax

import negmaml as nm
from negmaml.examples import mlp

SEEDS, STEPS, ROUNDS = 32, 500, 5


def rate(function, steps):
    """The best number of meta-steps per second."""
    jax.block_until_ready(function())
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready(function())
        best = min(best, time.perf_counter() - start)
    return steps / best


def main():
    """Print the table."""
    jax.config.update("jax_num_cpu_devices", os.cpu_count())
    tasks = nm.tasks.Sinusoid(m=25, n_t=10, n_v=10)
    value_and_grad = nm.maml_value_and_grad(mlp.loss, nm.GradientDescent(0.01))
    optimizer, params = optax.adam(1e-3), mlp.init(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), SEEDS)

    def one(key):
        return nm.fit(key, params, value_and_grad, tasks, optimizer, STEPS).params

    many = jax.jit(jax.vmap(one))
    print(f"JAX {jax.__version__}, {jax.device_count()} devices\n")
    print("| method | meta-steps a second |\n|---|---:|")
    print(f"| one seed | {rate(lambda: one(keys[0]), STEPS):.0f} |")
    print(f"| {SEEDS} seeds, vmap | {rate(lambda: many(keys), SEEDS * STEPS):.0f} |")
    spread = rate(lambda: nm.map_over_devices(one, keys), SEEDS * STEPS)
    print(f"| {SEEDS} seeds, map_over_devices | {spread:.0f} |")


if __name__ == "__main__":
    main()
