"""Momentum, preconditioning, schedules, and rules of a user's own, on both kinds of model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import negmaml as nm
from negmaml.rules import flat_batch
from tests.helpers import mostly_slow

X = np.array([0.0, 0.3, 1.1, 2.9])
PROBLEM = nm.MixedLinearRegression(p=7, m=2, n_t=5, n_v=2, n_r=6, sigma=0.3, nu=0.8)
ADAPT, KEY = nm.GradientDescent(0.2), jax.random.key(0)
P = np.diag(np.linspace(0.5, 1.5, 7)) + 0.1
RULES = {
    "heavy ball": nm.Momentum(-0.2, 0.6, 3),
    "Nesterov": nm.Momentum(0.3, -0.4, 4, nesterov=True),
    "schedule": nm.GradientDescent(nm.Schedule([0.2, -0.3, 0.1]), 3),
    "momentum by step": nm.Momentum(0.2, nm.Schedule([0.0, 0.5]), 3),
    "preconditioned": nm.Preconditioned(-0.2, P),
    "preconditioned, steps": nm.Preconditioned(0.3, np.diag(P), 3),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


@nm.pytree
class Blend(nm.InnerRule):
    """Steps along the gradient at the mean of the last two parameters: a rule of a user's own."""

    rate: float
    weight: float
    steps: int = nm.static(default=2)

    linear = True

    def init(self, params):
        return params

    def update(self, gradient, state, params):
        mixed = jax.tree.map(lambda w, old: w + self.weight * (old - w), params, state)
        return jax.tree.map(lambda w, g: w - self.rate * g, mixed, gradient), params


@nm.pytree
class Saturating(nm.InnerRule):
    """A filter and no update."""

    rate: float

    def label_filter(self, x):
        return self.rate / (1 + jnp.asarray(x)) ** 2


@pytest.mark.parametrize("nesterov", (False, True))
@pytest.mark.parametrize("rate", (-0.4, 0.0, 0.3))
def test_momentum_is_that_of_optax_on_any_model(rate, nesterov, x64):
    def loss(w, target):
        return jnp.sum(jnp.sin(w["a"]) * target) + jnp.sum(w["b"] ** 2)

    params = {"a": jnp.arange(3.0), "b": jnp.ones((2, 2))}
    ours = nm.adapt(loss, params, 0.7, nm.Momentum(rate, 0.9, 4, nesterov=nesterov))
    theirs = nm.InnerOptimizer(optax.sgd(rate, momentum=0.9, nesterov=nesterov), 4)
    expected = nm.adapt(loss, params, 0.7, theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13), ours, expected)


@every_rule
def test_on_the_linear_model_filters_are_the_adaptation(rule, x64):
    """b and q against `adapt` on the quadratic loss of one task, which knows nothing of them."""
    rng = np.random.default_rng(0)
    X_t, y_t, omega = rng.standard_normal((5, 7)), rng.standard_normal(5), rng.standard_normal(7)

    def loss(w, data):
        return jnp.mean((data[0] @ w - data[1]) ** 2) / 2

    theta = nm.adapt(loss, jnp.asarray(omega), (X_t, y_t), rule)
    metric = (
        np.eye(7)
        if rule.spectral().preconditioner is None
        else np.asarray(rule.spectral().preconditioner)
    )
    metric = np.diag(metric) if metric.ndim == 1 else metric
    x, V = np.linalg.eig(metric @ X_t.T @ X_t / 5)
    S = [
        V @ np.diag(np.asarray(f(jnp.asarray(x.real)))) @ np.linalg.inv(V)
        for f in (rule.init_filter, rule.label_filter)
    ]
    expected = S[0] @ omega + S[1] @ metric @ X_t.T @ y_t / 5
    np.testing.assert_allclose(theta, expected.real, rtol=1e-9, atol=1e-9)


