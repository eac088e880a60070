"""Choose rates and ridge without held-out tasks, by exact meta-learning in a network's kernel.

The data are thirty sinusoids of ten points. Every pair of training rate and ridge is solved
exactly, with every sinusoid left out in turn in closed form. The choice is tested on a thousand new
sinusoids, and compared with the usual choice of one rate for training and test.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import negmaml as nm


class RatesResult(NamedTuple):
    """The chosen rates, their leave-one-out loss, and test losses of them and of a shared rate."""

    train_rate: float
    adapt_rate: float
    meta_ridge: float
    left_out: float
    chosen: float
    shared: float


def main(tasks: int = 30, points: int = 5, test_tasks: int = 1000, seed: int = 0) -> RatesResult:
    """Meta-train at all rates and ridges, choose by leave-one-task-out, and test."""
    keys = jax.random.split(jax.random.key(seed), 2)
    seen = nm.tasks.Sinusoid(m=tasks, n_t=points, n_v=points)(keys[0])
    fresh = nm.tasks.Sinusoid(m=test_tasks, n_t=points, n_v=points)(keys[1])
    kernel = nm.kernels.relu_network(2, bias_variance=0.5)

    # Rates in units of 1 over the largest eigenvalue: beyond two, steps diverge.
    x = seen.support[0].reshape(-1, 1)
    rates = np.linspace(-1.5, 1.5, 25) / jnp.linalg.eigvalsh(kernel(x, x) / len(x))[-1]
    rule, ridges = nm.GradientDescent(rates), np.geomspace(1e-2, 1e2, 9)
    left = nm.kernels.leave_one_task_out(kernel, seen, rule, meta_ridge=ridges)
    losses = jnp.mean(left.losses(rule), -1)  # training rate, ridge, adaptation rate
    # Every task may choose, since its loss is that of the model trained without it.
    t, l, r = np.unravel_index(jnp.nanargmin(losses), losses.shape)

    model = nm.kernels.meta_train(kernel, seen, rule, meta_ridge=ridges)
    test = model.loss(fresh, rule)
    # The usual choice: entries with one rate in training and test. Indices on both sides of a
    # slice put their axis first, so the transpose is (ridges, rates).
    same = jnp.arange(len(rates))
    ridge, rate = np.unravel_index(
        jnp.nanargmin(losses[same, :, same].T), (len(ridges), len(rates))
    )
    found = rates[t], rates[r], ridges[l], losses[t, l, r], test[t, l, r], test[rate, ridge, rate]
    return RatesResult(*map(float, found))


if __name__ == "__main__":
    import tyro

    for name, value in tyro.cli(main)._asdict().items():
        print(f"{name:>11} {value:9.4g}")
