"""Arrays of NumPy or JAX: the namespace of either, products at full precision, dtypes, shapes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from negmaml._core import taylor

_HOST = (np.ndarray, np.generic, int, float)
_PLAIN = {np.ndarray, np.float64, np.float32, int, float}  # the most frequent of them


def namespace(*trees) -> Any:
    """numpy where all leaves are its arrays or plain numbers, jax.numpy otherwise.

    A formula written over it serves single numbers on the host, without compilation, and traced
    ones in a program. If a leaf is a `negmaml._core.taylor.Node`, that module is returned,
    and the formula has derivatives on the host.
    """
    for tree in trees:  # mostly single arrays, for which the walk through a tree takes too long
        if type(tree) not in _PLAIN and not isinstance(tree, _HOST) and not _known(tree):
            break
    else:
        return np
    for leaf in jax.tree.leaves(trees):
        if isinstance(leaf, taylor.Node):
            return taylor
    return jnp


def _known(tree) -> bool:
    return all(isinstance(leaf, _HOST) for leaf in jax.tree.leaves(tree))


def stop_gradient(tree):
    """Return the tree with derivative zero."""
    xp = namespace(tree)
    if xp is taylor:
        return jax.tree.map(taylor.value_of, tree)
    return tree if xp is np else lax.stop_gradient(tree)


def working_dtype(*trees):
    """The floating dtype that the leaves promote to; Python numbers leave the choice to JAX."""
    return jnp.result_type(float, *jax.tree.leaves(trees))


def contract(subscripts: str, *operands):
    """`einsum` at full precision: accelerators would round the factors of these statistics.

    NumPy arrays give a NumPy array.
    """
    xp = namespace(operands)
    if xp is taylor:
        return taylor.einsum(subscripts, *operands)
    if xp is np:
        return np.einsum(subscripts, *operands, optimize=len(operands) > 2)
    return jnp.einsum(subscripts, *operands, precision=lax.Precision.HIGHEST)


def cast(tree, dtype):
    """Every leaf as an array of `dtype`, so that 0, 0.0 and jnp.array(0.0) compile once."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def canonicalize(tree, dtype):
    """Every leaf as an array of `dtype`: of NumPy if its value is known, of JAX if it is traced."""

    def settle(leaf):
        traced = isinstance(leaf, jax.core.Tracer)
        if traced:  # a program has no float64 without x64
            return jnp.asarray(leaf, jax.dtypes.canonicalize_dtype(dtype))
        return np.asarray(leaf, dtype)

    return jax.tree.map(settle, tree)


def outer(parameter, x):
    """Broadcast so that a function of both has shape parameter.shape + x.shape."""
    xp = namespace(parameter, x)
    x, parameter = xp.asarray(x), xp.asarray(parameter)
    # Axes of x go behind those of the parameter.
    return parameter.reshape(parameter.shape + (1,) * x.ndim), x
