"""Arithmetic of what comes as logarithms, too large and too small for numbers; and roots of it."""

from collections.abc import Callable

import numpy as np
from jax import lax

from negmaml._core.arrays import namespace

STEPS = 150  # at most, of a search for a root


def mean_over(weights, values):
    """int mu f of values on the nodes; under JAX a sum, which XLA fuses with what it sums."""
    if namespace(values) is np and weights.ndim == 1:
        return values @ weights
    return (weights * values).sum(-1)


def shares(log_b, log_kappa):
    """(kappa/(B + kappa), B/(B + kappa)) on the nodes, both to full relative precision.

    Ratios of B to kappa beyond `largest_log_ratio` are all the same, so that products of shares do
    not vanish.
    """
    xp = namespace(log_b, log_kappa)
    z = 2 * log_b - log_kappa[..., None]
    most = largest_log_ratio(z)
    small = xp.where(xp.isfinite(z), xp.exp(-xp.abs(xp.clip(z, -3 * most, most))), 0.0)
    larger = 1 / (1 + small)
    smaller = small * larger
    fitted = z > 0
    return xp.where(fitted, smaller, larger), xp.where(fitted, larger, smaller)


def largest_log_ratio(x) -> float:
    """Of B to kappa: so large that the cube of the smaller share is still a number."""
    return 0.97 * largest_exponent(x) / 3


def log_at_least_tiny(x):
    """log x, of zero that of the smallest number."""
    xp = namespace(x)
    return xp.log(xp.maximum(x, xp.finfo(x.dtype).tiny))


def largest_exponent(x) -> float:
    """What the exponential still has as a number, in the precision of x."""
    return float(np.log(np.finfo(x.dtype).max)) - 1


def squared_unit(value, log_unit):
    """value exp(2 log_unit), infinite where it is too large for a number, zero where value is."""
    xp = namespace(value, log_unit)
    most = largest_exponent(log_unit)
    unit = xp.exp(xp.clip(log_unit, -most, most))
    return value * unit * unit


def find_root(residual: Callable, low, high, guess, tolerance: float = 1.0):
    """Newton's method on an increasing function, kept in a bracket by bisection.

    `residual` returns value and slope. A step to the precision of the number ends it, or to
    `tolerance` powers of that: the next would be to twice as many digits. Returns NaN where the
    last of `STEPS` steps was not to half the digits.
    """
    xp = namespace(guess)
    epsilon = float(xp.finfo(guess.dtype).eps)

    def far(state, power):
        *_, y, step = state
        return xp.abs(step) > 8 * xp.maximum(epsilon**power, epsilon * xp.abs(y))

    def unfinished(state):
        return (state[0] < STEPS) & xp.any(far(state, tolerance))

    def advance(state):
        count, low, high, y, _ = state
        value, slope = residual(y)
        low, high = xp.where(value < 0, y, low), xp.where(value < 0, high, y)
        newton = y - value / slope
        inside = (newton >= low) & (newton <= high)  # at the root it may stay where it is
        following = xp.where(inside, newton, (low + high) / 2)
        return count + 1, low, high, following, following - y

    margin = 1e-3  # rounding must not put the root outside
    low, high, guess = xp.broadcast_arrays(low - margin, high + margin, guess)
    state = (0, low, high, xp.clip(guess, low, high), xp.full_like(guess, xp.inf))
    if xp is np:
        while unfinished(state):
            state = advance(state)
    else:
        state = lax.while_loop(unfinished, advance, state)
    # Steps as small as the rounding of `residual` need not end, and are no failure.
    return xp.where(far(state, min(tolerance, 0.5)), xp.nan, state[3])
