"""Scatter over training sets for problems with covariances: the isotropic one, and simulation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm
from negmaml.theory import required_runs, standard_deviation
from tests.helpers import mostly_slow
from tests.internals import covariances, make_inputs

pytestmark = pytest.mark.usefixtures("x64")

PROBLEM = nm.MixedLinearRegression(p=40, m=4, n_t=20, n_v=4, n_r=20, sigma=0.5, nu=1.0, omega0=0.2)
BENT = dataclasses.replace(PROBLEM, input_covariance=np.arange(1, 41.0) ** -0.8)
RATES = jnp.array([-0.3, 0.4])
TRAIN, ADAPT = nm.GradientDescent(RATES), nm.GradientDescent(0.2)


@pytest.mark.parametrize("n_v", mostly_slow((4, 20), 1))
def test_with_identity_it_is_the_isotropic_one(n_v):
    plain = dataclasses.replace(PROBLEM, n_v=n_v)
    same = dataclasses.replace(plain, input_covariance=np.ones(40))
    for ridge in (0.0, 3.0)[: 2 if n_v == 4 else 1]:
        ridge = jnp.array(ridge)  # one program for both
        one, two = (standard_deviation(x, TRAIN, ADAPT, meta_ridge=ridge) for x in (plain, same))
        np.testing.assert_allclose(two.weight_error, one.weight_error, rtol=0.01)
        np.testing.assert_allclose(two.test_loss, one.test_loss, rtol=0.01)


def test_deviations_agree_with_simulation():
    ridge = jnp.array(3.0)
    runs = nm.simulate(jax.random.key(1), BENT, TRAIN, ADAPT, runs=1500, meta_ridge=ridge)
    found = standard_deviation(BENT, TRAIN, ADAPT, meta_ridge=ridge)
    np.testing.assert_allclose(found.weight_error, runs.weight_error.std(-1), rtol=0.07)
    np.testing.assert_allclose(found.test_loss, runs.test_loss.std(-1), rtol=0.07)


@pytest.mark.slow
def test_required_runs_give_the_standard_error_asked_for():
    runs = nm.simulate(jax.random.key(1), BENT, TRAIN, ADAPT, runs=2500, meta_ridge=3.0)
    gaps = runs.test_loss[1] - runs.test_loss[0]
    options = dict(adapt=ADAPT, meta_ridge=3.0, standard_errors=5.0)
    needed = required_runs(BENT, *map(nm.GradientDescent, RATES), **options)
    assert float(gaps.mean() / gaps.std() * needed**0.5) == pytest.approx(5, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("rule", [nm.GradientDescent(0.3, 2), nm.Proximal(0.5)])
def test_other_rules(rule):
    problem = dataclasses.replace(BENT, n_v=20)
    runs = nm.simulate(jax.random.key(1), problem, rule, ADAPT, runs=2500)
    found = standard_deviation(problem, rule, ADAPT)
    assert float(found.test_loss / runs.test_loss.std()) == pytest.approx(1, abs=0.06)


@pytest.mark.slow
def test_two_rules_of_different_families():
    """Their covariance is that of simulated runs, and within the bound of Cauchy and Schwarz."""
    ridge, weights = jnp.array(3.0), np.ones((1, 40))
    rules = nm.GradientDescent(0.4), nm.Proximal(0.5)
    at, first = make_inputs(BENT, rules[0], ridge, weights)
    _, second = make_inputs(BENT, rules[1], ridge, weights)
    cross, *_ = covariances(at, first, second)
    key = jax.random.key(1)
    one, two = (
        nm.simulate(key, BENT, rule, ADAPT, runs=1500, meta_ridge=ridge).weight_error
        for rule in rules
    )
    error = float(one.std() * two.std()) / 1500**0.5
    assert abs(float(cross[0, 0]) - np.cov(one, two)[0, 1]) < 4 * error


def test_infinite_near_the_threshold():
    close = dataclasses.replace(BENT, m=19, n_v=2)
    found = standard_deviation(close, TRAIN, ADAPT, meta_ridge=jnp.array(0.0))
    assert jnp.all(found.test_loss == jnp.inf)
