"""Inner parameters continue from outer step to outer step, and save steps of the solver."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import negmaml as nm

RNG = np.random.default_rng(0)


def regression(rows):
    X = RNG.standard_normal((2, rows, 5)).astype(np.float32)
    return X, X.sum(-1) + RNG.standard_normal((2, rows)).astype(np.float32)


TASKS = nm.Tasks(regression(10), regression(30))
PARAMS = {"w": jnp.zeros(5), "log_decay": jnp.full(5, -2.0)}
MASK = {"w": True, "log_decay": False}
SOLVER = nm.Implicit(nm.GradientDescent(0.2, steps=2000), tolerance=1e-7, absolute_tolerance=1e-4)


def loss(params, data):
    X, y = data
    return jnp.mean((X @ params["w"] - y) ** 2) / 2


def inner(params, data):
    return loss(params, data) + jnp.sum(jnp.exp(params["log_decay"]) * params["w"] ** 2) / 2


def warm(rule=SOLVER, tasks=2, **options):
    return nm.warm_start(loss, rule, inner_loss=inner, mask=MASK, tasks=tasks, **options)


def task(i):
    return jax.tree.map(lambda x: x[i], TASKS)


def test_gradient_is_that_of_a_cold_start_and_solutions_are_kept():
    value_and_grad, init = warm()
    model = init(PARAMS)
    assert model.state["w"].shape == (2, 5) and model.state["log_decay"] is None
    expected = nm.maml_value_and_grad(loss, SOLVER, inner_loss=inner, mask=MASK)(PARAMS, TASKS)
    for _ in range(2):  # from zero, and from the solution
        value, (gradient, solution) = value_and_grad(model, TASKS)
        np.testing.assert_allclose(value, expected[0], rtol=1e-3)
        np.testing.assert_allclose(gradient["log_decay"], expected[1]["log_decay"], rtol=1e-2)
        for i in range(2):
            alone = nm.adapt(inner, PARAMS, task(i).support, SOLVER, mask=MASK)
            np.testing.assert_allclose(solution["w"][i], alone["w"], rtol=1e-3, atol=1e-4)
        model = nm.Stateful(model.params, solution)


def test_a_rule_that_steps_continues_and_is_differentiated_through_its_own_steps():
    rule = nm.GradientDescent(0.1, steps=3)
    value_and_grad, init = warm(rule, method="reverse")
    model = init(PARAMS)
    for _ in range(2):
        value, (gradient, new) = value_and_grad(model, TASKS)

        def total(hyper, model=model):
            def of_task(i):
                start = {"w": model.state["w"][i], "log_decay": hyper}
                theta = nm.adapt(inner, start, task(i).support, rule, mask=MASK)
                return loss(theta, task(i).query)

            return (of_task(0) + of_task(1)) / 2

        expected = jax.value_and_grad(total)(model.params["log_decay"])
        np.testing.assert_allclose(value, expected[0], rtol=1e-5)
        np.testing.assert_allclose(gradient["log_decay"], expected[1], rtol=1e-4)
        model = nm.Stateful(model.params, new)
    six = nm.adapt(inner, PARAMS, task(0).support, nm.GradientDescent(0.1, 6), mask=MASK)
    np.testing.assert_allclose(model.state["w"][0], six["w"], rtol=1e-4)


def test_a_warm_start_saves_steps_of_the_solver():
    value_and_grad, init = warm()
    step = jax.jit(value_and_grad)

    @jax.jit
    def steps_from(start, hyper):
        params, own = {"w": start, "log_decay": hyper}, task(0).support
        return nm.adapt(inner, params, own, SOLVER, mask=MASK, return_info=True)[1].steps

    model, cold_steps, warm_steps = init(PARAMS), 0, 0
    for _ in range(10):
        hyper = model.params["log_decay"]
        cold_steps += int(steps_from(PARAMS["w"], hyper))
        warm_steps += int(steps_from(model.state["w"][0], hyper))
        _, (gradient, new) = step(model, TASKS)
        hyper = jax.tree.map(lambda p, g: p - 0.3 * g, model.params, gradient)
        model = nm.Stateful(hyper, new)
    assert warm_steps < cold_steps / 2


def test_fit_trains_hyperparameters_and_keeps_the_solutions():
    value_and_grad, init = warm()
    start = init(PARAMS)
    found = nm.fit(jax.random.key(0), start, value_and_grad, TASKS, optax.adam(0.1), 20)
    before, after = (value_and_grad(model, TASKS)[0] for model in (start, found.params))
    assert after < before - 1e-3
    alone = {"w": PARAMS["w"], "log_decay": found.params.params["log_decay"]}
    solution = nm.adapt(inner, alone, task(1).support, SOLVER, mask=MASK)["w"]
    np.testing.assert_allclose(found.params.state["w"][1], solution, rtol=0.05, atol=0.05)


def test_another_number_of_tasks_raises():
    value_and_grad, init = warm(tasks=3)
    with pytest.raises(ValueError, match=r"tasks must hold 3 tasks.*got 2"):
        value_and_grad(init(PARAMS), TASKS)
