"""How optima are found: a signed grid, closing in on its lowest point, and its derivatives.

The test loss can have two minima in the training rate, so a search looks at a grid that covers
every scale of the spectrum in both signs, and then closes in on the lowest point. What is searched
is said in `negmaml.theory.optima`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from negmaml.rules import Rule

POINTS = 18  # of each sign
ROUNDS = 6  # each spans the two intervals around the lowest point with as many points as the last


def parameter_grid(rule: Rule, n, p, points: int = POINTS):
    """A signed grid of the tuned parameter of `rule` on the spectrum of S, increasing."""
    return signed_grid(rule, (1 + jnp.sqrt(p / n)) ** 2, points)


def signed_grid(rule: Rule, largest, points: int = POINTS):
    """A signed grid of the tuned parameter of `rule` for spectra up to `largest`, increasing."""
    smallest, largest = rule.search_range(largest)
    steps = jnp.linspace(0, 1, points, dtype=smallest.dtype)
    positive = smallest * (largest / smallest) ** steps
    return jnp.concatenate([-positive[::-1], jnp.zeros(1, smallest.dtype), positive])


def minimise(function: Callable, grid, rounds: int = ROUNDS):
    """The lowest minimum of a function of a scalar, among those that `grid` tells apart.

    `function` maps an array of points to values of the same shape; values that are not finite
    count as infinite. Good to about the square root of the precision.
    """
    steps = jnp.asarray(np.linspace(0, 1, grid.size), grid.dtype)

    def close_in(_, state):
        points, _ = state
        values = function(points)
        i = jnp.argmin(jnp.where(jnp.isfinite(values), values, jnp.inf))
        low, high = points[jnp.maximum(i - 1, 0)], points[jnp.minimum(i + 1, grid.size - 1)]
        return low + (high - low) * steps, points[i]

    return lax.fori_loop(0, rounds, close_in, (grid, grid[0]))[1]


def stationary(function: Callable, found):
    """`found`, a minimum of a function, with the derivatives of the stationarity condition."""
    return lax.custom_root(
        jax.grad(function),
        lax.stop_gradient(found),
        lambda _, x: x,
        lambda linear, y: y / linear(jnp.ones_like(y)),
    )
