"""Rates of a network from its own tasks: exact where it is linear in the parameters that adapt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm
from negmaml.advice import network_rates

SIZES = {"n_t": 10, "n_v": 6, "n_r": 5}
PROBLEM = nm.MixedLinearRegression(p=6, m=300, **SIZES, sigma=0.5, nu=1.0, w0=0.3, omega0=0.1)
TASKS = nm.tasks.Linear(PROBLEM)(jax.random.key(0))
START = jnp.full(6, 0.1)
RATES = (-0.7, -1e-3, 0.0, 0.4, 2.5)


def linear(w, x):
    return x @ w


def squared_error(w, data):
    x, y = data
    return jnp.mean((linear(w, x) - y) ** 2) / 2


@pytest.fixture(scope="module")
def found():
    return network_rates(linear, START, TASKS)


def rows(part, which):
    return jax.tree.map(lambda a: a[:, which], part)


@pytest.mark.parametrize("rate", RATES)
def test_losses_of_a_linear_model_are_those_of_a_step_on_the_same_tasks(found, rate):
    measured = nm.maml(squared_error, nm.GradientDescent(rate))(START, TASKS)
    np.testing.assert_allclose(found.adapt_loss(rate, 10), measured, rtol=1e-5)


@pytest.mark.parametrize("rate", (-0.7, 0.4))
def test_losses_for_fewer_points_are_those_of_a_step_on_half_of_the_support(found, rate):
    objective = nm.maml(squared_error, nm.GradientDescent(rate))
    halves = [rows(TASKS.support, slice(k, None, 2)) for k in (0, 1)]
    measured = [objective(START, nm.Tasks(half, TASKS.query)) for half in halves]
    np.testing.assert_allclose(found.adapt_loss(rate, 5), np.mean(measured), rtol=1e-5)


@pytest.mark.parametrize("n_r", (1, 5, 40))
def test_the_best_adaptation_rate_is_that_of_the_theory(found, n_r):
    problem = nm.MixedLinearRegression(
        p=6, m=3, n_t=10, n_v=6, n_r=n_r, sigma=0.5, nu=1.0, w0=0.3, omega0=0.1
    )
    # With a large ridge meta-training stays at its start.
    exact = nm.theory.best_adapt_rate(problem, nm.GradientDescent(0.0), meta_ridge=1e9)
    assert abs(found.adapt_rate(n_r) - exact) < 4 * found.adapt_rate_error(n_r)


def test_standard_errors_are_the_spread_over_sets_of_tasks(found):
    parts = np.array_split(found.parabola, 10, axis=1)
    rates = [found.__class__(**vars(found) | {"parabola": p}).adapt_rate(10) for p in parts]
    spread = np.std(rates, ddof=1) / 10**0.5
    assert 0.5 < spread / found.adapt_rate_error(10) < 2


def test_rates_for_several_numbers_of_points_come_at_once(found):
    n_r = np.array([[2], [20]])
    assert found.adapt_rate(n_r).shape == found.adapt_rate_error(n_r).shape == (2, 1)
    assert found.adapt_loss(np.array([-0.1, 0.0, 0.1]), n_r).shape == (2, 3)


def test_moments_of_the_tasks_are_recovered(found):
    # Features are whitened up to rotation, so w0 - start of length 0.2 sqrt(6) is along any axis.
    np.testing.assert_allclose(found.moments.s, 1, atol=0.15)
    np.testing.assert_allclose(np.sum(found.mean**2), 6 * 0.2**2, rtol=0.5)
    np.testing.assert_allclose(found.variance.sum(), 1, rtol=0.15)
    np.testing.assert_allclose(found.noise_variance, 0.25, rtol=0.1)


def test_best_rates_of_a_linear_model_are_those_of_the_theory(found):
    sizes = {"m": 2, **SIZES, "n_v": 2}
    best = found.best_rates(**sizes)
    problem = nm.MixedLinearRegression(p=6, **sizes, sigma=0.5, nu=1.0, w0=0.3, omega0=0.1)
    train, adapt = nm.theory.best_rates(problem)
    lowest = nm.theory.test_loss(problem, nm.GradientDescent(train), nm.GradientDescent(adapt))
    rules = nm.GradientDescent(best.train), nm.GradientDescent(best.adapt)
    reached = nm.theory.test_loss(problem, *rules)
    assert best.train < 0 < best.adapt
    np.testing.assert_allclose(best.loss, lowest, rtol=0.1)
    assert reached < 1.02 * lowest


def test_the_last_layer_of_a_network_is_exact_and_the_body_may_be_any_pytree():
    body = jax.random.normal(jax.random.key(1), (6, 30)) / 2
    head = {"w": jnp.zeros(30), "name": "head"}

    def apply(head, x):
        return jnp.tanh(x @ body) @ head["w"]

    def loss(w, data):
        x, y = data
        return jnp.mean((apply({"w": w}, x) - y) ** 2) / 2

    found = network_rates(apply, head, TASKS, features=8)
    rate = found.adapt_rate(10)
    measured = nm.maml(loss, nm.GradientDescent(rate))(head["w"], TASKS)
    np.testing.assert_allclose(found.adapt_loss(rate, 10), measured, rtol=1e-5)
    assert len(found.mean) == 8 and 0.5 < found.trace_fraction < 1
    assert "best rate for 10 points" in repr(found)


def test_a_small_step_of_all_parameters_is_the_linearized_one():
    body = jax.random.normal(jax.random.key(1), (6, 10)) / 2
    params = body, jnp.ones(10) / 10

    def apply(params, x):
        return jnp.tanh(x @ params[0]) @ params[1]

    def loss(params, data):
        x, y = data
        return jnp.mean((apply(params, x) - y) ** 2) / 2

    found = network_rates(apply, params, TASKS, features=4)
    objective = nm.maml(loss, nm.GradientDescent(0.0))
    for rate in (-1e-3, 1e-3):
        change = nm.maml(loss, nm.GradientDescent(rate))(params, TASKS) - objective(params, TASKS)
        predicted = found.adapt_loss(rate, 10) - found.adapt_loss(0.0, 10)
        np.testing.assert_allclose(change, predicted, rtol=0.02)
