r"""Adapting a pytree of parameters to the data of one task, and the checks around it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from negmaml.rules import Rule, as_rule

Loss = Callable[[Any, Any], Any]


def adapt(loss: Loss, params, support, rule: Rule, *, mask=None, remat: bool = False):
    r"""Parameters after adapting to the data of one task.

        theta_0 = params,      theta_{k+1} = theta_k - rate * grad loss(theta_k, support)

    Arguments:
        loss: scalar function of (params, data).
        params: any pytree of floating point arrays.
        support: the task's data, what `loss` takes.
        rule: any rule that moves a general model (`negmaml.rules`), of any sign:
            `GradientDescent`, whose rate is a number or a pytree like `params` or a prefix of it,
            with a `Schedule` for values by step; `Momentum`; `Preconditioned`; `InnerOptimizer`, or
            an optax transformation for one step of it; `Proximal`, the point where
            grad loss(theta, support) + strength (theta - params) = 0, found by Newton's method;
            or your own.
        mask: which leaves adapt, a pytree of booleans like `params` or a prefix of it; all when
            left out.
        remat: whether reverse-mode derivatives recompute each step instead of storing it.

    Returns a pytree like `params`. Differentiable, so that jax.grad through it is the
    meta-gradient; vmap it for many tasks. Raises TypeError for what is no such rule and parameters
    that are not floating point, ValueError for a rate or mask unlike `params` and for a loss that
    is not scalar.

    >>> import negmaml as nm
    >>> square = lambda w, target: (w - target) ** 2 / 2
    >>> float(adapt(square, 0.0, 1.0, nm.GradientDescent(-0.5)))  # away from the target
    -0.5
    """
    rule, params = ready(rule, params)
    moving, frozen = split(params, mask)
    objective = scalar(loss)

    def task_loss(theta):
        return objective(merge(theta, frozen), support)

    return merge(rule.solve(task_loss, moving, remat=remat), frozen)


def ready(rule, params) -> tuple[Rule, Any]:
    """The rule and the parameters, checked, and found to fit each other."""
    rule, params = as_rule("rule", rule), check_params(params)
    rule.check(params)
    return rule, params


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
    if not all(isinstance(flag, bool) for flag in jax.tree.leaves(flags)):
        raise ValueError(f"mask must hold booleans, got {mask!r}; use True for leaves that adapt")
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


def check_scalar(result, has_aux: bool):
    """(value, aux) of a loss; aux is None when it has none."""
    value, aux = result if has_aux else (result, None)
    types = jax.tree.map(jax.typeof, value)
    alone = jax.tree_util.all_leaves([value])
    if not (alone and types.shape == () and jnp.issubdtype(types.dtype, jnp.floating)):
        raise ValueError(
            f"loss must return one real number for the data of one task, got "
            f"{types}; average over points with jnp.mean, and set "
            "has_aux=True if it returns (value, aux)"
        )
    return value, aux