@every_rule
def test_the_meta_system_is_the_residual_of_adapted_weights(rule, x64):
    data = nm.linear.sample(jax.random.key(0), PROBLEM)
    data = jax.tree.map(lambda x: jnp.asarray(x, float), data)
    omega = jnp.linspace(-1, 1, 7)

    def loss(w, task):
        return jnp.mean((task[0] @ w - task[1]) ** 2) / 2

    adapted = jax.jit(jax.vmap(lambda X, y: nm.adapt(loss, omega, (X, y), rule)))
    theta = adapted(data.X_t, data.y_t)
    expected = jnp.einsum("ivp,ip->iv", data.X_v, theta) - data.y_v
    Phi, r = jax.jit(nm.linear.meta_system)(data, rule)
    np.testing.assert_allclose(Phi @ omega - r, expected.ravel(), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule",
    (RULES["heavy ball"], RULES["preconditioned, steps"], RULES["Nesterov"], Blend(0.2, 0.3)),
)
def test_all_methods_agree(rule):
    result = nm.verify(PROBLEM, rule, ADAPT, runs=100)
    assert result.agrees
    kinds = {method.name: method.kind for method in result.methods}
    assert kinds["meta-training (optax)"] == kinds["meta-gradient, autodiff"] == "relative"
    assert (kinds["theory, proportional"] == "skipped") == (
        rule.spectral().preconditioner is not None
    )


@pytest.mark.slow
def test_one_step_of_each_serves_a_batch_of_rates(x64):
    rates = np.array([-0.3, 0.0, 0.4])
    plain = nm.simulate(jax.random.key(1), PROBLEM, nm.GradientDescent(rates), ADAPT, runs=4)
    for rule in (nm.Momentum(rates, 0.7, 1), nm.Preconditioned(rates, np.eye(7))):
        assert rule.spectral().constant_filter is not None
        found = nm.simulate(jax.random.key(1), PROBLEM, rule, ADAPT, runs=4)
        np.testing.assert_allclose(found.weight_error, plain.weight_error, rtol=1e-9)
    ahead = nm.Momentum(rates / 1.7, 0.7, 1, nesterov=True)
    found = nm.simulate(jax.random.key(1), PROBLEM, ahead, ADAPT, runs=4)
    np.testing.assert_allclose(found.weight_error, plain.weight_error, rtol=1e-9)


@pytest.mark.parametrize("wrap", mostly_slow((np.array, jnp.array), 1))
def test_a_batch_is_its_single_rules(wrap, x64):
    rates, momenta = wrap([[-0.2], [0.3]]), wrap([0.0, 0.5, -0.9])
    batch = nm.Momentum(rates, momenta, 3)
    assert batch.batch_shape == (2, 3)
    for function in ("label_filter", "init_filter"):
        found = getattr(batch, function)(X)
        for i in range(2):
            for j in range(3):
                one = nm.Momentum(float(rates[i, 0]), float(momenta[j]), 3)
                np.testing.assert_allclose(found[i, j], getattr(one, function)(X), rtol=1e-13)
    flat = flat_batch(batch)
    assert flat.rate.shape == flat.momentum.shape == (6,)
    steps = nm.GradientDescent(nm.Schedule(np.arange(6.0).reshape(3, 2) / 10), 3)
    assert steps.batch_shape == (2,)
    assert flat_batch(steps).rate.values.shape == (2, 3)
    loss = nm.theory.test_loss(PROBLEM, steps, ADAPT)
    single = [
        nm.theory.test_loss(PROBLEM, nm.GradientDescent(nm.Schedule(v), 3), ADAPT)
        for v in np.arange(6.0).reshape(3, 2).T / 10
    ]
    np.testing.assert_allclose(loss, single, rtol=1e-12)


@pytest.mark.parametrize("rate", (-0.3, 0.0, 0.2))
def test_a_constant_schedule_is_the_rate_itself(rate, x64):
    whole = nm.GradientDescent(rate, 3)
    by_step = nm.GradientDescent(nm.Schedule([rate]), 3)  # the last value serves all later steps
    for function in ("label_filter", "init_filter"):
        np.testing.assert_allclose(
            getattr(by_step, function)(X), getattr(whole, function)(X), rtol=1e-13
        )
    assert by_step.spectral().degree == whole.spectral().degree == 3


