"""Data: shapes, dtype, distribution, and inputs that do not depend on the variances."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm
from negmaml import linear
from tests.helpers import z_score

sample = jax.jit(linear.sample)

PROBLEM = nm.MixedLinearRegression(p=6, m=3, n_t=4, n_v=2, n_r=5, sigma=0.5, nu=0.8)
# Many tasks of few points, so that tasks are independent samples of a label.
MANY = nm.MixedLinearRegression(p=6, m=4000, n_t=1, n_v=1, n_r=1, sigma=0.5, nu=0.8, w0=0.3)


def test_every_leaf_leads_with_the_task_axis():
    data = sample(jax.random.key(0), PROBLEM)
    chex.assert_shape(data.X_t, (3, 4, 6))
    chex.assert_shape(data.y_t, (3, 4))
    chex.assert_shape(data.X_v, (3, 2, 6))
    chex.assert_shape(data.y_v, (3, 2))


def test_python_numbers_give_the_default_dtype():
    chex.assert_type(jax.eval_shape(sample, jax.random.key(0), PROBLEM), jnp.float32)


def test_python_numbers_give_float64_when_it_is_on(x64):
    chex.assert_type(jax.eval_shape(sample, jax.random.key(0), PROBLEM), jnp.float64)


def test_float32_numbers_stay_float32_when_float64_is_on(x64):
    single = dataclasses.replace(PROBLEM, sigma=np.float32(0.5), nu=jnp.float32(0.8))
    chex.assert_type(jax.eval_shape(sample, jax.random.key(0), single), jnp.float32)


@pytest.mark.parametrize("part", ["t", "v"])
def test_labels_average_to_zero_over_inputs(part):
    data = sample(jax.random.key(1), MANY)._asdict()
    assert abs(z_score(np.asarray(data[f"y_{part}"]).ravel(), 0.0)) < 4


@pytest.mark.parametrize("part", ["t", "v"])
def test_labels_vary_by_noise_tasks_and_the_mean_task(part):
    # E y^2 = sigma^2 + E|w|^2 = sigma^2 + nu^2 + |w0|^2 for isotropic inputs of unit variance.
    data = sample(jax.random.key(2), MANY)._asdict()
    predicted = 0.5**2 + 0.8**2 + 6 * 0.3**2
    assert abs(z_score(np.asarray(data[f"y_{part}"]).ravel() ** 2, predicted)) < 4


@pytest.mark.parametrize("part", ["t", "v"])
def test_labels_correlate_with_inputs_through_the_mean_task(part):
    data = sample(jax.random.key(3), MANY)._asdict()  # E x_k y = (w0)_k
    products = np.asarray(data[f"X_{part}"][:, 0] * data[f"y_{part}"])
    assert max(abs(z_score(column, 0.3)) for column in products.T) < 4


@pytest.mark.parametrize("part", ["t", "v"])
def test_inputs_are_standard_normal(part):
    X = np.asarray(sample(jax.random.key(4), MANY)._asdict()[f"X_{part}"]).ravel()
    assert abs(z_score(X, 0.0)) < 4
    assert abs(z_score(X**2, 1.0)) < 4
    assert abs(z_score(X**4, 3.0)) < 4


def test_training_and_validation_points_share_the_task():
    # Cov(y_t x_t, y_v x_v) summed over coordinates: E (x_t y_t).(x_v y_v) = E|w|^2.
    data = sample(jax.random.key(5), MANY)
    products = np.sum(data.X_t[:, 0] * data.X_v[:, 0], -1) * data.y_t[:, 0] * data.y_v[:, 0]
    # E[(x_t.x_v)(x_t.w)(x_v.w)] = |w|^2
    assert abs(z_score(np.asarray(products), 0.8**2 + 6 * 0.3**2)) < 4


def test_tasks_are_independent():
    data = sample(jax.random.key(6), dataclasses.replace(MANY, w0=0.0))
    products = np.sum(data.X_t[:-1, 0] * data.X_v[1:, 0], -1) * data.y_t[:-1, 0] * data.y_v[1:, 0]
    assert abs(z_score(np.asarray(products), 0.0)) < 4


@pytest.mark.parametrize("change", [{"sigma": 0.0}, {"nu": 3.0}, {"w0": 1.0}, {"omega0": 2.0}])
def test_inputs_at_a_key_do_not_depend_on_variances_or_offsets(change):
    key = jax.random.key(7)
    here, there = sample(key, PROBLEM), sample(key, dataclasses.replace(PROBLEM, **change))
    chex.assert_trees_all_equal((here.X_t, here.X_v), (there.X_t, there.X_v))


def test_sigma_scales_the_noise_and_nothing_else():
    key = jax.random.key(8)
    y = [sample(key, dataclasses.replace(PROBLEM, sigma=s)).y_t for s in (0.0, 1.0, 2.0)]
    np.testing.assert_allclose(y[2] - y[0], 2 * (y[1] - y[0]), atol=1e-5)
    assert np.abs(y[1] - y[0]).min() > 0


def test_the_mean_task_is_added_to_every_task():
    key, w0 = jax.random.key(9), np.linspace(-1, 1, 6)
    here, there = sample(key, PROBLEM), sample(key, dataclasses.replace(PROBLEM, w0=w0))
    np.testing.assert_allclose(there.y_t - here.y_t, here.X_t @ w0, atol=1e-5)
    np.testing.assert_allclose(there.y_v - here.y_v, here.X_v @ w0, atol=1e-5)


def test_without_noise_and_spread_labels_are_those_of_the_mean_task():
    data = sample(jax.random.key(10), dataclasses.replace(PROBLEM, sigma=0.0, nu=0.0, w0=0.7))
    np.testing.assert_allclose(data.y_v, 0.7 * data.X_v.sum(-1), atol=1e-5)


def test_without_noise_each_task_is_an_exact_line(x64):
    problem = dataclasses.replace(PROBLEM, sigma=0.0, n_t=6)
    data = sample(jax.random.key(11), problem)
    w = np.linalg.solve(data.X_t, data.y_t[..., None])
    np.testing.assert_allclose(data.y_v, (data.X_v @ w)[..., 0], atol=1e-9)
    assert np.ptp(w, axis=0).min() > 1e-3  # a different task each


def test_another_key_draws_other_data():
    first, second = (sample(jax.random.key(seed), PROBLEM) for seed in (0, 1))
    assert all(np.abs(a - b).max() > 0.1 for a, b in zip(first, second, strict=True))
