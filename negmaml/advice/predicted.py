"""The structured theory beside the data: the same losses from moments, and at sizes not tried."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from negmaml.advice.moments import RandomCoefficients, random_coefficients
from negmaml.problem import MixedLinearRegression
from negmaml.rules import GradientDescent
from negmaml.theory import test_loss

CLOSE = 0.03  # relative gap of theory and measurement that is called agreement


class Theory(NamedTuple):
    """What the theory says of the groups of an `Advice`.

    moments: w0, Omega and sigma^2 of `random_coefficients`, from all rows of all groups.
    problem: the mixed linear regression with these moments and the second moments of the features;
        `theory.best_allocation(budget, problem)` says how to spend rows on groups and within them.
    adapt, loss: (R,), the best adaptation rate, raw, and the loss there, at the advice's ridge.
    gap: (R,), loss over the measured one, less 1.
    agrees: whether, at the best rates, it is within two standard errors or 3% of the measured loss.
    gains: {change: how much lower the loss is at its own best rates, relative}.
    """

    moments: RandomCoefficients
    problem: Any
    adapt: np.ndarray
    loss: np.ndarray
    gap: np.ndarray
    agrees: bool
    gains: dict[str, float]


def theory_of(advice) -> Theory:
    """Moments, prediction, and extrapolation at the ridge that was found best.

    The theory takes features as random with these second moments and shrinks every coefficient; the
    intercept is a constant and is not shrunk, which is nearly the same when it starts at its mean.

    Raises ValueError for several targets.
    """
    data, sizes = advice.data, advice.sizes
    if data.y.shape[1] > 1:
        raise ValueError(f"theory is for one target, got {data.y.shape[1]}; advise on each alone")
    gram = np.stack([rows.T @ rows for rows in np.split(data.z, data.starts[1:])])
    moments = random_coefficients(gram, data.counts)
    start = moments.mean.copy()
    start[: int(data.intercept)] = 0.0
    p = data.x.shape[1]
    with jax.enable_x64(True):
        problem = MixedLinearRegression(
            p=p, **sizes._asdict(), sigma=float(moments.noise_variance) ** 0.5, nu=1.0,
            w0=jnp.asarray(start), input_covariance=jnp.asarray(data.x.T @ data.x / len(data.x)),
            weight_covariance=jnp.asarray(p * moments.covariance),
        )  # fmt: skip
        adapt, loss = _curve(advice, problem)
        gains = {
            name: 1 - np.nanmin(_curve(advice, dataclasses.replace(problem, **change))[1])
            / np.nanmin(loss)
            for name, change in _changes(advice).items()
        }  # fmt: skip
    best = advice.best.rate, advice.best.ridge
    measured = advice.curves.loss[:, advice.best.ridge]
    distance = abs(loss[best[0]] - measured[best[0]])
    close = distance <= max(2 * advice.curves.error[best], CLOSE * measured[best[0]])
    return Theory(moments, problem, adapt, loss, loss / measured - 1, bool(close), gains)


def _changes(advice) -> dict[str, dict[str, int]]:
    m, n_t, n_v, n_r = advice.sizes
    return {
        f"training on all {advice.data.groups} groups": {"m": advice.data.groups},
        "twice the training groups": {"m": 2 * m},
        "twice the rows of a training group": {"n_t": 2 * n_t, "n_v": 2 * n_v},
        "twice the rows to adapt on": {"n_r": 2 * n_r},
    }


def _curve(advice, problem):
    """The best adaptation rate and the loss there, at every training rate: (R,) each.

    Three adaptation rates determine the quadratic.
    """
    unit, ridge = advice.data.unit, float(advice.grid.ridges[advice.best.ridge])
    rates = GradientDescent(jnp.asarray(advice.grid.rates))
    three = GradientDescent(jnp.array([-1.0, 0.0, 1.0]) * unit)
    below, at, above = np.moveaxis(
        np.asarray(test_loss(problem, rates, three, meta_ridge=ridge)), -1, 0
    )
    slope, curvature = (above - below) / 2, above + below - 2 * at
    best = -slope / curvature
    return best * unit, at + slope * best / 2
