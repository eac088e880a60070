"""Parameters taken apart: what trains, what adapts, what is only carried; and checks of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.checks import check_callable, short_repr
from negmaml._core.display import tree_text
from negmaml.meta.shape_errors import Explained
from negmaml.rules import InnerRule, as_rule

Loss = Callable[..., Any]  # of (params, data), or of (params, state, data)


def trainable(params) -> tuple[Any, Any]:
    """(floating point leaves, the rest): two trees like `params`, None for the other's leaves."""
    params = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, float) else x, params)
    floats = jax.tree.map(lambda x: x if _is_floating(x) else None, params)
    rest = jax.tree.map(lambda x: None if _is_floating(x) else x, params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(rest):
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
    return floats, rest


def holding(loss: Loss, rest) -> Loss:
    """The loss of the floating point leaves alone; itself where there are no others."""
    if not jax.tree.leaves(rest):
        return loss
    return lambda floats, data: loss(merge(floats, rest), data)


def _dtype(leaf):
    return getattr(leaf, "dtype", np.dtype(object))


def _is_floating(leaf) -> bool:
    return jnp.issubdtype(_dtype(leaf), jnp.floating)


def ready(rule, params) -> tuple[InnerRule, Any]:
    """The rule and the parameters, checked, and found to fit each other."""
    rule, params = as_rule("rule", rule), check_params(params)
    rule.check(params)
    return rule, params


def check_loss(name: str, loss, form: str = "(params, data)") -> Any:
    """The loss, made to say which leaf of params does not fit it; raises for no function."""
    if isinstance(loss, Explained):
        return loss
    return Explained(check_callable(name, loss, f"of {form}"), "the loss")


def hashable(name: str, mask) -> tuple[Any, tuple]:
    """A mask in a form that jit can compare: structure and flags; raises unless some are True."""
    flags, structure = jax.tree.flatten(mask)
    if not flags or not all(isinstance(flag, bool | np.bool_) for flag in flags):
        raise ValueError(
            f"{name} must hold booleans, got {short_repr(mask)}; use True for leaves that adapt, "
            "False for others, in a pytree like params or a prefix of it"
        )
    if not any(flags):
        raise ValueError(
            f"{name} must have a leaf that adapts, got {short_repr(mask)}; for no adaptation use a "
            "rate of zero"
        )
    return structure, tuple(map(bool, flags))


def split(tree, mask):
    """(what moves, what is frozen): two trees like `tree` with None for the other's leaves."""
    if mask is None:
        return tree, jax.tree.map(lambda _: None, tree)
    try:
        flags = jax.tree.map(lambda flag, part: jax.tree.map(lambda _: flag, part), mask, tree)
    except ValueError as mismatch:
        raise ValueError(
            f"mask must be a pytree of booleans like the parameters or a prefix of them "
            f"({jax.tree.structure(tree)}), got {mask!r}"
        ) from mismatch
    hashable("mask", mask)
    moving = jax.tree.map(lambda flag, leaf: leaf if flag else None, flags, tree)
    frozen = jax.tree.map(lambda flag, leaf: None if flag else leaf, flags, tree)
    return moving, frozen


def merge(moving, frozen):
    """The tree that `split` took apart."""
    return jax.tree.map(
        lambda m, f: f if m is None else m, moving, frozen, is_leaf=lambda leaf: leaf is None
    )


def check_params(params):
    """`params` with arrays for leaves; TypeError unless all are floating point."""
    params = jax.tree.map(jnp.asarray, params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"params must be floating point arrays, got {leaf.dtype} at "
                f"params{jax.tree_util.keystr(path)}; convert it, or close over it in the loss"
            )
    return params


def scalar(loss: Loss, has_aux: bool = False) -> Callable:
    """`loss` without its auxiliary output, and with a clear error where it is not a scalar."""

    def checked(params, data):
        return check_scalar(loss(params, data), has_aux)[0]

    return checked


def check_scalar(result, has_aux: bool, name: str = "loss"):
    """(value, aux) of a loss or metric; aux is None when it has none."""
    value, aux = result if has_aux else (result, None)
    types = jax.tree.map(jax.typeof, value)
    alone = jax.tree_util.all_leaves([value])
    if not (alone and types.shape == () and jnp.issubdtype(types.dtype, jnp.floating)):
        raise ValueError(
            f"{name} must return one real number for the data of one task, got "
            f"{types}; average over points with jnp.mean, and set "
            "has_aux=True if it returns (value, aux)"
        )
    return value, aux
