"""Evolution strategies: unbiased for smoothed objectives, and persistent ones over truncations."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import negmaml as nm
from tests.helpers import mostly_slow, z_score

KEY = jax.random.key(7)
KEYS = jax.random.split(KEY, 300)
TASKS = nm.Tasks(jnp.array([0.0, 1.0]), jnp.array([0.5, -1.0]))


def square(w, target):
    return jnp.sum((w - target) ** 2) / 2


def estimates(algorithm, params, keys=KEYS):
    """Independent estimates of the gradient."""
    return jax.jit(jax.vmap(lambda key: algorithm(params, TASKS, key)[1]))(keys)


def quadratic(params, tasks):
    x = jnp.concatenate([params["a"], params["b"][None]])
    A = jnp.array([[2.0, 0.5, 0.0], [0.5, -1.0, 0.3], [0.0, 0.3, 0.0]])
    return x @ A @ x / 2 + jnp.sum(x)


@pytest.mark.parametrize("antithetic", (True, False))
def test_it_is_unbiased_for_a_quadratic_of_any_curvature(antithetic):
    params = {"a": jnp.array([0.3, -2.0]), "b": jnp.asarray(0.5)}
    estimate = nm.evolution_strategies(quadratic, sigma=0.7, samples=8, antithetic=antithetic)
    expected = jax.grad(quadratic)(params, TASKS)
    found = estimates(estimate, params)
    columns = jnp.column_stack([found["a"], found["b"]])
    for values, predicted in zip(columns.T, (*expected["a"], expected["b"]), strict=True):
        assert abs(z_score(values, predicted)) < 4


def test_a_step_function_has_the_gradient_of_its_smoothed_form():
    """d/dx P(x + sigma e > 0) is the normal density of x / sigma over sigma."""

    def wins(x, tasks):
        return jnp.where(x > 0, 1.0, 0.0)

    found = estimates(nm.evolution_strategies(wins, sigma=0.5, samples=16), jnp.asarray(0.4))
    density = np.exp(-(0.8**2) / 2) / np.sqrt(2 * np.pi) / 0.5
    assert abs(z_score(found, density)) < 4 and found.std() > 0


@pytest.mark.parametrize("rate", mostly_slow((-0.4, 0.0, 0.3), 0))
def test_the_gradient_in_the_rule_is_that_of_the_smoothed_objective(rate):
    """One step leaves a quadratic in the rate, so smoothing does not change its derivative."""
    rule = nm.GradientDescent(jnp.asarray(rate))
    pair = nm.ParamsAndRule(jnp.asarray(1.5), rule)
    estimate = nm.evolution_strategies(nm.maml(square, rule), sigma=0.2, samples=8, wrt="rule")
    gradient = estimates(estimate, pair)
    assert gradient.params is None
    expected = nm.maml_value_and_grad(square, rule, wrt="rule")(pair, TASKS)[1]
    assert abs(z_score(gradient.rule.rate, float(expected.rule.rate))) < 4


def test_noise_has_an_address_and_is_common_to_all_tasks():
    objective = nm.maml(square, nm.GradientDescent(0.1))
    make = partial(nm.evolution_strategies, objective, sigma=0.3, samples=14)
    whole = make()(1.0, TASKS, KEY)
    for size in (1, 3):  # in blocks of samples
        np.testing.assert_allclose(make(batch_size=size)(1.0, TASKS, KEY), whole, rtol=1e-5)
    each = [make()(1.0, jax.tree.map(lambda x, i=i: x[i : i + 1], TASKS), KEY) for i in range(2)]
    np.testing.assert_allclose(np.mean(each, 0), whole, rtol=1e-5)


def test_fit_gives_each_step_a_key_and_devices_share_it():
    rule = nm.GradientDescent(0.1)
    pair = nm.ParamsAndRule(jnp.ones(2), rule)
    loss = lambda w, target: square(w, target)  # noqa: E731
    estimate = nm.evolution_strategies(nm.maml(loss, rule), sigma=0.1, samples=4, wrt="both")
    run = partial(nm.fit, KEY, pair, estimate, TASKS, optax.sgd(0.05))
    whole, first = run(4), run(2)
    assert len(np.unique(whole.loss)) == 4
    for other in (run(2, state=first), run(4, mesh=jax.devices()[:2])):
        for a, b in zip(*map(jax.tree.leaves, (other.params, whole.params)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)
    compiled = jax.jit(lambda e: e(pair, TASKS, KEY))
    for sigma in (0.1, 0.2):
        compiled(nm.evolution_strategies(nm.maml(loss, rule), sigma=sigma, samples=4, wrt="both"))
    assert compiled._cache_size() == 1


@pytest.mark.slow
def test_a_module_keeps_its_form_and_its_random_stream_advances():
    nnx = pytest.importorskip("flax.nnx")

    class Noisy(nnx.Module):
        def __init__(self, rngs):
            self.w, self.rngs = nnx.Param(jnp.ones(())), rngs

        def __call__(self, target):
            return (self.w[...] - target + jax.random.normal(self.rngs.noise())) ** 2

    module = Noisy(nnx.Rngs(noise=0))
    objective = nm.maml(lambda module, data: module(data), nm.GradientDescent(0.1))
    estimate = nm.evolution_strategies(objective, sigma=0.1, samples=64)
    value, gradient = estimate(module, TASKS, KEY)
    assert jax.tree.structure(gradient) == jax.tree.structure(nnx.state(module, nnx.Param))
    again = estimate(module, TASKS, KEY)[0]
    assert float(value) != float(again)  # other numbers of the module


# Persistent evolution strategies: w_t = (1 - r - sigma e_t) w_{t-1}, one step to a truncation.
RATE, SIGMA, STEPS = 0.3, 0.2, 3


def closed_form(t):
    """d/dr of E w_t^2 / 2, a product of t independent factors E (1 - r - sigma e)^2."""
    return -t * (1 - RATE) * ((1 - RATE) ** 2 + SIGMA**2) ** (t - 1)


def cycle(method, key, start, tasks, steps=STEPS):
    """Gradients in the rule of all truncations of an inner problem, at a fixed rule."""
    found = []
    for k in range(steps):
        _, gradient = method(start, tasks, jax.random.fold_in(key, k))
        start = start._replace(state=gradient.state)
        found.append(gradient.params.rule)
    return found


def test_persistent_estimates_are_unbiased_where_those_of_truncations_are_biased():
    tasks = nm.Tasks(jnp.zeros(1), jnp.zeros(1))
    rule = nm.GradientDescent(jnp.asarray(RATE), STEPS)
    method, init = nm.persistent_evolution_strategies(
        square, rule, truncation=1, sigma=SIGMA, samples=16
    )
    start = init(nm.ParamsAndRule(jnp.asarray(1.0), rule), tasks)
    run = jax.jit(
        jax.vmap(lambda key: jnp.stack([r.rate for r in cycle(method, key, start, tasks)]))
    )
    found = run(KEYS)
    truncated = closed_form(1) * ((1 - RATE) ** 2 + SIGMA**2) ** np.arange(STEPS)
    for t in range(STEPS):
        assert abs(z_score(found[:, t], closed_form(t + 1))) < 4
    # The direct effect of the last truncation only is a third of its derivative.
    assert abs(z_score(found[:, -1], truncated[-1])) > 10


@nm.pytree
class Leaky(nm.InnerRule):
    """Momentum with numbers by step, whose state must continue over truncations."""

    rate: Any
    decay: float
    steps: int = nm.static(default=4)

    def init(self, params):
        return jax.tree.map(jnp.zeros_like, params)

    def update(self, gradient, state, params):
        state = jax.tree.map(lambda v, g: self.decay * v + g, state, gradient)
        return jax.tree.map(lambda w, v: w - self.rate * v, params, state), state


def test_truncations_continue_the_inner_problem_with_its_tasks():
    """With small perturbations, values are those of the rule of all steps so far."""
    rule = Leaky(nm.Schedule([0.1, -0.05, 0.2, 0.3]), 0.5)
    method, init = nm.persistent_evolution_strategies(
        square, rule, truncation=2, sigma=1e-4, samples=2
    )
    point = init(nm.ParamsAndRule(jnp.asarray(1.0), rule), TASKS)
    other = jax.tree.map(lambda x: x + 1, TASKS)
    values = []
    for k, tasks in enumerate((TASKS, other, other)):
        value, gradient = method(point, tasks, jax.random.fold_in(KEY, k))
        point = point._replace(state=gradient.state)
        values.append(value)
    expected = [
        nm.maml(square, Leaky(rule.rate, 0.5, steps))(1.0, tasks)
        for steps, tasks in ((2, TASKS), (4, TASKS), (2, other))
    ]
    np.testing.assert_allclose(values, expected, rtol=1e-3)
    assert int(point.state.truncations) == 1


def test_each_step_takes_its_own_minibatch():
    rows = jnp.array([[0.0, 1.0, 3.0], [2.0, -1.0, 0.5]])
    tasks, rule = nm.Tasks(nm.Minibatches(rows, size=1), rows), nm.GradientDescent(0.3, 4)
    method, init = nm.persistent_evolution_strategies(
        square, rule, truncation=2, sigma=1e-6, samples=2
    )
    point, values = init(nm.ParamsAndRule(1.0, rule), tasks), []
    for _ in range(2):
        value, gradient = method(point, tasks, KEY)
        point = point._replace(state=gradient.state)
        values.append(value)
    expected = [nm.maml(square, nm.GradientDescent(0.3, steps))(1.0, tasks) for steps in (2, 4)]
    np.testing.assert_allclose(values, expected, rtol=1e-4)


@pytest.mark.slow
def test_fit_trains_a_rule_by_truncations_and_resumes():
    rule = nm.GradientDescent(jnp.asarray(0.1), 4)
    tasks = nm.Tasks(jnp.zeros(2), jnp.zeros(2))
    method, init = nm.persistent_evolution_strategies(
        square, rule, truncation=2, sigma=0.05, samples=16
    )
    start = init(nm.ParamsAndRule(jnp.ones(3), rule), tasks)
    run = partial(nm.fit, KEY, start, method, tasks, optax.adam(0.05))
    result, first = run(20), run(9)
    again = run(11, state=first)
    np.testing.assert_allclose(again.params.params.rule.rate, result.params.params.rule.rate)
    assert result.loss[-2:].mean() < 0.5 * result.loss[:2].mean()
    np.testing.assert_array_equal(result.params.params.params, jnp.ones(3))  # only the rule trains
