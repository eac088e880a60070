"""Derivatives of what is best: forward, reverse, differences, and of second order."""

import dataclasses

import jax
import pytest

import negmaml as nm
from negmaml.theory import best_adapt_rate, best_meta_ridge, best_rates, best_train_rate

OFF = nm.MixedLinearRegression(p=40, m=4, n_t=20, n_v=25, n_r=20, sigma=0.5, nu=1.0, omega0=0.2)
TRAIN = nm.GradientDescent(-0.2)


def adapting(problem):
    return best_adapt_rate(problem, TRAIN, nm.Proximal(0.0))


def both(problem):
    return best_rates(problem)[1]


def ridge(problem):
    return best_meta_ridge(problem, TRAIN)


def of_noise(best):
    return lambda sigma: best(dataclasses.replace(OFF, sigma=sigma))


def by_differences(function, x, step):
    """The slope at x to fourth order."""
    ahead, behind, far, back = (float(function(x + k * step)) for k in (1, -1, 2, -2))
    return (8 * (ahead - behind) - (far - back)) / (12 * step)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "best", (best_train_rate, *(pytest.param(best, marks=slow) for best in (adapting, both, ridge)))
)
def test_forward_reverse_and_differences_agree(best, x64):
    function = of_noise(best)
    forward = float(jax.jvp(function, (0.5,), (1.0,))[1])
    assert forward == pytest.approx(float(jax.grad(function)(0.5)), rel=1e-12)
    # The search is good to the root of the precision, hence wide steps.
    assert forward == pytest.approx(by_differences(function, 0.5, 0.05), rel=2e-3)


@slow
@pytest.mark.parametrize("best", (adapting, best_train_rate))
def test_second_derivatives_are_differences_of_first(best, x64):
    function = of_noise(best)
    slope = jax.grad(function)
    expected = by_differences(slope, 0.5, 0.02)
    assert float(jax.hessian(function)(0.5)) == pytest.approx(expected, rel=1e-4)
