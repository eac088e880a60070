"""A scalar model and tasks that compile quickly, for the tests of the outer loop."""

import jax
import jax.numpy as jnp
import numpy as np

import negmaml as nm

KEY = jax.random.key(0)
PARAMS = {"w": jnp.asarray(0.3), "v": jnp.asarray(-0.5)}
RULE = nm.GradientDescent(-0.02)


def loss(params, data):
    x, y = data
    return jnp.mean((params["w"] * x + params["v"] - y) ** 2)


def tasks(key):
    """Four tasks of two support and two query rows on random lines."""
    x = jax.random.uniform(key, (4, 5))
    y = x[:, 4:] * x[:, :4]
    return nm.Tasks((x[:, :2], y[:, :2]), (x[:, 2:4], y[:, 2:]))


ALGORITHM = nm.maml_value_and_grad(loss, RULE)
TEST = nm.maml(loss, nm.GradientDescent(0.02))
BATCH = tasks(KEY)


def same(first, second, rtol=1e-5, atol=1e-7):
    """Assert that two trees agree to rounding."""
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, atol), first, second)
