"""The evaluation on fresh tasks is the mean over tasks of the loss after adaptation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import negmaml as nm
from tests.helpers import mostly_slow
from tests.training.tiny import PARAMS, loss
from tests.training.tiny import tasks as TASKS

KEY = jax.random.key(2)


def is_close(params, data):
    x, y = data
    return jnp.mean(jnp.abs(params["w"] * x + params["v"] - y) < 0.5)


draw = jax.jit(TASKS)


def drawn(count):
    tasks = [draw(jax.random.fold_in(KEY, i)) for i in range(-(-count // 4))]
    return jax.tree.map(lambda *x: jnp.concatenate(x)[:count], *tasks)


@pytest.mark.parametrize("mask", mostly_slow((None, {"w": False, "v": True}), 1))
def test_values_after_every_step_are_those_of_adapting(mask):
    tasks = drawn(6)
    rule = nm.GradientDescent(nm.Schedule([0.02, -0.01]), 3)  # the last value once more
    result = nm.evaluate(KEY, PARAMS, loss, rule, TASKS, episodes=6, per_step=True, mask=mask,
                         metric=is_close)  # fmt: skip
    assert result.values.shape == (4, 6)
    rates = [0.02, -0.01, -0.01]
    for k in range(4):
        own = nm.GradientDescent(nm.Schedule(rates[:k] or [0.0]), max(k, 1))

        def one(support, query, own=own):
            return is_close(nm.adapt(loss, PARAMS, support, own, mask=mask), query)

        np.testing.assert_allclose(result.values[k], jax.jit(jax.vmap(one))(*tasks), atol=1e-6)
    last = nm.evaluate(KEY, PARAMS, loss, rule, drawn(6), mask=mask, metric=is_close)
    np.testing.assert_allclose(last.values, result.values[-1], atol=1e-6)


def test_mean_and_interval_are_those_of_the_tasks():
    result = nm.evaluate(KEY, PARAMS, loss, optax.sgd(0.01), TASKS, episodes=10)
    expected = jax.jit(nm.maml(loss, nm.GradientDescent(0.01)))(PARAMS, drawn(10))
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


def test_an_implicit_rule_is_evaluated():
    """The proximal point of least squares in (w, v), by NumPy."""
    rule, tasks = nm.Proximal(2.0), drawn(4)
    result = nm.evaluate(KEY, PARAMS, loss, rule, TASKS, episodes=4)
    start, values = np.array([PARAMS["w"], PARAMS["v"]]), []
    for i in range(4):
        (x, y), query = jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), tuple(tasks))
        rows = np.stack([x, np.ones_like(x)], 1)
        normal = 2 * rows.T @ rows / len(x) + 2 * np.eye(2)
        w, v = np.linalg.solve(normal, 2 * rows.T @ y / len(x) + 2 * start)
        values.append(np.mean((w * query[0] + v - query[1]) ** 2))
    np.testing.assert_allclose(result.values, values, rtol=1e-3, atol=1e-5)
    assert float(result.unconverged) == 0


def test_a_model_with_state_is_evaluated():
    def centred(params, mean, data):
        x, y = data
        return loss(params, (x - mean, y)), 0.5 * mean + 0.5 * x.mean()

    start, rule = nm.Stateful(PARAMS, jnp.asarray(0.3)), nm.GradientDescent(0.01, 2)
    result = nm.evaluate(KEY, start, centred, rule, TASKS, episodes=4, per_step=True)
    expected = jax.jit(nm.maml(centred, rule))(start, drawn(4))
    assert float(result.mean[-1]) == pytest.approx(float(expected), rel=1e-4)


def test_invalid_arguments_raise_with_their_names():
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


BOTH = {"close": is_close, "loss": loss}


@pytest.mark.parametrize("per_step", (False, True))
def test_several_metrics_are_those_of_separate_calls(per_step):
    rule = nm.GradientDescent(0.02, 2)
    both = nm.evaluate(KEY, PARAMS, loss, rule, TASKS, episodes=6, metric=BOTH, per_step=per_step)
    for name, metric in BOTH.items():
        own = nm.evaluate(
            KEY, PARAMS, loss, rule, TASKS, episodes=6, metric=metric, per_step=per_step
        )
        np.testing.assert_allclose(both.values[name], own.values, rtol=1e-6)
        for statistic in ("mean", "interval", "median", "diverged"):
            np.testing.assert_allclose(
                getattr(both, statistic)[name], getattr(own, statistic), rtol=1e-5
            )
    assert all(name in repr(both) for name in BOTH)
    assert len(repr(both).splitlines()) == (5 if per_step else 3)


def test_the_loss_of_a_model_with_state_is_among_the_metrics():
    def stateful(params, mean, data):
        return loss(params, data) + mean, mean

    def size(params, mean, data):
        return params["w"] * mean

    start, rule = nm.Stateful(PARAMS, jnp.asarray(0.5)), nm.GradientDescent(0.0)
    found = nm.evaluate(
        KEY, start, stateful, rule, drawn(4), metric={"loss": stateful, "size": size}
    )
    alone = nm.evaluate(KEY, start, stateful, rule, drawn(4))
    np.testing.assert_allclose(found.values["loss"], alone.values, rtol=1e-6)
    np.testing.assert_allclose(found.values["size"], 0.15, rtol=1e-6)


@pytest.mark.parametrize("bad", (np.nan, np.inf))
def test_one_diverged_task_leaves_median_and_print_useful(bad):
    values = np.array([1.0, 2.0, 3.0, 10.0, bad], np.float32)
    result = nm.training.Evaluation(jnp.asarray(values))
    assert not np.isfinite(result.mean)
    assert float(result.median) == 2.5 and float(result.diverged) == pytest.approx(0.2)
    half = 1.96 * values[:4].std(ddof=1) / 2
    assert f"4 ± {half:.2g} without 0.2 of tasks, which diverged" in repr(result)
    nothing = nm.training.Evaluation(jnp.full(3, bad))
    assert np.isnan(nothing.median) and "nan" in repr(nothing)


@pytest.mark.parametrize("metric", ({}, {1: is_close}, {"": is_close}, {"a": 3}, [is_close]))
def test_metrics_that_are_no_functions_by_name_raise(metric):
    with pytest.raises((TypeError, ValueError), match="metric"):
        nm.evaluate(KEY, PARAMS, loss, nm.GradientDescent(0.1), TASKS, metric=metric)
