"""Scatter over runs, and runs needed, against simulation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm
from negmaml.theory import required_runs, standard_deviation
from tests.helpers import mostly_slow
from tests.internals import theory_model

START_OFF = nm.MixedLinearRegression(
    p=40, m=4, n_t=20, n_v=4, n_r=20, sigma=0.5, nu=1.0, omega0=0.2
)
UNDER = dataclasses.replace(START_OFF, n_v=20)
RATES = jnp.array([-0.3, 0.4])
ADAPT = nm.GradientDescent(0.2)


@pytest.mark.parametrize(
    ("problem", "ridge"),
    mostly_slow(((START_OFF, 0.0), (START_OFF, 3.0), (UNDER, 0.0)), 0, 1),
)
def test_variances_and_covariance_are_those_of_simulation(problem, ridge, x64):
    train = nm.GradientDescent(RATES)
    runs = nm.simulate(jax.random.key(1), problem, train, ADAPT, runs=2500, meta_ridge=ridge)
    spread = standard_deviation(problem, train, ADAPT, meta_ridge=ridge)
    np.testing.assert_allclose(spread.weight_error, runs.weight_error.std(-1), rtol=0.1)
    np.testing.assert_allclose(spread.test_loss, runs.test_loss.std(-1), rtol=0.1)
    first, second = (nm.GradientDescent(rate) for rate in RATES)
    *_, both = theory_model(problem, ridge).loss_covariance(first, second, None)
    cross = both.values * jnp.exp(2 * sum(both.log_units))
    error = np.prod(runs.weight_error.std(-1)) / 2500**0.5
    assert abs(float(cross) - np.cov(runs.weight_error)[0, 1]) < 4 * error


def test_the_noise_alone_has_the_exact_inverse_wishart_variance(x64):
    # At alpha_t = 0: 2 N (p - 1)/((g - 1)^2 (g - 3)) sigma^4, g = p - N.
    problem = dataclasses.replace(START_OFF, nu=0.0, omega0=0.0, sigma=1.0, m=1, n_v=24, p=40)
    exact = 2 * 24 * 39 / (15**2 * 13)
    found = standard_deviation(problem, nm.GradientDescent(0.0), ADAPT).weight_error
    assert float(found) ** 2 == pytest.approx(exact, rel=0.04)


def test_required_runs_give_the_standard_error_asked_for(x64):
    first, second = (nm.GradientDescent(rate) for rate in RATES)
    needed = float(required_runs(START_OFF, first, second, standard_errors=5.0))
    apart = float(required_runs(START_OFF, first, second, standard_errors=5.0, shared=False))
    assert apart > needed
    runs = nm.simulate(jax.random.key(2), START_OFF, nm.GradientDescent(RATES), ADAPT, runs=2500)
    gaps = runs.test_loss[1] - runs.test_loss[0]
    assert float(gaps.mean() / gaps.std() * needed**0.5) == pytest.approx(5, rel=0.15)
    assert required_runs(START_OFF, first, first) > 1e9 or jnp.isnan(
        required_runs(START_OFF, first, first)
    )


def test_beyond_three_of_the_threshold_the_variance_is_finite_and_within_it_is_not(x64):
    close = dataclasses.replace(START_OFF, m=19, n_v=2)
    assert standard_deviation(close, nm.GradientDescent(0.0), ADAPT).weight_error == jnp.inf
    assert jnp.isfinite(standard_deviation(UNDER, nm.GradientDescent(0.0), ADAPT).weight_error)


def test_only_scalar_rules_are_compared():
    with pytest.raises(ValueError, match="train_b must have one scalar parameter"):
        required_runs(UNDER, ADAPT, nm.GradientDescent(RATES))


def test_runs_on_the_same_data_need_the_variance_of_the_difference():
    problem = nm.MixedLinearRegression(p=30, m=3, n_t=20, n_v=3, n_r=10, sigma=0.5, nu=1.0)
    rates, adapt = nm.GradientDescent(np.array([-0.4, 0.1])), nm.GradientDescent(0.2)
    loss = nm.simulate(jax.random.key(0), problem, rates, adapt, runs=2000).test_loss
    difference = np.asarray(loss[0] - loss[1])
    gap = float(np.diff(nm.theory.test_loss(problem, rates, adapt))[0])
    a, b = (nm.GradientDescent(rate) for rate in (-0.4, 0.1))
    found = float(required_runs(problem, a, b, standard_errors=1.0))
    assert found == pytest.approx(difference.var() / gap**2, rel=0.2)
