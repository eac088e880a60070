"""Compares measured losses with the anisotropic theory, and predicts them at other sizes."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from negmaml.advice.moments import RandomCoefficients, random_coefficients
from negmaml.problem import MixedLinearRegression
from negmaml.rules import GradientDescent
from negmaml.theory import test_loss

MAX_GAP = 0.03  # relative difference of theory and measurement that counts as agreement


class Theory(NamedTuple):
    """Predictions of the theory for the groups of an `Advice`.

    moments: w0, Omega and sigma^2 of `random_coefficients`, from all rows of all groups.
    problem: the mixed linear regression with these moments and the second moments of the features.
        `theory.best_allocation(budget, problem)` allocates rows to groups and within them.
    adapt, loss: (R,), the best raw adaptation rate and the loss there, at the advised ridge.
    gap: (R,), loss / measured loss - 1.
    agrees: True if the loss at the best rates is within two standard errors or 3% of the measured
        one.
    gains: {change of sizes: relative decrease of the loss, at the best rates of each}.
    """

    moments: RandomCoefficients
    problem: Any
    adapt: np.ndarray
    loss: np.ndarray
    gap: np.ndarray
    agrees: bool
    gains: dict[str, float]


def theory_of(advice) -> Theory:
    """Estimate the moments, and predict losses at the advised ridge and at other sizes.

    The theory treats features as random with these second moments and penalizes every coefficient.
    The data have a constant intercept without penalty. The two nearly agree if the intercept starts
    at its mean.

    Raises ValueError for several targets.
    """
    data, sizes = advice.data, advice.sizes
    if data.y.shape[1] > 1:
        raise ValueError(
            f"theory is for one target, got {data.y.shape[1]}; advise on each separately"
        )
    moments = random_coefficients(data.grams(), data.counts)
    # The meta-solution starts from zero, but its intercept, which is not penalized, from the mean.
    w0 = moments.mean.copy()
    w0[: int(data.intercept)] = 0.0
    p = data.x.shape[1]
    # Gains are differences of nearly equal losses, of which float32 would leave few digits.
    with jax.enable_x64(True):
        # nu = 1: weights then have the covariance weight_covariance / p, which is to be Omega.
        problem = MixedLinearRegression(
            p=p, **sizes._asdict(), sigma=float(moments.noise_variance) ** 0.5, nu=1.0,
            w0=jnp.asarray(w0), input_covariance=jnp.asarray(data.second_moments),
            weight_covariance=jnp.asarray(p * moments.covariance),
        )  # fmt: skip
        adapt, loss = _curve(advice, problem)
        gains = {
            # Each size at its own best rates. A rate without a solution of the theory is NaN.
            name: 1 - np.nanmin(_curve(advice, dataclasses.replace(problem, **change))[1])
            / np.nanmin(loss)
            for name, change in _changes(advice).items()
        }  # fmt: skip
    best = advice.best.rate, advice.best.ridge
    measured = advice.curves.loss[:, advice.best.ridge]
    difference = abs(loss[best[0]] - measured[best[0]])
    agrees = difference <= max(2 * advice.curves.error[best], MAX_GAP * measured[best[0]])
    return Theory(moments, problem, adapt, loss, loss / measured - 1, bool(agrees), gains)


def _changes(advice) -> dict[str, dict[str, int]]:
    """Sizes to predict the loss at, by description."""
    m, n_t, n_v, n_r = advice.sizes
    return {
        f"training on all {advice.data.groups} groups": {"m": advice.data.groups},
        "twice the training groups": {"m": 2 * m},
        "twice the rows of a training group": {"n_t": 2 * n_t, "n_v": 2 * n_v},
        "twice the rows to adapt on": {"n_r": 2 * n_r},
    }


def _curve(advice, problem):
    """The best adaptation rate and the loss there, at every training rate: (R,) each.

    The loss is a quadratic in the adaptation rate, so three rates determine it.
    """
    # Three rates of the size of the best one: their losses differ by more than rounding.
    unit, ridge = advice.data.rate_unit, float(advice.grid.ridges[advice.best.ridge])
    rates = GradientDescent(jnp.asarray(advice.grid.rates))
    three = GradientDescent(jnp.array([-1.0, 0.0, 1.0]) * unit)
    below, at, above = np.moveaxis(
        np.asarray(test_loss(problem, rates, three, meta_ridge=ridge)), -1, 0
    )
    # Central differences of a quadratic are exact.
    slope, curvature = (above - below) / 2, above + below - 2 * at
    best = -slope / curvature
    return best * unit, at + slope * best / 2
