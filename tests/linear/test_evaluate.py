"""Evaluation on sampled test tasks: the shortcut, the general route, and their mean."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm
from negmaml import linear
from tests.helpers import z_score
from tests.internals import TEST_POINTS, TEST_TASKS, expected_test_loss
from tests.linear.dense import General, dense_system

P = 6
PROBLEM = nm.MixedLinearRegression(p=P, m=2, n_t=3, n_v=2, n_r=4, sigma=0.6, nu=0.9, w0=0.2)
TEST = dataclasses.replace(PROBLEM, m=TEST_TASKS, n_t=PROBLEM.n_r, n_v=TEST_POINTS)
OMEGA = np.random.default_rng(0).normal(size=(2, 3, P))

sampled_test_loss = jax.jit(linear.sampled_test_loss)
sample = jax.jit(linear.sample)

RULES = {
    "one step": nm.GradientDescent(-0.4),
    "no step": nm.GradientDescent(0.0),
    "three steps": nm.GradientDescent(0.3, steps=3),
    "flow": nm.GradientFlow(-0.5),
    "proximal": nm.Proximal(0.8),
}


def test_one_step_is_the_loss_of_explicitly_adapted_weights(x64):
    key, rate, omega = jax.random.key(1), -0.7, OMEGA[0, 0]
    losses = []
    for X, y, X_test, y_test in zip(*map(np.asarray, sample(key, TEST)), strict=True):
        theta = omega - rate * X.T @ (X @ omega - y) / len(y)
        losses.append(np.mean((X_test @ theta - y_test) ** 2) / 2)
    found = sampled_test_loss(key, PROBLEM, omega, nm.GradientDescent(rate))
    np.testing.assert_allclose(found, np.mean(losses), rtol=1e-12)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_loss_is_that_of_the_dense_system_for_every_weight(x64, rule):
    key = jax.random.key(2)
    Phi, r = dense_system(sample(key, TEST), rule)
    expected = np.mean((OMEGA @ Phi.T - r) ** 2, -1) / 2
    found = sampled_test_loss(key, PROBLEM, OMEGA, rule)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_the_shortcut_is_the_general_route(x64):
    key, rates = jax.random.key(3), np.array([-1.5, 0.0, 0.4])
    shortcut = sampled_test_loss(key, PROBLEM, OMEGA, nm.GradientDescent(rates))
    general = sampled_test_loss(key, PROBLEM, OMEGA, General(rates))
    np.testing.assert_allclose(shortcut, general, rtol=1e-11)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("shape", [(), (4,), (4, 5)])
def test_shape_is_that_of_the_weights_then_the_rule(batch, shape, steps):
    omega, rule = jnp.zeros((*batch, P)), nm.GradientDescent(np.zeros(shape), steps=steps)
    loss = jax.eval_shape(linear.sampled_test_loss, jax.random.key(0), PROBLEM, omega, rule)
    chex.assert_shape(loss, batch + shape)


@pytest.mark.parametrize("steps", [1, 2])
def test_axes_of_weights_and_rates_are_not_swapped(x64, steps):
    key, rates = jax.random.key(4), np.array([-0.6, 0.0, 0.5])
    table = sampled_test_loss(key, PROBLEM, OMEGA, nm.GradientDescent(rates, steps=steps))
    for k, rate in enumerate(rates):
        Phi, r = dense_system(sample(key, TEST), nm.GradientDescent(rate, steps=steps))
        expected = np.mean((OMEGA @ Phi.T - r) ** 2, -1) / 2
        np.testing.assert_allclose(table[..., k], expected, rtol=1e-10)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_mean_over_keys_is_the_expected_test_loss(x64, rule):
    losses = [
        sampled_test_loss(jax.random.key(seed), PROBLEM, OMEGA, rule)[0, 1] for seed in range(60)
    ]
    expected = expected_test_loss(PROBLEM, np.sum((OMEGA[0, 1] - PROBLEM.w0) ** 2), rule)
    assert abs(z_score(np.array(losses), float(expected))) < 4


def test_sizes_of_meta_training_do_not_enter(x64):
    key, rule = jax.random.key(6), nm.GradientDescent(0.3)
    other = dataclasses.replace(PROBLEM, m=7, n_t=1, n_v=9, omega0=5.0)
    here, there = (sampled_test_loss(key, problem, OMEGA, rule) for problem in (PROBLEM, other))
    np.testing.assert_array_equal(here, there)
