"""Exact meta-training in kernel space against the same in parameters, by other code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm
from negmaml.kernels import leave_one_task_out, meta_train
from negmaml.linear import Data, meta_system, minimiser

RULES = (
    nm.GradientDescent(-0.7),
    nm.GradientDescent(0.0),
    nm.GradientDescent(0.4),
    nm.GradientDescent(-0.2, steps=3),
    nm.GradientFlow(-0.3),
    nm.GradientFlow(0.8),
    nm.Proximal(0.5),
    nm.Proximal(-9.0),
)


def linear_kernel(a, b):
    return a @ b.T


def draw(m, n_t, n_v, p, outputs=(), key=0):
    keys = jax.random.split(jax.random.key(key), 4)
    x_t = jax.random.normal(keys[0], (m, n_t, p))
    x_v = jax.random.normal(keys[1], (m, n_v, p))
    y_t = jax.random.normal(keys[2], (m, n_t, *outputs))
    y_v = jax.random.normal(keys[3], (m, n_v, *outputs))
    return nm.Tasks((x_t, y_t), (x_v, y_v))


def primal(tasks, rule, ridge):
    """omega* of the linear model, by `minimiser`."""
    (x_t, y_t), (x_v, y_v) = tasks
    return minimiser(*meta_system(Data(x_t, y_t, x_v, y_v), rule), 0.0, ridge)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("sizes", [(3, 6, 4, 30), (8, 5, 6, 10)], ids=("wide", "tall"))
def test_linear_kernel_is_the_linear_minimiser(rule, sizes):
    tasks = draw(*sizes)
    ridges = jnp.array([0.0, 0.3])
    model = meta_train(linear_kernel, tasks, rule, meta_ridge=ridges)
    assert model.reliable.all()
    x = jax.random.normal(jax.random.key(9), (7, sizes[-1]))
    for i, ridge in enumerate(ridges):
        omega = primal(tasks, rule, ridge).omega
        np.testing.assert_allclose(model(x)[i], x @ omega, rtol=0, atol=1e-10)
        np.testing.assert_allclose(model.points.T @ model.weights[i, :, 0], omega, atol=1e-10)


def without(tasks, j):
    return jax.tree.map(lambda x: jnp.delete(x, j, 0), tasks)


def only(tasks, j):
    return jax.tree.map(lambda x: x[j : j + 1], tasks)


# p below, a little below and above m n_v = 24: singular without a ridge, singular with all tasks
# but not without one, and never singular.
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("p", [9, 22, 60])
@pytest.mark.parametrize(
    "rule", [nm.GradientDescent(jnp.array([-0.5, 0.0, 0.3])), nm.Proximal(0.7)]
)
def test_leaving_a_task_out_is_training_on_the_others(p, rule):
    tasks, ridges = draw(6, 5, 4, p, (2,)), jnp.array([0.0, 0.5])
    left = leave_one_task_out(linear_kernel, tasks, rule, meta_ridge=ridges)
    assert left.reliable.all()
    for adapt in (nm.GradientDescent(jnp.array([-0.4, 0.2])), nm.GradientFlow(0.3)):
        losses = left.losses(adapt)
        for j in range(6):
            model = meta_train(linear_kernel, without(tasks, j), rule, meta_ridge=ridges)
            np.testing.assert_allclose(losses[..., j], model.loss(only(tasks, j), adapt), rtol=1e-8)
