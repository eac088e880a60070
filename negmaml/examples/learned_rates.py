"""Meta-SGD on sinusoids: every parameter learns its own inner rate, of either sign.

Rates start at one positive value and are meta-parameters like the weights, without constraint. The
example prints the fraction of negative rates in each layer, and the test loss of learned rates and
of MAML with the fixed rate.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import negmaml as nm
from negmaml.examples import mlp


class LearnedRatesResult(NamedTuple):
    """Test losses, and the fraction of negative rates in each leaf of the parameters."""

    fixed: float
    learned: float
    negative: dict[str, float]


def main(
    steps: int = 5000, rate: float = 0.01, shots: int = 10, test_tasks: int = 1000, seed: int = 0
) -> LearnedRatesResult:
    """Train with learned and with fixed rates from the same start on the same tasks."""
    keys = jax.random.split(jax.random.key(seed), 3)
    tasks = nm.tasks.Sinusoid(m=25, n_t=shots, n_v=shots)
    fresh = nm.tasks.Sinusoid(m=test_tasks, n_t=shots, n_v=shots)(keys[2])
    params, optimizer = mlp.init(keys[0]), optax.adam(1e-3)

    # Arrays like the leaves: a number would be one rate for the whole leaf.
    rates = jax.tree.map(lambda leaf: jnp.full(leaf.shape, rate), params)
    meta = nm.MetaSGDParams(params, rates)
    # Both runs have the same key and start, so they see the same tasks in the same order.
    learned = nm.fit(keys[1], meta, nm.meta_sgd(mlp.loss), tasks, optimizer, steps).params
    rule = nm.GradientDescent(rate)
    value_and_grad = nm.maml_value_and_grad(mlp.loss, rule)
    fixed = nm.fit(keys[1], params, value_and_grad, tasks, optimizer, steps).params

    # Learned rates need no rule of their own: a rate may be a pytree like the parameters.
    own = nm.GradientDescent(learned.rate)
    paths = jax.tree_util.tree_leaves_with_path(learned.rate)
    return LearnedRatesResult(
        fixed=float(nm.maml(mlp.loss, rule)(fixed, fresh)),
        learned=float(nm.maml(mlp.loss, own)(learned.params, fresh)),
        negative={jax.tree_util.keystr(p): float(np.mean(np.asarray(r) < 0)) for p, r in paths},
    )


if __name__ == "__main__":
    import tyro

    result = tyro.cli(main)
    print(f"test loss, fixed rate: {result.fixed:.4f}, learned rates: {result.learned:.4f}")
    for leaf, share in result.negative.items():
        print(f"negative rates in params{leaf}: {100 * share:.0f} %")
