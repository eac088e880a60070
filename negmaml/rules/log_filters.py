"""Filters of a rule with their sizes kept apart, so that no rate, time or eigenvalue overflows.

At rates and times within reason b(x) = (1 - rate x)^K and exp(-time x) leave the range of floating
point as soon as an eigenvalue is large, while what theory makes of them, ratios of filters at
different x, does not. Hence b comes as a sign and a logarithm, and q as a number times exp(scale).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.arrays import frozen, namespace, outer
from negmaml._core.jit import concrete
from negmaml.rules.unroll import each_step


class Filters(NamedTuple):
    """b = sign exp(log_b), q = label exp(scale); all of shape batch_shape + x.shape.

    A scale of None is zero everywhere.
    """

    sign: Any
    log_b: Any
    label: Any
    scale: Any


def log_size(value):
    """log |value|, minus infinity at zero, with the derivative zero there."""
    xp = namespace(value)
    zero = value == 0
    largest = xp.finfo(value.dtype).max
    return xp.where(zero, -xp.inf, xp.log(xp.minimum(xp.abs(xp.where(zero, 1.0, value)), largest)))


def filters_of_values(b, q) -> Filters:
    """From values of both; what is infinite counts as the largest number."""
    xp = namespace(b, q)
    b, q = xp.asarray(b), xp.asarray(q)
    largest = xp.finfo(q.dtype).max
    return Filters(xp.sign(b), log_size(b), xp.clip(q, -largest, largest), None)


def filters_of_updates(rule, x) -> Filters:
    """Of a rule whose update is linear, by running it on x theta^2/2 - y theta for every x at once.

    Known numbers are run in their own precision whatever JAX's default, and come back as NumPy's.
    """
    if not concrete((rule, x)):
        return _of_updates(rule, x)
    single = all(np.result_type(leaf) == np.float32 for leaf in jax.tree.leaves((rule, x)))
    with jax.ensure_compile_time_eval(), jax.enable_x64(not single):
        return jax.tree.map(np.asarray, _of_updates(rule, x))


def _of_updates(rule, x) -> Filters:
    b, log_unit = _on_quadratic(rule, x, start=1.0, label=0.0)
    q, scale = _on_quadratic(rule, x, start=0.0, label=1.0)
    return Filters(jnp.sign(b), log_size(b) + log_unit, q, scale)


def _on_quadratic(rule, x, start: float, label: float):
    """theta after the updates, in units that follow it, and the logarithm of the last unit.

    Parameters, what the state holds of their shape, and the label are scaled together after every
    step, and a linear rule does not notice.
    """
    x = jnp.asarray(x, jnp.result_type(float, x, *jax.tree.leaves(rule)))
    theta = jnp.full(rule.batch_shape + x.shape, start, x.dtype)
    # A schedule keeps its step axis in front, behind it everything has the shape of `theta`.
    wide = jax.tree.map(lambda leaf: outer(leaf, x)[0], rule)

    def scales(leaf):
        return jnp.shape(leaf) == theta.shape and jnp.issubdtype(
            jnp.result_type(leaf), jnp.floating
        )

    def step(own, carry):
        theta, state, label, log_unit = carry
        theta, state = own.update(x * theta - label, state, theta)
        moving = [theta, *(leaf for leaf in jax.tree.leaves(state) if scales(leaf))]
        unit = label
        for leaf in moving:
            unit = jnp.maximum(unit, jnp.abs(leaf))
        unit = frozen(jnp.where(unit > 0, unit, 1.0))
        state = jax.tree.map(lambda leaf: leaf / unit if scales(leaf) else leaf, state)
        return theta / unit, state, label / unit, log_unit + jnp.log(unit)

    first = theta, wide.init(theta), jnp.full_like(theta, label), jnp.zeros_like(theta)
    theta, _, _, log_unit = each_step(wide, step, first, unrolled=concrete((rule, x)))
    return theta, log_unit
