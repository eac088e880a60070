"""Optima by the proportional theory: global searches over a rule's parameter and the meta-ridge.

The test loss can have two minima in the training rate, so a search looks at a signed grid that
covers every scale of the spectrum, and then closes in on the lowest point. Adaptation multiplies
the distance of the trained weights by a positive number, so what is best in training does not
depend on the rule at test time, and the joint optimum is the one after the other.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from negmaml.compilation import quick_jit
from negmaml.rules import GradientDescent, GradientFlow, Rule, cast
from negmaml.theory.predict import means
from negmaml.theory.spectrum import marchenko_pastur

POINTS = 18  # of each sign
ROUNDS = 6  # each spans the two intervals around the lowest point with as many points as the last

MAP_POINTS, MAP_ROUNDS, MAP_INTERVALS = 8, 3, 24  # of a phase diagram, in float32


def parameter_grid(rule: Rule, n, p, points: int = POINTS):
    """A signed grid of parameters for the family of `rule` on the spectrum of S, increasing.

    Rates and times are measured in units of 1/largest eigenvalue, strengths in units of it.
    """
    largest = (1 + jnp.sqrt(p / n)) ** 2
    if isinstance(rule, GradientFlow):
        ends, unit = (1e-2, 30.0), 1 / largest  # exp(30) and beyond are all the same
    elif isinstance(rule, GradientDescent):
        ends, unit = (1e-2, 1e4), 1 / largest
    else:
        ends, unit = (1e-3, 1e3), largest
    positive = np.geomspace(*ends, points)
    return jnp.asarray(np.concatenate([-positive[::-1], [0.0], positive]), unit.dtype) * unit


def with_parameter(rule: Rule, value) -> Rule:
    """The rule of the same family (and number of steps) with another parameter."""
    return jax.tree.map(lambda _: value, rule)


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


class Phase(NamedTuple):
    """best: the parameter with the lowest distance. distance: there. at_zero: with parameter 0."""

    best: jax.Array
    distance: jax.Array
    at_zero: jax.Array


def phase_diagram(
    p, m, n_t, n_v, sigma, nu, offset=0.0, meta_ridge=0.0, train: Rule | None = None
) -> Phase:
    """Best training parameters over a grid of problems, in the limit of large sizes.

    Arguments:
        p, m, n_t, n_v: sizes, here real numbers: only their ratios and m count in the limit.
        sigma, nu, offset, meta_ridge: as in the problem, offset |omega_0 - w0|^2. All of these
            broadcast against each other, and the result has their common shape.
        train: a rule of the family wanted, one gradient step when left out.

    The parameter is good to about 2%. One program for all cells: a map of 200 x 200 takes seconds.
    """
    train = GradientDescent(0.0) if train is None else train
    arguments = jnp.broadcast_arrays(p, m, n_t, n_v, sigma, nu, offset, meta_ridge)
    shape = arguments[0].shape
    ridged = bool(np.any(np.asarray(meta_ridge) != 0))
    cells = tuple(jnp.ravel(x).astype(jnp.float32) for x in arguments)
    return jax.tree.map(
        lambda x: x.reshape(shape), _phases(cells, cast(train, jnp.float32), ridged)
    )


@partial(quick_jit, static_argnames="ridged")
def _phases(cells, train: Rule, ridged: bool) -> Phase:
    def one(cell):
        p, m, n_t, n_v, *numbers = cell
        measure = marchenko_pastur(n_t, p, p.dtype, MAP_INTERVALS)

        def limit(value):
            rule = with_parameter(train, value)
            return means((p, m, n_t, n_v), numbers, measure, ridged, rule).limit

        best = minimise(jax.vmap(limit), parameter_grid(train, n_t, p, MAP_POINTS), MAP_ROUNDS)
        return Phase(best, *jax.vmap(limit)(jnp.stack([best, jnp.zeros_like(best)])))

    return lax.map(one, cells, batch_size=64)
