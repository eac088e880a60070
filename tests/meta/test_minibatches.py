"""Each inner step takes other rows of the support, in every algorithm and method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm

STEPS, ROWS = 4, 6
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


PARAMS = {"w": normal(2, 3), "v": normal(3)}
SUPPORT, QUERY = (normal(2, ROWS, 2), normal(2, ROWS)), (normal(2, 3, 2), normal(2, 3))
RULE = nm.Momentum(nm.Schedule([0.2, -0.1]), 0.5, STEPS)
DESCENT = nm.GradientDescent(0.2, STEPS)


def loss(params, data):
    x, y = data
    return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"] - y) ** 2)


def rows_of_step(k, size):
    """Rows of the loop in plain code."""
    return [i % ROWS for i in range(k * size, (k + 1) * size)]


def adapted(rule, params, support, size):
    """Parameters after steps on minibatches, by a Python loop."""
    theta, state = params, rule.init(params)
    for k in range(STEPS):
        own = jax.tree.map(lambda x, k=k: x[np.array(rows_of_step(k, size))], support)
        rate = rule.rate.values[min(k, 1)] if isinstance(rule.rate, nm.Schedule) else rule.rate
        one = type(rule)(rate, *([rule.momentum] if rule is RULE else []), steps=1)
        theta, state = one.update(jax.grad(loss)(theta, own), state, theta)
    return theta


def objective(rule, size):
    def total(params):
        pairs = [jax.tree.map(lambda x, i=i: x[i], (SUPPORT, QUERY)) for i in range(2)]
        return sum(loss(adapted(rule, params, s, size), q) for s, q in pairs) / 2

    return total


def assert_close(found, expected):
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * np.abs(b).max())


@pytest.mark.parametrize("size", [2, 4])  # divides the rows, and goes around in the middle
@pytest.mark.parametrize("rule", [RULE, DESCENT], ids=["momentum", "descent"])
def test_adapt_takes_the_next_rows_in_each_step(rule, size):
    support = jax.tree.map(lambda x: x[0], SUPPORT)
    found = nm.adapt(loss, PARAMS, nm.Minibatches(support, size), rule)
    assert_close(found, adapted(rule, PARAMS, support, size))


def test_without_size_each_entry_is_a_minibatch():
    support = jax.tree.map(lambda x: x[0].reshape(3, 2, *x.shape[2:]), SUPPORT)
    found = nm.adapt(loss, PARAMS, nm.Minibatches(support), RULE)
    rows = nm.Minibatches(jax.tree.map(lambda x: x[0], SUPPORT), 2)
    assert_close(found, nm.adapt(loss, PARAMS, rows, RULE))


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (RULE, {"method": "mixed"}),
        (RULE, {"method": "mixed", "segment": 3}),
        (DESCENT, {"method": "low-rank"}),
        (DESCENT, {}),
        pytest.param(RULE, {"method": "reverse"}, marks=pytest.mark.slow),
        pytest.param(RULE, {"method": "remat", "segment": "sqrt"}, marks=pytest.mark.slow),
        pytest.param(RULE, {"method": "mixed", "batch_size": 1}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_meta_gradient_is_that_of_a_loop(rule, options):
    tasks = nm.Tasks(nm.Minibatches(SUPPORT, 4), QUERY)
    found = jax.jit(nm.maml_value_and_grad(loss, rule, **options))(PARAMS, tasks)
    assert_close(found, jax.value_and_grad(objective(rule, 4))(PARAMS))


def test_first_order_methods_take_the_same_steps():
    tasks = nm.Tasks(nm.Minibatches(SUPPORT, 2), QUERY)
    expected = objective(DESCENT, 2)(PARAMS)
    value, direction = nm.reptile(loss, DESCENT)(PARAMS, tasks)
    assert_close(value, expected)
    assert_close(nm.fomaml(loss, DESCENT)(PARAMS, tasks)[0], expected)
    assert_close(nm.fomaml(loss, RULE)(PARAMS, tasks)[0], objective(RULE, 2)(PARAMS))
    # For one rate Reptile is (params - theta) / rate.
    ends = [
        adapted(DESCENT, PARAMS, jax.tree.map(lambda x, i=i: x[i], SUPPORT), 2) for i in range(2)
    ]
    moved = jax.tree.map(lambda p, a, b: (p - (a + b) / 2) / 0.2, PARAMS, *ends)
    assert_close(direction, moved)


def test_evaluate_takes_them_at_every_step():
    tasks = nm.Tasks(nm.Minibatches(SUPPORT, 2), QUERY)
    found = nm.evaluate(jax.random.key(0), PARAMS, loss, DESCENT, tasks, per_step=True)
    assert_close(found.mean[-1], objective(DESCENT, 2)(PARAMS))


@pytest.mark.parametrize(
    ("support", "rule", "message"),
    [
        (nm.Minibatches(SUPPORT, 7), DESCENT, "size of Minibatches must be at most .* 6, got 7"),
        (nm.Minibatches((SUPPORT[0], QUERY[1]), 2), DESCENT, "support in Minibatches"),
        (nm.Minibatches(SUPPORT, 2), nm.Proximal(1.0), "need a rule that takes steps"),
    ],
)
def test_wrong_minibatches_raise(support, rule, message):
    with pytest.raises((TypeError, ValueError), match=message):
        nm.maml_value_and_grad(loss, rule)(PARAMS, nm.Tasks(support, QUERY))
