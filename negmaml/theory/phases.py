"""Best training parameters over a grid of problems, in the limit of large sizes."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from negmaml._core.compilation import quick_jit
from negmaml._core.numerics import cast
from negmaml._core.types import Array, ArrayLike, Float
from negmaml.rules import GradientDescent, Rule
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
    """
    train = GradientDescent(0.0) if train is None else train
    check_spectral("train", train)
    cells = jnp.broadcast_arrays(p, m, n_t, n_v, sigma, nu, offset, meta_ridge)
    shape, ridged = cells[0].shape, bool(np.any(np.asarray(meta_ridge) != 0))
    flat = [jnp.ravel(x).astype(jnp.float32) for x in cells]
    settings = Setting(**dict(zip(SCALARS, flat, strict=True)), ridged=ridged)
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
