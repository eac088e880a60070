"""Arithmetic on logarithms of numbers that may overflow or underflow, and a root finder for it."""

from collections.abc import Callable

import numpy as np
from jax import lax

from negmaml._core.arrays import namespace

MAX_STEPS = 150  # of a search for a root


def mean_over(weights, values):
    """Return int mu f for values of f on the nodes of mu.

    The sum of products under JAX is written out because XLA fuses it with the computation of f.
    """
    if namespace(values) is np and weights.ndim == 1:
        return values @ weights
    return (weights * values).sum(-1)


def resolvent_fractions(log_b, log_kappa):
    """Return (kappa/(B + kappa), B/(B + kappa)) on the nodes, both to full relative precision.

    Ratios of B to kappa beyond `largest_log_ratio` are clipped, so that products of three fractions
    do not underflow.
    """
    xp = namespace(log_b, log_kappa)
    z = 2 * log_b - log_kappa[..., None]
    most = largest_log_ratio(z)
    # Only exp of a negative number is taken: it cannot overflow, and both fractions follow from it.
    small = xp.where(xp.isfinite(z), xp.exp(-xp.abs(xp.clip(z, -3 * most, most))), 0.0)
    larger = 1 / (1 + small)
    smaller = small * larger
    fitted = z > 0
    return xp.where(fitted, smaller, larger), xp.where(fitted, larger, smaller)


def largest_log_ratio(x) -> float:
    """Return the largest log(B/kappa) for which (kappa/(B + kappa))^3 is a normal number."""
    return 0.97 * largest_exponent(x) / 3


def log_at_least_tiny(x):
    """Return log x, and for zero the logarithm of the smallest normal number."""
    xp = namespace(x)
    return xp.log(xp.maximum(x, xp.finfo(x.dtype).tiny))


def largest_exponent(x) -> float:
    """Return the largest number whose exponential is finite in the precision of x."""
    return float(np.log(np.finfo(x.dtype).max)) - 1


def times_exp_2log(value, log_unit):
    """Return value exp(2 log_unit): infinite on overflow, and zero where `value` is zero."""
    xp = namespace(value, log_unit)
    most = largest_exponent(log_unit)
    unit = xp.exp(xp.clip(log_unit, -most, most))
    return value * unit * unit  # one factor after the other: exp(2 log_unit) may overflow by itself


def find_root(residual: Callable, low, high, guess, tolerance: float = 1.0):
    """Find the root of an increasing function by Newton's method, kept in a bracket by bisection.

    residual: a function that returns value and slope.
    tolerance: the search ends with a step below epsilon**tolerance. Newton's next step would double
        the number of correct digits, so 0.5 is enough for full precision.

    Returns NaN where the last of `MAX_STEPS` steps was above the root of epsilon.
    """
    xp = namespace(guess)
    epsilon = float(xp.finfo(guess.dtype).eps)

    def far(state, power):
        *_, y, step = state
        return xp.abs(step) > 8 * xp.maximum(epsilon**power, epsilon * xp.abs(y))

    def unfinished(state):
        return (state[0] < MAX_STEPS) & xp.any(far(state, tolerance))

    def advance(state):
        count, low, high, y, _ = state
        value, slope = residual(y)
        low, high = xp.where(value < 0, y, low), xp.where(value < 0, high, y)
        newton = y - value / slope
        inside = (newton >= low) & (newton <= high)  # at the root Newton's step may be zero
        following = xp.where(inside, newton, (low + high) / 2)
        return count + 1, low, high, following, following - y

    margin = 1e-3  # the root must stay inside the bracket in spite of rounding
    low, high, guess = xp.broadcast_arrays(low - margin, high + margin, guess)
    state = (0, low, high, xp.clip(guess, low, high), xp.full_like(guess, xp.inf))
    if xp is np:
        while unfinished(state):
            state = advance(state)
    else:
        state = lax.while_loop(unfinished, advance, state)
    # Steps as small as the rounding error of `residual` need not end, and are no failure.
    return xp.where(far(state, min(tolerance, 0.5)), xp.nan, state[3])
