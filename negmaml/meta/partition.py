"""Pytrees of parameters taken apart and put together, and checks of them.

A tree is partitioned twice. First into floating point leaves, which train, and static leaves such
as integers, strings and functions of a module. Then the floating point leaves into those that adapt
to a task and those that a mask freezes. Both parts have the structure of the whole, with None for
the leaves of the other part, as in Equinox.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from negmaml._core.checks import check_callable, short_repr
from negmaml._core.display import tree_text
from negmaml._core.pytree import split_floating
from negmaml.meta.shape_errors import WithShapeErrors
from negmaml.rules import InnerRule, as_rule

Loss = Callable[..., Any]  # of (params, data), or of (params, state, data)


def partition_floating(params) -> tuple[Any, Any]:
    """Return (floating point leaves, static leaves), Python floats as arrays.

    Raises TypeError where a leaf is complex or no leaf is floating point.
    """
    floats, static = split_floating(params)
    # A complex parameter would silently not train, like an integer.
    for path, leaf in jax.tree_util.tree_leaves_with_path(static):
        if isinstance(leaf, complex) or jnp.issubdtype(_dtype(leaf), jnp.complexfloating):
            raise TypeError(
                f"params must be real, got a complex number at params{jax.tree_util.keystr(path)}; "
                "hold its real and imaginary part"
            )
    if not jax.tree.leaves(floats):
        raise TypeError(
            f"params must hold floating point arrays, got {tree_text(params)}; integers are not "
            "trained: write 0.0 for 0, or convert with jnp.asarray(x, float)"
        )
    return floats, static


def partition(tree, mask):
    """Return (leaves that adapt, frozen leaves) by a mask like the tree or a prefix of it.

    A mask may also be a function of the path of a leaf, as a tuple of names, and of the leaf.
    """
    if mask is None:
        return tree, jax.tree.map(lambda _: None, tree)
    if _is_filter(mask):
        mask = jax.tree_util.tree_map_with_path(lambda path, x: bool(mask(names_of(path), x)), tree)
    # A flag of a prefix applies to all leaves below it.
    try:
        flags = jax.tree.map(lambda flag, part: jax.tree.map(lambda _: flag, part), mask, tree)
    except ValueError as mismatch:
        raise ValueError(
            f"mask must be a pytree of booleans like the parameters or a prefix of them "
            f"({tree_text(tree)}), got {short_repr(mask)}; or a function (path, leaf) -> bool, "
            "such as nnx.PathContains('head')"
        ) from mismatch
    freeze_mask("mask", mask)
    moving = jax.tree.map(lambda flag, leaf: leaf if flag else None, flags, tree)
    frozen = jax.tree.map(lambda flag, leaf: None if flag else leaf, flags, tree)
    return moving, frozen


def combine(first, second):
    """Return the tree whose two parts these are: the leaves of the first where it has one."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, first, second, is_leaf=lambda leaf: leaf is None
    )


def _is_filter(mask) -> bool:
    """True for a function; a module of booleans, as of Equinox, is a mask though it has a call."""
    is_node = not jax.tree_util.treedef_is_leaf(jax.tree.structure(mask))
    return callable(mask) and (isinstance(mask, jax.tree_util.Partial) or not is_node)


def freeze_mask(name: str, mask) -> Any:
    """Return a mask as (structure, flags), which can be hashed; raise unless some flag is True.

    A function is returned as it is.
    """
    if _is_filter(mask):
        return mask
    flags, structure = jax.tree.flatten(mask)
    if not flags or not all(isinstance(flag, bool | np.bool_) for flag in flags):
        raise ValueError(
            f"{name} must hold booleans, got {short_repr(mask)}; use True for leaves that adapt, "
            "False for others, in a pytree like params or a prefix of it"
        )
    # Without a leaf that adapts, all inner gradients would be empty.
    if not any(flags):
        raise ValueError(
            f"{name} must have a leaf that adapts, got {short_repr(mask)}; for no adaptation use a "
            "rate of zero"
        )
    return structure, tuple(map(bool, flags))


def thaw_mask(frozen) -> Any:
    """Return the mask that `freeze_mask` made hashable; None if there was no mask."""
    return frozen if frozen is None or callable(frozen) else frozen[0].unflatten(frozen[1])


