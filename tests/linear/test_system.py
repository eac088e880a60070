"""The meta-system of every rule against dense matrix functions in NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm
from negmaml import linear
from negmaml.linear import Data
from tests.internals import one_step_system
from tests.linear.dense import General, dense_filters, dense_system

meta_system = jax.jit(linear.meta_system)

P = 6
SHAPES = {"n_t < p": 4, "n_t > p": 9}
RULES = {
    "one step": lambda a: nm.GradientDescent(a),
    "three steps": lambda a: nm.GradientDescent(a, steps=3),
    "flow": lambda a: nm.GradientFlow(a),
    "proximal": lambda a: nm.Proximal(a),
}
STRENGTHS = (-0.37, 0.0, 0.2, 1.3)


def draw(n_t):
    generator = np.random.default_rng(n_t)
    return Data(*(generator.normal(size=(2, *n)) for n in ((n_t, P), (n_t,), (3, P), (3,))))


@pytest.mark.parametrize("n_t", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
def test_system_is_that_of_dense_matrix_functions(x64, make, strength, n_t):
    data, rule = draw(n_t), make(strength)
    Phi, r = meta_system(data, rule)
    dense_Phi, dense_r = dense_system(data, rule)
    np.testing.assert_allclose(Phi, dense_Phi, atol=1e-10 * np.abs(dense_Phi).max() + 1e-12)
    np.testing.assert_allclose(r, dense_r, atol=1e-10 * np.abs(dense_r).max())


@pytest.mark.parametrize("n_t", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
def test_a_batch_of_strengths_stacks_the_systems_of_each(x64, make, n_t):
    data, strengths = draw(n_t), np.array([[-0.37, 0.1, 0.2], [0.5, 1.3, -0.9]])
    Phi, r = meta_system(data, make(strengths))
    chex.assert_shape(Phi, (2, 3, 6, P))
    chex.assert_shape(r, (2, 3, 6))
    for index in np.ndindex(2, 3):
        single = dense_system(data, make(strengths[index]))
        chex.assert_trees_all_close((Phi[index], r[index]), single, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n_t", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("make", list(RULES.values())[:3], ids=list(RULES)[:3])
def test_without_adaptation_the_system_is_the_validation_data(x64, make, n_t):
    data = draw(n_t)
    Phi, r = meta_system(data, make(0.0))
    np.testing.assert_allclose(Phi, data.X_v.reshape(-1, P), atol=1e-14)
    np.testing.assert_allclose(r, data.y_v.ravel(), atol=1e-14)


@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
def test_residual_is_the_error_of_adapted_weights(x64, make):
    # theta = b(S) omega + q(S) X^T y / n, predicted on validation points.
    data, rule, omega = draw(4), make(-0.37), np.linspace(-1, 1, P)
    Phi, r = meta_system(data, rule)
    errors = []
    for X_t, y_t, X_v, y_v in zip(*(np.asarray(leaf) for leaf in data), strict=True):
        b, q = dense_filters(rule, X_t.T @ X_t / 4)
        errors.append(X_v @ (b @ omega + q @ X_t.T @ y_t / 4) - y_v)
    np.testing.assert_allclose(Phi @ omega - r, np.concatenate(errors), atol=1e-11)


def test_many_short_steps_approach_the_flow(x64):
    data = draw(9)
    flow = meta_system(data, nm.GradientFlow(-0.3))
    gaps = [
        np.abs(meta_system(data, nm.GradientDescent(-0.3 / k, steps=k))[0] - flow[0]).max()
        for k in (50, 100, 200)
    ]
    np.testing.assert_allclose([gaps[0] / gaps[1], gaps[1] / gaps[2]], 2, rtol=0.03)  # O(1/k)


@pytest.mark.parametrize("rate", STRENGTHS)
def test_one_step_system_is_linear_in_the_rate(x64, rate):
    data = draw(4)
    A, B, a, c = jax.jit(one_step_system)(data)
    Phi, r = dense_system(data, nm.GradientDescent(rate))
    np.testing.assert_allclose(A - rate * B, Phi, atol=1e-11)
    np.testing.assert_allclose(a - rate * c, r, atol=1e-11)


def test_general_route_at_one_step_is_the_linear_one(x64):
    data, rates = draw(4), np.array([-0.8, 0.3])
    fast = meta_system(data, nm.GradientDescent(rates))
    general = meta_system(data, General(rates))
    chex.assert_trees_all_close(general, fast, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (nm.GradientDescent(0.1), True),
        (nm.GradientDescent(0.1, steps=2), False),
        (nm.GradientFlow(0.1), False),
        (nm.Proximal(0.1), False),
    ],
)
def test_only_one_gradient_step_is_linear(rule, expected):
    assert (rule.spectral().constant_filter is not None) is expected


def test_tasks_do_not_mix(x64):
    data = draw(4)
    rule = nm.GradientFlow(0.4)
    changed = Data(*(leaf * np.r_[5.0, 1.0].reshape(2, *[1] * (leaf.ndim - 1)) for leaf in data))
    systems = [meta_system(d, rule) for d in (data, changed)]
    chex.assert_trees_all_close(*([leaf[3:] for leaf in s] for s in systems), rtol=1e-11)
    assert np.abs(systems[0][0][:3] - systems[1][0][:3]).max() > 0.1


@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
def test_system_keeps_the_dtype_of_the_data(make):
    data = jax.tree.map(np.float32, draw(4))
    chex.assert_type(jax.eval_shape(linear.meta_system, data, make(0.3)), jnp.float32)
