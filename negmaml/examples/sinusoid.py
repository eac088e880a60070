"""Sinusoid regression: one test rate, three training rates, one of them negative.

The rate of the inner step in meta-training need not be the rate at test time. Networks are trained
at each training rate on the same tasks, and all adapt at the same rate to the same test tasks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import negmaml as nm
from negmaml.examples import mlp


class SinusoidResult(NamedTuple):
    """Test losses of every training rate and seed, shape (rates, seeds)."""

    train_rates: np.ndarray
    test_loss: np.ndarray


def main(
    steps: int = 5000,
    seeds: int = 8,
    train_rates: tuple[float, ...] = (-0.02, 0.0, 0.01),
    test_rate: float = 0.01,
    shots: int = 10,
    test_tasks: int = 1000,
) -> SinusoidResult:
    """Meta-train `seeds` networks of 1-40-40-1 units at each rate; adapt and test them all."""
    tasks = nm.tasks.Sinusoid(m=25, n_t=shots, n_v=shots)
    fresh = nm.tasks.Sinusoid(m=test_tasks, n_t=shots, n_v=shots)
    test = nm.maml(mlp.loss, nm.GradientDescent(test_rate))

    def run(item):
        key, rate = item
        # The keys do not depend on the rate: each seed gives all rates the same start and tasks.
        for_params, for_training, for_test = (jax.random.fold_in(key, i) for i in range(3))
        value_and_grad = nm.maml_value_and_grad(mlp.loss, nm.GradientDescent(rate))
        trained = nm.fit(
            for_training, mlp.init(for_params), value_and_grad, tasks, optax.adam(1e-3), steps
        )
        return test(trained.params, fresh(for_test))

    keys = jnp.tile(jax.random.split(jax.random.key(0), seeds), len(train_rates))
    rates = jnp.repeat(jnp.asarray(train_rates), seeds)
    # Runs are independent, so every device trains a part of them without communication.
    losses = nm.map_over_devices(run, (keys, rates))
    return SinusoidResult(np.asarray(train_rates), np.asarray(losses).reshape(-1, seeds))


def report(result: SinusoidResult) -> str:
    """A line for each rate: mean over seeds, its standard error, and median."""
    lines = [f"{'training rate':>13} {'test loss':>10} {'error':>8} {'median':>8}"]
    for rate, losses in zip(result.train_rates, result.test_loss, strict=True):
        # A single seed has no standard error.
        error = losses.std(ddof=1) / losses.size**0.5 if losses.size > 1 else np.nan
        lines.append(f"{rate:13g} {losses.mean():10.3f} {error:8.3f} {np.median(losses):8.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    import tyro

    print(report(tyro.cli(main)))
