"""Best training parameters over a grid of problems, in the limit of large sizes."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from negmaml._core.checks import check_array, check_broadcast
from negmaml._core.compilation import quick_jit
from negmaml._core.numerics import cast, namespace
from negmaml._core.types import Array, ArrayLike, Float
from negmaml.rules import GradientDescent, Rule, check_scalar_rule
from negmaml.theory.proportional import limit
from negmaml.theory.saddle import training_set
from negmaml.theory.search import minimise, parameter_grid
from negmaml.theory.setting import SCALARS, Setting, check_spectral
from negmaml.theory.spectrum import marchenko_pastur

MAP_POINTS, MAP_ROUNDS, MAP_INTERVALS = 8, 3, 24  # in float32


class Phase(NamedTuple):
    """best: the parameter with the lowest distance. distance: there. at_zero: with parameter 0."""

    best: Float[Array, "..."]
    distance: Float[Array, "..."]
    at_zero: Float[Array, "..."]


def phase_diagram(
    p: ArrayLike,
    m: ArrayLike,
    n_t: ArrayLike,
    n_v: ArrayLike,
    sigma: ArrayLike,
    nu: ArrayLike,
    train: Rule | None = None,
    *,
    offset: ArrayLike = 0.0,
    meta_ridge: ArrayLike = 0.0,
) -> Phase:
    """Best training parameters over a grid of problems, in the limit of large sizes.

    Arguments:
        p, m, n_t, n_v: sizes, here real numbers: only their ratios and m count in the limit.
        sigma, nu: as in the problem. All of these, offset and meta_ridge broadcast against each
            other, and the result has their common shape.
        train: a rule of the family wanted, one gradient step when left out.
        offset: |omega_0 - w0|^2.
        meta_ridge: as in `theory.test_loss`.

    The parameter is good to about 2%. One program for all cells: a map of 200 x 200 takes seconds.
    Raises TypeError or ValueError for sizes that are not above 0, amounts that are not at least 0,
    shapes that do not broadcast, and a rule that is not scalar.
    """
    train = check_scalar_rule("train", GradientDescent(0.0) if train is None else train)
    check_spectral("train", train)
    given = dict(zip(SCALARS, (p, m, n_t, n_v, sigma, nu, offset, meta_ridge), strict=True))
    cells = {
        name: check_array(name, value, "of a cell", 0, strict=i < 4)
        for i, (name, value) in enumerate(given.items())
    }
    shape = check_broadcast({name: np.shape(value) for name, value in cells.items()})
    ridged = bool(np.any(np.asarray(cells["meta_ridge"]) != 0))
    xp = namespace(cells)
    flat = {
        name: xp.broadcast_to(xp.asarray(value, np.float32), shape).ravel()
        for name, value in cells.items()
    }
    settings = Setting(**flat, ridged=ridged)
    found = _phases(settings, cast(train, jnp.float32))
    return jax.tree.map(lambda x: x.reshape(shape), found)


@quick_jit
def _phases(settings: Setting, train: Rule) -> Phase:
    def one(cell: Setting):
        p, n_t = cell.p, cell.n_t
        coarse = marchenko_pastur(n_t, p, p.dtype, MAP_INTERVALS)
        setting = dataclasses.replace(cell, quadrature=coarse)

        def at(values):
            return limit(training_set(setting, train.with_tuned(values)), setting.ridged)

        best = minimise(at, parameter_grid(train, n_t, p, MAP_POINTS), MAP_ROUNDS)
        return Phase(best, *at(jnp.stack([best, jnp.zeros_like(best)])))

    return lax.map(one, settings, batch_size=64)
