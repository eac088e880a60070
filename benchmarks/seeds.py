"""Meta-steps per second of one seed, and of 32 seeds by vmap and with one device per core.

The sinusoid task of Finn et al.: a network of 1-40-40-1 units, 25 tasks of 10 and 10 points, Adam,
with sampling.
"""

import os

import harness
import jax
import optax

import negmaml as nm
from negmaml.examples import mlp

SEEDS, STEPS, ROUNDS = 32, 500, 5


def main(_, report):
    jax.config.update("jax_num_cpu_devices", os.cpu_count())
    tasks = nm.tasks.Sinusoid(m=25, n_t=10, n_v=10)
    value_and_grad = nm.maml_value_and_grad(mlp.loss, nm.GradientDescent(0.01))
    optimizer, params = optax.adam(1e-3), mlp.init(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), SEEDS)

    def one(key):
        return nm.fit(key, params, value_and_grad, tasks, optimizer, STEPS).params

    vmapped = jax.jit(jax.vmap(one))
    report.note(f"{jax.device_count()} devices")
    report.table("method", "meta-steps per second")
    for name, function, count in (
        ("one seed", lambda: one(keys[0]), 1),
        (f"{SEEDS} seeds, vmap", lambda: vmapped(keys), SEEDS),
        (f"{SEEDS} seeds, map_over_devices", lambda: nm.map_over_devices(one, keys), SEEDS),
    ):
        (seconds,) = harness.best_seconds(function, repeats=ROUNDS)
        report.row(name, f"{count * STEPS / seconds:.0f}")


if __name__ == "__main__":
    harness.run(main, __doc__)
