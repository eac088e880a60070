"""Precision and dtype: products at full precision, numbers of one type, shapes side by side."""

import jax
import jax.numpy as jnp
from jax import lax


def working_dtype(*trees):
    """The floating dtype that the leaves promote to; Python numbers leave the choice to JAX."""
    return jnp.result_type(float, *jax.tree.leaves(trees))


def contract(subscripts: str, *operands):
    """`einsum` at full precision: accelerators would round the factors of these statistics."""
    return jnp.einsum(subscripts, *operands, precision=lax.Precision.HIGHEST)


def cast(tree, dtype):
    """Every leaf as an array of `dtype`, so that 0, 0.0 and jnp.array(0.0) compile once."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def outer(parameter, x):
    """Broadcast so that a function of both has shape parameter.shape + x.shape."""
    x = jnp.asarray(x)
    parameter = jnp.asarray(parameter)
    return parameter.reshape(parameter.shape + (1,) * x.ndim), x