def names_of(path) -> tuple:
    """Return the path of a leaf as keys, indices and names of attributes."""
    return tuple(
        getattr(entry, "key", getattr(entry, "idx", getattr(entry, "name", entry)))
        for entry in path
    )


@jax.tree_util.register_pytree_node_class
class StaticTree:
    """A tree of leaves that do not train, as an argument of a compiled program.

    Its arrays are traced. All other leaves, such as functions, strings and integers of a module,
    are part of the structure, so they must be hashable; a TypeError names a leaf that is not.
    """

    def __init__(self, tree):
        self.tree = tree
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if not _is_array(leaf) and type(leaf).__hash__ is None:
                raise TypeError(
                    f"params{jax.tree_util.keystr(path)} is neither an array nor hashable, got "
                    f"{type(leaf).__name__}; keep it out of the parameters and close over it"
                )

    def combined(self, floats):
        """Return the tree of these leaves and the floating point leaves."""
        # Most models have no static leaves, and then the tree is not rebuilt.
        return combine(floats, self.tree) if jax.tree.leaves(self.tree) else floats

    def tree_flatten(self):
        """Return the arrays, and all other leaves with the structure."""
        leaves, treedef = jax.tree.flatten(self.tree)
        arrays = [leaf for leaf in leaves if _is_array(leaf)]
        return arrays, (treedef, tuple(None if _is_array(leaf) else leaf for leaf in leaves))

    @classmethod
    def tree_unflatten(cls, structure, arrays):
        """Return the tree again, without the check: JAX may put any object in place of arrays."""
        treedef, others = structure
        # None in `others` marks the place of an array.
        remaining = iter(arrays)
        self = object.__new__(cls)
        self.tree = treedef.unflatten([next(remaining) if o is None else o for o in others])
        return self


def check_inputs(rule, params) -> tuple[InnerRule, Any]:
    """Return the rule and the parameters as arrays; raise unless they fit each other."""
    rule, params = as_rule("rule", rule), check_params(params)
    rule.check(params)
    return rule, params


def check_params(params):
    """Return `params` with arrays for leaves; raise TypeError unless all are floating point."""
    params = jax.tree.map(jnp.asarray, params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"params must be floating point arrays, got {leaf.dtype} at "
                f"params{jax.tree_util.keystr(path)}; convert it, or close over it in the loss"
            )
    return params


def check_loss(name: str, loss, form: str = "(params, data)") -> Any:
    """Return the loss, which from now on names the leaf of `params` that does not fit it."""
    # `fit` and `evaluate` may pass on a loss that was checked before.
    if isinstance(loss, WithShapeErrors):
        return loss
    # An algorithm takes (params, tasks) and would fail on the data of one task, far from the cause.
    if isinstance(loss, Partial) and isinstance(loss.func, tuple) and hasattr(loss.func, "loss"):
        raise TypeError(
            f"{name} must be the loss of one task, a function of {form}, got a meta-algorithm; "
            "pass the loss that it was built from"
        )
    return WithShapeErrors(check_callable(name, loss, f"of {form}"), "the loss")


def check_scalar(result, has_aux: bool, name: str = "loss"):
    """Return (value, aux) of a loss or metric; aux is None when it has none.

    Raises ValueError unless the value is one real number.
    """
    value, aux = result if has_aux else (result, None)
    types = jax.tree.map(jax.typeof, value)
    # A pair (value, aux) has two leaves; it needs has_aux=True.
    one_leaf = jax.tree_util.all_leaves([value])
    if not (one_leaf and types.shape == () and jnp.issubdtype(types.dtype, jnp.floating)):
        data = "all tasks" if name == "objective" else "the data of one task"
        aux = "set has_aux=True if it returns (value, aux)" if name == "loss" else "return no aux"
        raise ValueError(
            f"{name} must return one real number for {data}, got {types}; average over points with "
            f"jnp.mean, and {aux}"
        )
    return value, aux


def _dtype(leaf):
    return getattr(leaf, "dtype", np.dtype(object))


def _is_array(leaf) -> bool:
    return hasattr(leaf, "dtype") and hasattr(leaf, "shape")
