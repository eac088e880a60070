"""Errors of calls that do not fit a signature, and of names that a module does not have."""

import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import negmaml as nm
from negmaml import theory

KEY = jax.random.key(0)
SIZES = dict(p=3, m=2, n_t=2, n_v=4, n_r=2)
PROBLEM = nm.MixedLinearRegression(**SIZES, sigma=0.5, nu=1.0)
STEP = nm.GradientDescent(0.1)
SINUSOID = nm.tasks.Sinusoid(m=2, n_t=2, n_v=2)
RESULT = nm.FitResult(1.0, None, jnp.ones(2), None, None, 2, True, False)


def loss(w, data):
    return jnp.mean((data[0] @ w - data[1]) ** 2)


# Mistakes of newcomers, and what the error names.
CALLS = [
    (lambda: nm.GradientDescent(lr=0.1), "did you mean 'rate'"),
    (lambda: nm.GradientDescent(learning_rate=0.1), "did you mean 'rate'"),
    (lambda: nm.GradientDescent(alpha="a"), "did you mean 'rate'"),
    (lambda: nm.GradientDescent(0.1, n_steps=3), "did you mean 'steps'"),
    (lambda: nm.GradientDescent(0.1, momentum=0.9), "unknown argument 'momentum'"),
    (lambda: nm.GradientDescent(0.1, rate=0.1), "'rate' twice"),
    (lambda: nm.GradientDescent(), r"is missing rate. Write GradientDescent\(rate, steps=...\)"),
    (lambda: nm.GradientDescent(0.1, 3, 4), "at most 2 positional arguments, got 3"),
    (lambda: nm.Momentum(0.1, beta=0.9, steps=2), "did you mean 'momentum'"),
    (lambda: nm.Momentum(0.1, 0.9), "missing steps"),
    (lambda: nm.Proximal(lam=1.0), "did you mean 'strength'"),
    (lambda: nm.Implicit(solver=optax.sgd(0.1)), "did you mean 'inner'"),
    (lambda: nm.InnerOptimizer(optax.adam), r"call it, as in adam\(0.1\)"),
    (lambda: nm.Schedule(0.1, 0.2), r"Write Schedule\(values\)"),
    (lambda: nm.MixedLinearRegression(nt=30, p=6, m=2), "did you mean 'n_t'"),
    (lambda: nm.MixedLinearRegression(6, 2, 3, 2, 3), "missing sigma, nu"),
    (lambda: nm.MixedLinearRegression(**SIZES, Sigma=1.0), "did you mean 'input_covariance'"),
    (lambda: nm.simulate(KEY, PROBLEM, STEP, STEP, 100),
     "at most 4 positional arguments, got 5; keyword-only are runs, meta_ridge"),
    (lambda: nm.simulate(KEY, PROBLEM, STEP), "missing adapt"),
    (lambda: nm.simulate(KEY, PROBLEM, STEP, STEP, n_runs=9), "did you mean 'runs'"),
    (lambda: nm.simulate(KEY, PROBLEM, STEP, STEP, seed=9), "did you mean 'key'"),
    (lambda: nm.simulate(PROBLEM, KEY, STEP, STEP), "check the order of the arguments"),
    (lambda: nm.simulate(KEY, STEP, STEP, PROBLEM), "problem must be a MixedLinearRegression"),
    (lambda: nm.simulate(0, PROBLEM, STEP, STEP), r"write key=jax.random.key\(0\)$"),
    (lambda: nm.linear.sample(PROBLEM, KEY), "check the order of the arguments"),
    (lambda: theory.test_loss(PROBLEM, 0.1, 0.2), r"for a rate write GradientDescent\(0.1\)"),
    (lambda: theory.test_loss(PROBLEM, STEP), "missing adapt"),
    (lambda: theory.test_loss(PROBLEM, STEP, STEP, 0.5), "keyword-only are method, meta_ridge"),
    (lambda: theory.test_loss(PROBLEM, STEP, STEP, ridge=1.0), "did you mean 'meta_ridge'"),
    (lambda: theory.best_allocation(100), "missing problem"),
    (lambda: theory.phase_diagram(10, nt=5), "did you mean 'n_t'"),
    (lambda: theory.phase_diagram(PROBLEM), "missing m, n_t, n_v, sigma, nu"),
    (lambda: theory.stationary_train_rates(3), "missing n_t"),
    (lambda: nm.fit(KEY, 0.0, loss, SINUSOID, optax.sgd(0.1), iterations=5), "mean 'steps'"),
    (lambda: nm.fit(KEY, 0.0, loss, SINUSOID, optax.sgd(0.1), 5, 100), "keyword-only are epochs"),
    (lambda: nm.evaluate(KEY, 0.0, loss, STEP, SINUSOID, n_episodes=5), "mean 'episodes'"),
    (lambda: nm.evaluate(KEY, 0.0, loss, STEP, SINUSOID, 5), "keyword-only are metric, episodes"),
    (lambda: nm.adapt(loss, 0.0, STEP), "missing rule"),
    (lambda: nm.adapt(loss, 0.0, (), STEP, steps=5), "did you mean 'rule'"),
    (lambda: nm.maml(loss), "missing rule"),
    (lambda: nm.maml(loss, STEP, first_order=True), "negmaml.fomaml is MAML of first order"),
    (lambda: nm.maml_value_and_grad(loss, inner_lr=0.1), "did you mean 'rule'"),
    (lambda: nm.meta_sgd(loss, 1, 2), "positional argument, got 3"),
    (lambda: nm.reptile(loss), "missing rule"),
    (lambda: nm.tasks.Sinusoid(m=3, n_t=2), "missing n_v"),
    (lambda: nm.tasks.Sinusoid(batch_size=3, n_t=2, n_v=2), "did you mean 'm'"),
    (lambda: SINUSOID(), r"Write Sinusoid\(\.\.\.\)\(key\)"),
    (lambda: nm.kernels.meta_train(SINUSOID), "missing tasks, rule"),
    (lambda: nm.advise(np.ones((9, 2)), np.ones(9)), "missing groups"),
    (lambda: nm.advise(np.ones((9, 2)), np.ones(9), np.ones(9), seed=3), "did you mean 'key'"),
    (lambda: nm.sweep(nm.sweeps.linear, {"p": 20}, seed=3), "did you mean 'seeds'"),
    (lambda: nm.sweep("linear", {"p": 20}), "missing seeds"),
    (lambda: nm.verify(KEY, PROBLEM, STEP, STEP), "keyword-only are key, runs"),
    (lambda: nm.theory.weight_error(PROBLEM, nm.GradientDescent),
     r"that is a class: write GradientDescent\(\.\.\.\)"),
    (lambda: nm.evaluate(KEY, 0.0, nm.maml(loss, STEP), STEP, SINUSOID), "got a meta-algorithm"),
    (lambda: nm.evaluate(KEY, RESULT, loss, STEP, SINUSOID), r"pass its attribute params"),
    (lambda: nm.adapt(loss, RESULT, (), STEP), r"must be the parameters, got a FitResult"),
    (lambda: nm.MetaRegressor(alpha=2), "did you mean 'train_rate'"),
    (lambda: nm.load("x", 3, 4), "keyword-only are step, best"),
]  # fmt: skip


