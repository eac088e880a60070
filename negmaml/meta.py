"""Adaptation and the meta-objective for any JAX loss and parameter pytree.

These know no problem: `loss(params, data)` is any scalar function of the user's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from negmaml.rules import GradientDescent, Rule

Loss = Callable[[Any, Any], jax.Array]


class Tasks(NamedTuple):
    """A batch of tasks: pytrees whose leaves lead with the task axis."""

    support: Any
    query: Any


def adapt(loss: Loss, params, support, rule: Rule):
    r"""Parameters after adapting to the data of one task.

        theta_0 = params,      theta_{k+1} = theta_k - rate * grad loss(theta_k, support)

    Arguments:
        loss: scalar function of (params, data).
        params: any pytree of floating point arrays.
        support: the task's data, what `loss` takes.
        rule: `GradientDescent`; its rate a scalar or a pytree like `params`, of any sign.

    Returns a pytree like `params`. Differentiable, so that jax.grad through it is the
    meta-gradient; vmap it for many tasks. Raises TypeError for another rule, ValueError for a
    rate whose structure is not that of `params`.

    >>> square = lambda w, target: (w - target) ** 2 / 2
    >>> float(adapt(square, 0.0, 1.0, GradientDescent(-0.5)))  # away from the target
    -0.5
    """
    if not isinstance(rule, GradientDescent):
        raise TypeError(
            f"rule must be GradientDescent for a general loss, got {type(rule).__name__}, which "
            "acts through the spectrum of a linear model; use it with simulate and theory"
        )
    rates = _per_leaf(rule.rate, params)
    gradient = jax.grad(loss)

    def step(theta, _):
        moves = jax.tree.map(jnp.multiply, rates, gradient(theta, support))
        return jax.tree.map(lambda t, move: (t - move).astype(t.dtype), theta, moves), None

    params = jax.tree.map(jnp.asarray, params)
    if rule.steps == 1:
        return step(params, None)[0]
    return lax.scan(step, params, length=rule.steps)[0]


def maml(loss: Loss, rule: Rule) -> Callable[[Any, Tasks], jax.Array]:
    r"""The objective of model-agnostic meta-learning; jax.grad of it is the meta-gradient.

        L_meta(params) = mean_i loss(adapt(params; support_i), query_i)

    Returns a function of (params, tasks) -> scalar. Source: Finn, Abbeel and Levine, ICML 2017.
    """

    def objective(params, tasks: Tasks):
        def one_task(support, query):
            return loss(adapt(loss, params, support, rule), query)

        return jnp.mean(jax.vmap(one_task)(tasks.support, tasks.query))

    return objective


def _per_leaf(rate, params):
    """One rate for each leaf of `params`."""
    structure: Any = jax.tree.structure(params)
    if jax.tree_util.all_leaves([rate]) and jnp.ndim(rate) == 0:
        rate = jax.tree.map(lambda _: rate, params)
    leaves = zip(jax.tree.leaves(rate), jax.tree.leaves(params), strict=False)
    if structure != jax.tree.structure(rate) or not all(_stretches(*pair) for pair in leaves):
        raise ValueError(
            "rate must be a scalar or a pytree like the parameters, with leaves that broadcast to "
            f"theirs ({structure}), got {rate!r}"
        )
    return rate


def _stretches(rate, leaf) -> bool:
    """Whether `rate` broadcasts to the shape of `leaf` without changing it."""
    shape, target = jnp.shape(rate), jnp.shape(leaf)
    kept = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(r in (1, t) for r, t in kept)
