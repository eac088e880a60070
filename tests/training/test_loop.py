"""The outer loop: its updates, its limit, its stops, and many seeds at once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

import negmaml as nm
from tests.helpers import mostly_slow, z_score
from tests.internals import advance_in_place
from tests.training.tiny import ALGORITHM, BATCH, KEY, PARAMS, loss, same
from tests.training.tiny import tasks as TASKS

ADAM = optax.adam(1e-2)


def run(key=0, steps=6, value_and_grad=ALGORITHM, optimizer=ADAM, **options):
    key = jax.random.key(key) if isinstance(key, int) else key
    return nm.fit(key, PARAMS, value_and_grad, TASKS, optimizer, steps, **options)


def test_fit_is_the_loop_over_optax_updates():
    result = run()
    params, state, losses = PARAMS, ADAM.init(PARAMS), []
    for i in range(6):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), i)
        value, gradient = jax.jit(ALGORITHM)(params, TASKS(key))
        updates, state = ADAM.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(value)
    same(result.params, params, 1e-5)
    same(result.optimizer_state, state, 1e-5)
    same(result.loss, jnp.stack(losses), 1e-5)
    assert int(result.step) == 6 and bool(result.finite)
    assert result.aux is None and result.evaluation is None


def square_loss(w, data):
    X, y = data
    return jnp.mean((X @ w - y) ** 2) / 2


PROBLEM = nm.MixedLinearRegression(p=4, m=12, n_t=6, n_v=4, n_r=6, sigma=0.5, nu=0.7, w0=0.3)


@pytest.mark.parametrize("rate", mostly_slow((-0.3, 0.0, 0.2), 0))
def test_training_on_mixed_linear_regression_meets_the_exact_minimiser_and_its_loss(rate, x64):
    """One draw of tasks for each seed; the expected loss of the result, against simulation."""
    rule, adapt = nm.GradientDescent(rate), nm.GradientDescent(0.2)
    value_and_grad = nm.maml_value_and_grad(square_loss, rule)
    steps, optimizer = 800, optax.sgd(0.15, momentum=0.9, nesterov=True)

    def train(key):
        tasks = nm.tasks.Linear(PROBLEM)(key)
        return nm.fit(key, jnp.zeros(4), value_and_grad, tasks, optimizer, steps).params

    keys = jax.random.split(jax.random.key(5), 100)
    learned = jax.jit(jax.vmap(train))(keys)
    for key, omega in zip(keys[:3], learned, strict=False):
        Phi, r = nm.linear.meta_system(nm.linear.sample(key, PROBLEM), rule)
        np.testing.assert_allclose(omega, np.linalg.lstsq(Phi, r)[0], rtol=1e-6, atol=1e-8)
    distance = jnp.sum((learned - 0.3) ** 2, axis=-1)
    trained = nm.theory.expected_test_loss(PROBLEM, distance, adapt)
    exact = nm.simulate(jax.random.key(6), PROBLEM, rule, adapt, runs=4000).test_loss
    assert abs(z_score(np.asarray(trained), float(exact.mean()))) < 4


@pytest.mark.slow
def test_training_meets_the_theory(x64):
    """Within four standard errors and 1%, the error of the theory at this size."""
    problem = nm.MixedLinearRegression(p=30, m=3, n_t=15, n_v=3, n_r=10, sigma=0.5, nu=0.7)
    train, adapt = nm.GradientDescent(-0.2), nm.GradientDescent(0.2)
    value_and_grad = nm.maml_value_and_grad(square_loss, train)

    def distance(key):
        tasks = nm.tasks.Linear(problem)(key)
        optimizer = optax.sgd(0.02, momentum=0.95, nesterov=True)
        fitted = nm.fit(key, jnp.zeros(30), value_and_grad, tasks, optimizer, 500)
        return jnp.sum(fitted.params**2)

    distances = jax.jit(jax.vmap(distance))(jax.random.split(jax.random.key(8), 200))
    losses = np.asarray(nm.theory.expected_test_loss(problem, distances, adapt))
    predicted = float(nm.theory.test_loss(problem, train, adapt))
    error = losses.std(ddof=1) / losses.size**0.5
    assert abs(losses.mean() - predicted) < 4 * error + 0.01 * predicted
    assert error < 0.02 * predicted


def test_evaluation_uses_another_rule_and_tasks_that_no_step_sees():
    evaluate = nm.maml(loss, nm.GradientDescent(0.01))
    params = {}
    result = run(evaluate=evaluate, evaluate_every=2)
    plain = run(callback=lambda step, _, now: params.update({step: now}), callback_every=2)
    assert result.evaluation.shape == (3,)
    for step, value in zip((2, 4, 6), result.evaluation, strict=True):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 1), step - 1)
        expected = jax.jit(evaluate)(params[step], TASKS(key))
        assert float(value) == pytest.approx(float(expected), rel=1e-5)
    same(result.params, plain.params)  # the evaluation changes nothing
    other = run(evaluate=evaluate, evaluate_every=2, evaluation_tasks=TASKS(jax.random.key(7)))
    assert abs(float(other.evaluation[0] - result.evaluation[0])) > 1e-3


@pytest.mark.slow
def test_auxiliary_output_is_kept_by_step():
    def with_aux(params, data):
        return loss(params, data), {"largest": jnp.max(jnp.abs(data[1]))}

    algorithm = nm.maml_value_and_grad(with_aux, nm.GradientDescent(-0.02), has_aux=True)
    result = run(steps=5, value_and_grad=algorithm)
    assert result.aux["largest"].shape == (5, 4)
    same(result.loss, run(steps=5).loss, 1e-5)


def exploding(params, _):
    """Finite for four steps of sgd(1.0) from zero, then not."""
    return jnp.where(params > 3.5, jnp.nan, -params), jnp.asarray(-1.0)


def nothing(key):
    return key


def test_a_run_stops_at_a_loss_that_is_not_finite_and_keeps_the_last_good_parameters():
    with pytest.warns(RuntimeWarning, match="after 4 of 9 steps.* last finite loss was -3.*Try"):
        result = nm.fit(jax.random.key(0), 0.0, exploding, nothing, optax.sgd(1.0), 9)
    assert not bool(result.finite)
    assert float(result.params) == 3.0 and int(result.step) == 3
    np.testing.assert_array_equal(result.loss, [0, -1, -2, -3, np.nan, *[np.nan] * 4])


def test_a_gradient_that_is_not_finite_stops_too():
    def bad_gradient(params, _):
        return params, jnp.where(params < -1.5, jnp.inf, 1.0)

    with pytest.warns(RuntimeWarning, match="not finite"):
        result = nm.fit(jax.random.key(0), 0.0, bad_gradient, nothing, optax.sgd(1.0), 5)
    assert float(result.params) == -2.0 and int(result.step) == 2 and not bool(result.finite)


def test_after_a_run_that_is_not_finite_the_optimizer_state_is_a_first_one():
    optimizer = optax.sgd(1.0, momentum=0.9)
    with pytest.warns(RuntimeWarning, match="not finite"):
        stopped = nm.fit(jax.random.key(0), 0.0, exploding, nothing, optimizer, 9)
    assert float(stopped.params) > 0 and jax.tree.leaves(stopped.optimizer_state) == [0]


def test_arrays_of_the_caller_survive_although_a_run_reuses_its_own():
    seen = []

    def keep(step, metrics, params):
        seen.append(params)

    options = {"callback": keep, "callback_every": 1}
    result = nm.fit(KEY, PARAMS, ALGORITHM, BATCH, optax.adam(0.1), 3, **options)
    again = [
        nm.fit(KEY, None, ALGORITHM, BATCH, optax.adam(0.1), 2, state=result) for _ in range(2)
    ]
    same(again[0].params, again[1].params, 0)
    same(seen[-1], result.params, 0)
    assert len({float(params["w"]) for params in [PARAMS, *seen]}) == 4


def test_a_run_that_starts_badly_returns_the_start():
    with pytest.warns(RuntimeWarning, match="no loss was finite"):
        result = nm.fit(jax.random.key(0), 9.0, exploding, nothing, optax.sgd(1.0), 2)
    assert float(result.params) == 9.0 and int(result.step) == 0 and not bool(result.finite)


@pytest.mark.parametrize("options", ({}, {"checkpoint_of": "any"}), ids=("", "old name"))
@pytest.mark.parametrize("guard", ("allow", "disallow"))
def test_warnings_point_at_the_call(options, guard):
    key, start = jax.random.key(0), jnp.asarray(9.0)
    with pytest.warns() as warned, jax.transfer_guard(guard):
        nm.fit(key, start, exploding, lambda key: jnp.ones(()), optax.sgd(1.0), 2, **options)
    texts = [str(warning.message) for warning in warned]
    assert any("does not use its key" in text for text in texts)
    assert any("no loss was finite" in text for text in texts)
    assert {warning.filename for warning in warned} == {__file__}


@pytest.mark.filterwarnings("ignore:training stopped")
def test_the_program_of_an_accelerator_computes_the_same(monkeypatch):
    """Branches in every step, or selections in every step and a branch in every few."""
    test = dict(evaluate=lambda w, _: w, evaluate_every=2, patience=1, evaluation_tasks=nothing)

    def cases():
        yield lambda: run(steps=12)
        yield lambda: run(steps=12, callback=lambda *_: None, callback_every=4)
        for start, options in ((0.0, {}), (-9.0, test)):
            descend = optax.sgd(1.0)
            yield lambda start=start, options=options, descend=descend: nm.fit(
                jax.random.key(0), start, exploding, nothing, descend, 12, **options
            )

    expected = [case() for case in cases()]
    assert not bool(expected[2].finite) and bool(expected[3].stopped_early)
    advance_in_place.clear_cache()
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *a, cpu, default: default(*a))
    for case, result in zip(cases(), expected, strict=True):
        same(case(), result, 1e-6)
    advance_in_place.clear_cache()


def test_one_seed_that_diverges_stops_no_other():
    starts = jnp.array([0.0, -20.0])
    result = jax.vmap(
        lambda start: nm.fit(jax.random.key(0), start, exploding, nothing, optax.sgd(1.0), 9)
    )(starts)
    np.testing.assert_array_equal(result.finite, [False, True])
    np.testing.assert_array_equal(result.params, [3.0, -11.0])


@pytest.mark.slow
def test_fit_vmaps_over_seeds_inner_rates_and_learning_rates():
    def one(key, rate, learning_rate):
        algorithm = nm.maml_value_and_grad(loss, nm.GradientDescent(rate))
        return run(key, 4, algorithm, optax.adam(learning_rate))

    keys, rates = jax.random.split(jax.random.key(2), 3), jnp.array([-0.1, 0.0, 0.1])
    many = jax.jit(jax.vmap(one))(keys, rates, jnp.array([1e-3, 1e-2, 0.0]))
    for i, learning_rate in enumerate((1e-3, 1e-2, 0.0)):
        alone = jax.jit(one)(keys[i], float(rates[i]), learning_rate)
        same(jax.tree.map(lambda x, i=i: x[i], many.params), alone.params, 1e-5)
    same(jax.tree.map(lambda x: x[2], many.params), PARAMS, 1e-6)


def test_new_rates_learning_rates_and_seeds_do_not_recompile():
    traces = []

    def noted(params, data):
        traces.append(1)
        return loss(params, data)

    def go(seed, rate, learning_rate):
        algorithm = nm.maml_value_and_grad(noted, nm.GradientDescent(rate))
        optimizer = Partial(optax.adam, learning_rate)
        return run(seed, 3, algorithm, optimizer)

    go(0, 0.1, 1e-3)
    before = len(traces)
    for seed, rate, learning_rate in ((1, 0.1, 1e-3), (0, -0.2, 1e-3), (0, 0.0, 1e-2)):
        go(seed, rate, learning_rate)
    assert len(traces) == before


def test_equal_optimizers_given_twice_compile_once():
    traces = []

    def noted(params, _):
        traces.append(1)
        return params, jnp.ones(())

    def go(start):
        nm.fit(jax.random.key(0), start, noted, nothing, ADAM, 3)
        return len(traces)

    assert go(1.0) == go(2.0)


@pytest.mark.slow
def test_meta_sgd_trains_the_rates():
    """Descent or ascent takes a rate through zero."""
    algorithm, lowest = nm.meta_sgd(loss), []
    meta = nm.MetaSGDParams(PARAMS, jax.tree.map(lambda x: jnp.full(x.shape, 0.01), PARAMS))
    for rate in (1e-2, -1e-2):
        result = nm.fit(jax.random.key(0), meta, algorithm, TASKS, Partial(optax.adam, rate), 20)
        rates = jax.tree.leaves(result.params.rate)
        assert min(abs(float(x) - 0.01) for x in rates) > 1e-3
        lowest.append(min(map(float, rates)))
    assert min(lowest) < 0


def test_invalid_arguments_raise_with_their_names():
    with pytest.raises(ValueError, match="steps must be an integer of at least 1"):
        run(steps=0)
    with pytest.raises(TypeError, match="floating point"):
        nm.fit(jax.random.key(0), jnp.array(3), exploding, nothing, ADAM, 2)
    with pytest.raises(TypeError, match=r"optax\.GradientTransformation"):
        run(optimizer=0.1)
    with pytest.raises(ValueError, match="evaluate and evaluate_every go together"):
        run(evaluate=nm.maml(loss, nm.GradientDescent(0.1)))
    with pytest.raises(ValueError, match="evaluate_every must be an integer"):
        run(evaluate=nm.maml(loss, nm.GradientDescent(0.1)), evaluate_every=0)
    with pytest.raises(TypeError, match="leave them out inside jit"):
        jax.vmap(lambda key: run(key, progress=True))(jax.random.split(jax.random.key(0), 2))