def test_an_array_and_a_schedule_cannot_be_confused(x64):
    def loss(w, target):
        return jnp.sum((w - target) ** 2) / 2

    values, start = jnp.array([0.5, 0.25, 0.0]), jnp.full(3, 8.0)
    by_element = nm.adapt(loss, start, 0.0, nm.GradientDescent(values, 3))
    np.testing.assert_allclose(by_element, 8 * (1 - values) ** 3)
    by_step = nm.adapt(loss, start, 0.0, nm.GradientDescent(nm.Schedule(values), 3))
    np.testing.assert_allclose(by_step, 8 * 0.5 * 0.75 * np.ones(3))
    both = nm.GradientDescent(nm.Schedule(jnp.stack([values, 2 * values])), 2)
    np.testing.assert_allclose(
        nm.adapt(loss, start, 0.0, both), 8 * (1 - values) * (1 - 2 * values)
    )


def test_more_steps_than_learned_rates_repeat_the_last(x64):
    def loss(w, target):
        return (w - target) ** 2 / 2

    learned = nm.GradientDescent(nm.Schedule([0.5, 0.25]), 4)
    assert float(nm.adapt(loss, 8.0, 0.0, learned)) == 8 * 0.5 * 0.75**3
    fewer = nm.GradientDescent(nm.Schedule([0.5, 0.25]), 1)
    assert float(nm.adapt(loss, 8.0, 0.0, fewer)) == 4.0


def test_a_preconditioner_is_a_number_a_diagonal_or_a_matrix_for_each_leaf(x64):
    def loss(w, target):
        return sum(jnp.sum((leaf - target) ** 2) / 2 for leaf in jax.tree.leaves(w))

    params = {"a": jnp.array([1.0, 2.0]), "b": jnp.ones((2, 2)), "c": jnp.array(3.0)}
    matrix = np.array([[0.0, 1.0], [1.0, 0.0]])
    preconditioner = {"a": matrix, "b": np.array([[1.0, 0.0], [0.0, -1.0]]), "c": -1.0}
    adapted = nm.adapt(loss, params, 0.0, nm.Preconditioned(0.5, preconditioner))
    np.testing.assert_allclose(adapted["a"], [0.0, 1.5])
    np.testing.assert_allclose(adapted["b"], [[0.5, 1.0], [1.0, 1.5]])
    assert float(adapted["c"]) == 4.5


@pytest.mark.parametrize(
    "rule", (nm.Momentum(-0.2, 0.5, 2), nm.Preconditioned(0.2, 1.5, 2), Blend(0.2, 0.3))
)
def test_meta_gradients_of_every_method_agree(rule, x64):
    def loss(w, data):
        return jnp.mean((jnp.tanh(data[0] @ w["a"]) @ w["b"] - data[1]) ** 2)

    rng = np.random.default_rng(1)
    params = {
        "a": jnp.asarray(rng.standard_normal((2, 3))),
        "b": jnp.asarray(rng.standard_normal(3)),
    }
    parts = [(rng.standard_normal((3, 4, 2)), rng.standard_normal((3, 4))) for _ in range(2)]
    tasks = nm.Tasks(*jax.tree.map(jnp.asarray, parts))
    expected = jax.jit(jax.value_and_grad(nm.maml(loss, rule)))(params, tasks)
    for method in ("mixed", "reverse", None):
        found = jax.jit(nm.maml_value_and_grad(loss, rule, method=method))(params, tasks)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), found, expected)


@pytest.mark.slow
def test_the_best_rate_of_a_rule_of_ones_own(x64):
    rule = Blend(-0.15, 0.4, 2)
    assert isinstance(rule.spectral(), nm.rules.PolynomialFilter)  # run from the update
    best = nm.theory.best_train_rate(PROBLEM, rule)
    at_best = nm.theory.weight_error(PROBLEM, rule.with_tunable(best))
    around = nm.theory.weight_error(
        PROBLEM, rule.with_tunable(jnp.asarray(best) * jnp.array([0.9, 1.1]))
    )
    assert float(at_best) <= float(around.min())


