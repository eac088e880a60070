"""The test over fresh tasks is the mean of what adapting gives on each."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import negmaml as nm

TASKS = nm.tasks.Sinusoid(m=4, n_t=3, n_v=3)
PARAMS = {"w": jnp.full((1, 4), 0.3), "v": jnp.linspace(-1, 1, 4)[:, None]}
KEY = jax.random.key(2)


def loss(params, data):
    x, y = data
    return jnp.mean((jnp.sin(x @ params["w"]) @ params["v"] - y) ** 2)


def within_one(params, data):
    x, y = data
    return jnp.mean(jnp.abs(jnp.sin(x @ params["w"]) @ params["v"] - y) < 1)


def drawn(count):
    tasks = [TASKS(jax.random.fold_in(KEY, i)) for i in range(-(-count // 4))]
    return jax.tree.map(lambda *x: jnp.concatenate(x)[:count], *tasks)


@pytest.mark.parametrize("mask", (None, {"w": False, "v": True}))
def test_values_after_every_step_are_those_of_adapting(mask):
    tasks = drawn(6)
    rule = nm.GradientDescent(nm.Schedule([0.02, -0.01]), 3)  # the last value once more
    result = nm.evaluate(KEY, PARAMS, loss, rule, TASKS, episodes=6, per_step=True, mask=mask,
                         metric=within_one)  # fmt: skip
    assert result.values.shape == (4, 6)
    rates = [0.02, -0.01, -0.01]
    for k in range(4):
        own = nm.GradientDescent(nm.Schedule(rates[:k] or [0.0]), max(k, 1))

        def one(support, query, own=own):
            return within_one(nm.adapt(loss, PARAMS, support, own, mask=mask), query)

        np.testing.assert_allclose(result.values[k], jax.jit(jax.vmap(one))(*tasks), atol=1e-6)
    last = nm.evaluate(KEY, PARAMS, loss, rule, drawn(6), mask=mask, metric=within_one)
    np.testing.assert_allclose(last.values, result.values[-1], atol=1e-6)


def test_mean_and_interval_are_those_of_the_tasks():
    result = nm.evaluate(KEY, PARAMS, loss, optax.sgd(0.01), TASKS, episodes=10)
    expected = nm.maml(loss, nm.GradientDescent(0.01))(PARAMS, drawn(10))
    values = np.asarray(result.values)
    assert float(result.mean) == pytest.approx(float(expected), rel=1e-5)
    error = values.std(ddof=1) / 10**0.5
    assert float(result.standard_error) == pytest.approx(error, rel=1e-5)
    assert float(result.interval) == pytest.approx(1.96 * error, rel=1e-4)
    assert "10 tasks" in repr(result) and "±" in repr(result) and "<table>" in result._repr_html_()


def test_the_interval_covers_the_mean_as_often_as_it_says():
    """On a loss that is a normal number: 95% of 400 intervals, up to four standard errors."""

    def once(key):
        loss, rule = lambda w, z: z + 0 * w[0], nm.GradientDescent(0.0)
        tasks = lambda key: (jax.random.normal(key, (30,)),) * 2  # noqa: E731
        return nm.evaluate(key, jnp.zeros(1), loss, rule, tasks, episodes=30)

    results = jax.jit(jax.vmap(once))(jax.random.split(KEY, 400))
    covered = np.mean(np.abs(results.mean) < results.interval)
    assert abs(covered - 0.943) < 4 * (0.05 * 0.95 / 400) ** 0.5  # Student's 29 degrees of freedom


def test_implicit_rules_and_models_with_state_are_evaluated():
    rule = nm.Proximal(2.0)
    result = nm.evaluate(KEY, PARAMS, loss, rule, TASKS, episodes=4)
    expected = jax.jit(nm.maml(loss, rule))(PARAMS, drawn(4))
    assert float(result.mean) == pytest.approx(float(expected), rel=1e-4)

    def centred(params, mean, data):
        x, y = data
        return loss(params, (x - mean, y)), 0.5 * mean + 0.5 * x.mean()

    start, rule = nm.Stateful(PARAMS, jnp.asarray(0.3)), nm.GradientDescent(0.01, 2)
    result = nm.evaluate(KEY, start, centred, rule, TASKS, episodes=4, per_step=True)
    expected = jax.jit(nm.maml(centred, rule))(start, drawn(4))
    assert float(result.mean[-1]) == pytest.approx(float(expected), rel=1e-4)


def test_bad_input_is_named():
    rule = nm.GradientDescent(0.1)
    with pytest.raises(ValueError, match="episodes must be an integer of at least 1"):
        nm.evaluate(KEY, PARAMS, loss, rule, TASKS, episodes=0)
    with pytest.raises(TypeError, match="key must be a random key"):
        nm.evaluate(0, PARAMS, loss, rule, TASKS)
    with pytest.raises(TypeError, match="per_step needs a rule that takes steps"):
        nm.evaluate(KEY, PARAMS, loss, nm.Proximal(1.0), TASKS, per_step=True)
    with pytest.raises(ValueError, match="metric must return one real number"):
        nm.evaluate(KEY, PARAMS, loss, rule, TASKS, metric=lambda p, d: d[1])
    with pytest.raises(TypeError, match="metric must be a function"):
        nm.evaluate(KEY, PARAMS, loss, rule, TASKS, metric="accuracy")
