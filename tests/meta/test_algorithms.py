"""Adaptation and the meta-objective for any loss."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import negmaml as nm
from negmaml.linear import meta_system, sample
from tests.helpers import RATES


def network_loss(params, data):
    x, y = data
    hidden = jnp.tanh(x @ params["w"] + params["b"])
    return jnp.mean((hidden @ params["v"] - y) ** 2)


network_gradient = jax.jit(jax.grad(network_loss))


@jax.jit
def adapted_network(params, support, rule):
    return nm.adapt(network_loss, params, support, rule)


@jax.jit
def network_objective(params, tasks, rule):
    return nm.maml(network_loss, rule)(params, tasks)


network_objective_gradient = jax.jit(jax.grad(network_objective))


def square_loss(w, data):
    X, y = data
    return jnp.mean((X @ w - y) ** 2) / 2


@jax.jit
def linear_value_and_gradient(omega, tasks, rule):
    return jax.value_and_grad(nm.maml(square_loss, rule))(omega, tasks)


def network(seed=0, tasks=3, points=4):
    """Parameters of a small network, and tasks of different functions."""
    rng = np.random.default_rng(seed)
    shapes = {"w": (2, 2), "b": (2,), "v": (2,)}
    params = {name: jnp.asarray(rng.standard_normal(shape)) for name, shape in shapes.items()}
    support, query = (
        tuple(jnp.asarray(rng.standard_normal((tasks, points, *s))) for s in ((2,), ()))
        for _ in range(2)
    )
    return params, nm.Tasks(support, query)


def per_leaf(scale):
    return {"w": scale * jnp.array([[1.0, -2.0], [0.5, 0.0]]), "b": 0.0, "v": -0.3 * scale}


@jax.jit
def adapted_quadratic(rule):
    return nm.adapt(lambda w, target: 1.5 * (w - target) ** 2, 1.5, 0.4, rule)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("steps", (1, 5))
def test_adapting_a_quadratic_is_its_scalar_recursion(steps, rate, x64):
    expected = 1.5
    for _ in range(steps):
        expected -= rate * 3.0 * (expected - 0.4)
    adapted = adapted_quadratic(nm.GradientDescent(rate, steps))
    assert float(adapted) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("rate", (-0.2, 0.0, 0.1))
@pytest.mark.parametrize("steps", (1, 3))
def test_adapting_a_network_takes_gradient_steps_on_every_leaf(steps, rate, x64):
    params, tasks = network()
    support = jax.tree.map(lambda x: x[0], tasks.support)
    adapted = adapted_network(params, support, nm.GradientDescent(rate, steps))
    expected = params
    for _ in range(steps):
        gradient = network_gradient(expected, support)
        expected = {name: expected[name] - rate * gradient[name] for name in expected}
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), adapted, expected)


@pytest.mark.parametrize("steps", (1, 2))
def test_a_pytree_of_rates_moves_every_leaf_at_its_own(steps, x64):
    params, tasks = network()
    support, rates = jax.tree.map(lambda x: x[0], tasks.support), per_leaf(0.4)
    adapted = adapted_network(params, support, nm.GradientDescent(rates, steps))
    expected = params
    for _ in range(steps):
        gradient = network_gradient(expected, support)
        expected = {name: expected[name] - rates[name] * gradient[name] for name in expected}
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), adapted, expected)
    np.testing.assert_array_equal(adapted["b"], params["b"])


def test_adapted_parameters_keep_their_types_under_a_rate_of_higher_precision(x64):
    params = {"a": jnp.ones(3, jnp.float32), "b": jnp.ones(2, jnp.bfloat16)}

    def loss(params, target):
        return jnp.sum((params["a"] - target) ** 2) + jnp.sum(params["b"] ** 2)

    for steps in (1, 3):
        rule = nm.GradientDescent(jnp.float64(-0.1), steps)
        adapted = jax.eval_shape(lambda rule: nm.adapt(loss, params, 0.0, rule), rule)
        assert {k: v.dtype for k, v in adapted.items()} == {"a": jnp.float32, "b": jnp.bfloat16}


RULES = (
    *(nm.GradientDescent(rate) for rate in (-0.4, 0.0, 0.3)),
    *(nm.GradientDescent(rate, 3) for rate in (-0.1, 0.2)),
    nm.GradientDescent(per_leaf(0.5), 2),
)


@pytest.mark.parametrize("rule", RULES, ids=range(len(RULES)))
def test_the_meta_objective_is_the_mean_loss_on_the_query_after_adapting(rule, x64):
    params, tasks = network()
    losses = []
    for i in range(3):
        support, query = (jax.tree.map(lambda x, i=i: x[i], part) for part in tasks)
        losses.append(network_loss(adapted_network(params, support, rule), query))
    assert float(network_objective(params, tasks, rule)) == pytest.approx(
        np.mean(losses), rel=1e-13
    )


@pytest.mark.parametrize("rule", RULES, ids=range(len(RULES)))
def test_the_meta_gradient_is_the_finite_difference_of_the_objective(rule, x64):
    params, tasks = network()
    flat, unravel = ravel_pytree(params)
    gradient, _ = ravel_pytree(network_objective_gradient(params, tasks, rule))
    steps = 1e-5 * np.eye(flat.size)
    up, down = (
        np.array([network_objective(unravel(flat + s), tasks, rule) for s in sign * steps])
        for sign in (1, -1)
    )
    np.testing.assert_allclose(gradient, (up - down) / 2e-5, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("steps", (1, 4))
def test_at_rate_zero_the_meta_gradient_is_that_of_joint_training(steps, x64):
    params, tasks = network()

    @jax.jit
    def joint(params):
        return jnp.mean(jax.vmap(network_loss, (None, 0))(params, tasks.query))

    computed = network_objective_gradient(params, tasks, nm.GradientDescent(0.0, steps))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-13), computed, jax.grad(joint)(params))


def test_the_objective_is_differentiable_in_the_rate(x64):
    params, tasks = network()
    objective = jax.jit(
        lambda rate: nm.maml(network_loss, nm.GradientDescent(rate, 2))(params, tasks)
    )
    for rate in (-0.3, 0.0, 0.2):
        difference = float(objective(rate + 1e-5) - objective(rate - 1e-5)) / 2e-5
        assert float(jax.grad(objective)(rate)) == pytest.approx(difference, rel=1e-7)


@pytest.mark.parametrize("steps", (1, 3))
@pytest.mark.parametrize("rate", (-0.4, 0.0, 0.3))
def test_on_the_linear_model_the_meta_gradient_is_that_of_the_meta_system(rate, steps, x64):
    problem = nm.MixedLinearRegression(p=6, m=3, n_t=4, n_v=5, n_r=2, sigma=0.5, nu=1.0)
    data, rule = sample(jax.random.key(0), problem), nm.GradientDescent(rate, steps)
    omega = jnp.linspace(-1, 2, 6)

    tasks = nm.Tasks((data.X_t, data.y_t), (data.X_v, data.y_v))
    value, gradient = linear_value_and_gradient(omega, tasks, rule)
    Phi, r = meta_system(data, rule)
    residual = Phi @ omega - r
    np.testing.assert_allclose(gradient, Phi.T @ residual / problem.rows, rtol=1e-11, atol=1e-12)
    assert float(value) == pytest.approx(float(residual @ residual) / (2 * problem.rows), rel=1e-12)


@pytest.mark.parametrize(
    "rate", ({"w": 0.1, "b": 0.1}, [0.1, 0.1, 0.1], np.array([0.1, 0.2]), (0.1,))
)
def test_a_rate_with_another_structure_than_the_parameters_raises(rate):
    params, tasks = network()
    support = jax.tree.map(lambda x: x[0], tasks.support)
    with pytest.raises(ValueError, match=r"rate must be a number, or a"):
        nm.adapt(network_loss, params, support, nm.GradientDescent(rate))


@pytest.mark.parametrize(("steps", "shape"), ((1, (3,)), (4, (3,)), (1, (2, 2)), (3, (2, 2))))
def test_a_rate_that_would_change_the_shape_of_the_parameters_raises(shape, steps):
    with pytest.raises(ValueError, match=r"rate must be"):
        nm.adapt(
            lambda w, target: jnp.sum((w - target) ** 2),
            jnp.ones(shape[1:]),
            0.0,
            nm.GradientDescent(jnp.full(shape, 0.1), steps),
        )


@pytest.mark.parametrize(
    ("rule", "message"),
    (
        (nm.GradientFlow(0.1), r"rule GradientFlow has no update\("),
        (0.1, r"rule must be an inner rule .* write GradientDescent\(0.1\)"),
        (None, r"rule must be an inner rule"),
    ),
)
def test_a_rule_without_updates_raises_for_a_general_loss(rule, message):
    with pytest.raises(TypeError, match=message):
        nm.adapt(lambda w, target: (w - target) ** 2, 1.0, 0.0, rule)


def test_tasks_are_vmapped_with_their_own_adaptation():
    rule = nm.GradientDescent(-0.5)
    adapted = jax.vmap(lambda target: nm.adapt(lambda w, t: (w - t) ** 2 / 2, 1.0, target, rule))(
        jnp.array([0.0, 1.0, 3.0])
    )
    np.testing.assert_allclose(adapted, [1.5, 1.0, 0.0], rtol=1e-6)
