"""Best training parameters over a grid of problems, in the limit of large sizes."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from negmaml._core.compilation import quick_jit
from negmaml._core.numerics import cast
from negmaml.rules import GradientDescent, Rule
from negmaml.theory.predict import means
from negmaml.theory.search import minimise, parameter_grid, with_parameter
from negmaml.theory.spectrum import marchenko_pastur

MAP_POINTS, MAP_ROUNDS, MAP_INTERVALS = 8, 3, 24  # in float32


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
