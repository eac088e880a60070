"""Optax transformations that need the loss besides its gradient, as inner rules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import negmaml as nm

KEYS = jax.random.split(jax.random.key(3), 4)
START = {"w": jax.random.normal(KEYS[0], (3,)), "b": jnp.zeros(())}
X, Y = jax.random.normal(KEYS[1], (8, 3)), jax.random.normal(KEYS[2], (8,))
TASKS = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), nm.Tasks((X, Y), (X, Y + 0.1)))


def loss(params, data):
    X, y = data
    return jnp.mean((jnp.tanh(X @ params["w"]) + params["b"] - y) ** 2)


def by_hand(optimizer, steps):
    """The loop of optax's documentation."""
    params, objective = START, lambda params: loss(params, (X, Y))

    def step(_, carry):
        params, state = carry
        value, grad = jax.value_and_grad(objective)(params)
        updates, state = optimizer.update(
            grad, state, params, value=value, grad=grad, value_fn=objective
        )
        return optax.apply_updates(params, updates), state

    return jax.jit(lambda carry: jax.lax.fori_loop(0, steps, step, carry))(
        (params, optimizer.init(params))
    )[0]


SEARCHES = {
    "lbfgs": optax.lbfgs(),
    "backtracking": optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10)),
    "polyak": optax.polyak_sgd(0.5),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_optimizers_that_need_the_loss_adapt_as_by_hand(name):
    rule = nm.InnerOptimizer(SEARCHES[name], steps=4)
    found = jax.jit(lambda params: nm.adapt(loss, params, (X, Y), rule))(START)
    expected = by_hand(SEARCHES[name], 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), found, expected)
    assert float(loss(found, (X, Y))) < float(loss(START, (X, Y)))


def test_they_evaluate_and_have_first_order_gradients():
    rule = nm.InnerOptimizer(SEARCHES["lbfgs"], steps=3)
    tested = nm.evaluate(KEYS[3], START, loss, rule, TASKS)
    np.testing.assert_allclose(jax.jit(nm.maml(loss, rule))(START, TASKS), tested.mean, rtol=1e-5)
    value, slope = jax.jit(nm.fomaml(loss, rule))(START, TASKS)
    np.testing.assert_allclose(value, tested.mean, rtol=1e-5)
    assert np.any(slope["w"])


@pytest.mark.parametrize("name", ("lbfgs", "backtracking"))
def test_a_meta_gradient_through_a_line_search_names_implicit(name):
    rule = nm.InnerOptimizer(SEARCHES[name], steps=2)
    for call in (nm.maml_value_and_grad(loss, rule), jax.grad(nm.maml(loss, rule))):
        with pytest.raises(TypeError, match=r"line search iterates.*negmaml\.Implicit"):
            jax.jit(call)(START, TASKS)


def test_steps_that_need_the_loss_without_a_search_have_meta_gradients(x64):
    rule = nm.InnerOptimizer(SEARCHES["polyak"], steps=2)
    start, tasks = jax.tree.map(lambda x: x.astype(jnp.float64), (START, TASKS))
    gradient = jax.jit(nm.maml_value_and_grad(loss, rule))(start, tasks)[1]
    total, step = jax.jit(nm.maml(loss, rule)), 1e-5
    ahead, behind = (start | {"b": start["b"] + h} for h in (step, -step))
    slope = (total(ahead, tasks) - total(behind, tasks)) / (2 * step)
    np.testing.assert_allclose(gradient["b"], slope, rtol=1e-6)