def test_wrong_calls_name_the_right_form():
    for call, said in CALLS:
        with pytest.raises(TypeError, match=said):
            call()


def test_a_loss_in_place_of_an_algorithm_is_named():
    with pytest.raises(TypeError) as raised:
        nm.fit(KEY, jnp.ones(3), lambda w, data: jnp.mean(w * data[0]), SINUSOID, optax.sgd(0.1), 5)
    assert "pass maml_value_and_grad(loss, rule)" in raised.value.__notes__[0]


NAMES = [
    ("theory", "testloss", "test_loss"), ("theory", "best_rate", "best_rates"),
    ("", "simulat", "simulate"), ("", "gradientdescent", "GradientDescent"), ("", "MAML", "maml"),
    ("tasks", "Sinusiod", "Sinusoid"), ("kernels", "metatrain", "meta_train"),
    ("rules", "GradientDecent", "GradientDescent"), ("advice", "Advise", "advise"),
    ("sweeps", "Sweep", "sweep"), ("training", "fitt", "fit"), ("meta", "mml", "maml"),
    ("problem", "MixedLinearRegresion", "MixedLinearRegression"), ("linear", "simulat", "simulate"),
]  # fmt: skip


def test_a_name_that_is_wrong_names_the_nearest():
    for package, name, right in NAMES:
        found = getattr(nm, package) if package else nm
        with pytest.raises(AttributeError, match=f"'{name}'; did you mean '{right}'"):
            getattr(found, name)
    with pytest.raises(AttributeError, match=r"no attribute 'nothing_like_it'$"):
        _ = nm.nothing_like_it


def test_an_attribute_of_a_rule_is_suggested_by_python():
    with pytest.raises(AttributeError) as caught:
        _ = STEP.rat
    assert caught.value.name == "rat" and caught.value.obj is STEP


def test_an_error_within_a_call_stays_as_it_is():
    def wrong(w, data):
        return loss(w)

    with pytest.raises(TypeError, match=r"loss\(\) missing 1 required positional argument"):
        nm.adapt(wrong, jnp.zeros(2), (jnp.ones((3, 2)), jnp.ones(3)), STEP)


def test_signatures_and_pickles_are_those_of_the_functions():
    assert list(inspect.signature(nm.GradientDescent).parameters) == ["rate", "steps"]
    assert list(inspect.signature(nm.fit).parameters)[:3] == ["key", "params", "value_and_grad"]
    for value in (STEP, PROBLEM, SINUSOID, nm.theory.test_loss, nm.fit):
        assert type(pickle.loads(pickle.dumps(value))) is type(value)
