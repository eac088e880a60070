"""Frozen dataclasses that are JAX pytrees.

`jax.tree_util.register_dataclass` rebuilds an object by calling its class, which runs the
checks of `__post_init__` on whatever a transformation puts into the leaves: cotangents of
sigma are often negative and perfectly good. Here a value is checked when a user builds the
object and never again.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.calls import explain_calls
from negmaml._core.display import call_text

T = TypeVar("T")


def static(default: Any = dataclasses.MISSING) -> Any:
    """Return a field of a `pytree` class that is part of its structure: a new value compiles anew.

    Arguments:
        default: the value of the field where it is not given; without it the field is required.

    >>> @pytree
    ... class Power:
    ...     scale: float
    ...     exponent: int = static(default=2)
    >>> jax.tree.leaves(Power(3.0)), Power(3.0).exponent  # the exponent is no leaf
    ([3.0], 2)
    """
    return dataclasses.field(default=default, metadata={"static": True})


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
def pytree(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass whose fields are traced, but for those marked `static`.

    The class is a pytree of JAX, so that its objects can be arguments of `jax.jit`, `jax.grad` and
    `jax.vmap`. Its `__post_init__` may check values; it runs where a user builds an object, not
    where a transformation of JAX rebuilds one. Rules, problems and distributions of tasks are such
    classes.

    >>> @pytree
    ... class Line:
    ...     slope: float
    ...     def __call__(self, x):
    ...         return self.slope * x
    >>> float(jax.grad(lambda line: line(3.0))(Line(2.0)).slope)
    3.0
    """
    cls = dataclasses.dataclass(frozen=True, repr=False)(cls)
    own: Any = cls
    if "__repr__" not in vars(cls):
        own.__repr__ = call_text
    own.__init__ = explain_calls(own.__init__)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    metadata = tuple(f.name for f in fields if f.metadata.get("static"))
    leaves = tuple(f.name for f in fields if f.name not in metadata)

    def flatten(self):
        # Keys give error messages of JAX the names of fields.
        children = [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in leaves]
        return children, tuple(getattr(self, name) for name in metadata)

    def unflatten(values, children):
        # Transformations rebuild objects with any leaves, so no check runs here.
        self = object.__new__(cls)
        for name, value in zip(metadata + leaves, (*values, *children), strict=True):
            object.__setattr__(self, name, value)
        return self

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    return cls


def split_floating(tree) -> tuple[Any, Any]:
    """Return (floating point leaves, all other leaves), Python floats as arrays."""
    # None is no leaf, so that `jax.grad` of either part ignores the other.
    tree = as_float_arrays(tree)
    floats = jax.tree.map(lambda x: x if _is_floating(x) else None, tree)
    return floats, jax.tree.map(lambda x: None if _is_floating(x) else x, tree)


def as_float_arrays(tree):
    """Return the tree with its Python floats as arrays, since those train."""
    return jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, float) else x, tree)


def tree_where(condition, first, second):
    """Return the leaves of the first tree where the condition holds, else those of the second."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), first, second)


def nothing_like(tree):
    """Return the tree with None for its leaves."""
    return jax.tree.map(lambda _: None, tree)


def _is_floating(leaf) -> bool:
    return jnp.issubdtype(getattr(leaf, "dtype", np.dtype(object)), jnp.floating)


def as_pytree(function: Callable):
    """`function` itself if it is a pytree, else a pytree that holds it."""
    return jax.tree_util.Partial(function) if jax.tree_util.all_leaves([function]) else function