def test_a_filter_is_enough_for_theory_and_simulation():
    found = nm.simulate(jax.random.key(0), PROBLEM, Saturating(-0.2), ADAPT, runs=20)
    assert bool(found.well_conditioned.all())
    assert jnp.isfinite(nm.theory.test_loss(PROBLEM, Saturating(-0.2), ADAPT))


def predict(train):
    return nm.theory.test_loss(PROBLEM, train, ADAPT)


OPTIMIZER = nm.InnerOptimizer(optax.sgd(0.1))


def simulate(train, adapt=ADAPT, key=KEY):
    return nm.simulate(key, PROBLEM, train, adapt, runs=2)


@pytest.mark.parametrize(
    ("call", "missing"),
    (
        (lambda: nm.adapt(lambda w, d: w**2, 1.0, 0.0, Saturating(0.1)), r"no update\("),
        (lambda: nm.adapt(lambda w, d: w**2, 1.0, 0.0, nm.GradientFlow(0.1)), r"no update\("),
        (lambda: nm.theory.test_loss(PROBLEM, OPTIMIZER, ADAPT), r"no label_filter\("),
        (lambda: simulate(OPTIMIZER), r"no label_filter\("),
    ),
)
def test_a_missing_method_of_a_rule_is_named(call, missing):
    with pytest.raises(nm.rules.UndefinedMethodError, match=missing):
        call()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    (
        (lambda: nm.Schedule([]), ValueError, "values must hold at least one number"),
        (lambda: nm.Schedule(0.1), ValueError, "step axis"),
        (lambda: nm.Schedule([0.1, float("nan")]), ValueError, "values must be finite"),
        (lambda: nm.Momentum(0.1, float("inf"), 2), ValueError, "momentum must be finite"),
        (lambda: nm.Momentum(0.1, 0.9, 0), ValueError, "steps must be"),
        (lambda: nm.Momentum(0.1, 0.9, 2, nesterov=1), TypeError, "nesterov must be True or False"),
        (lambda: nm.Preconditioned(0.1, "P"), TypeError, "preconditioner must hold real"),
        (lambda: predict(nm.Preconditioned(0.1, P)), ValueError, "no rotational symmetry"),
        (lambda: simulate(nm.Preconditioned(0.1, np.triu(P))), ValueError, "must be symmetric"),
        (lambda: simulate(nm.Preconditioned(0.1, np.ones(3))), ValueError, r"\(p,\) or \(p, p\)"),
        (lambda: simulate(ADAPT, nm.Preconditioned(0.1, P)), ValueError, "'sampled'"),
        (lambda: simulate(0.1), TypeError, r"train must be .*GradientDescent\(0.1\)"),
        (lambda: simulate(ADAPT, key=0), TypeError, "key must be a random key"),
        (lambda: nm.theory.best_train_rate(PROBLEM, method="x"), ValueError, "method must be one"),
        (lambda: nm.theory.best_train_rate(PROBLEM, 0.1), TypeError, "train must be an inner"),
    ),
)
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.slow
def test_adapting_by_a_preconditioned_rule_is_evaluated_on_sampled_tasks():
    adapt = nm.Preconditioned(0.2, np.eye(7))
    found, plain = (
        nm.simulate(jax.random.key(0), PROBLEM, ADAPT, rule, runs=3, evaluation="sampled").test_loss
        for rule in (adapt, ADAPT)
    )
    np.testing.assert_allclose(found, plain, rtol=1e-5)


def test_a_new_rate_or_preconditioner_does_not_compile_again():
    traced = []

    @jax.jit
    def function(rule):
        traced.append(rule.steps)
        return rule.label_filter(1.0)

    for rate, momentum in ((0.1, 0.9), (-0.4, 0.0), (3.0, -0.5)):
        function(nm.Momentum(rate, momentum, 2))
    assert traced == [2]
