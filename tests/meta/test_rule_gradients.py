"""Gradients with respect to the rule, by every method, and rules trained by `fit`."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import negmaml as nm
from tests.helpers import mostly_slow

RNG = np.random.default_rng(3)
PARAMS = {"w": RNG.standard_normal((2, 3)), "v": RNG.standard_normal(3), "decay": np.array(-0.3)}
TASKS = nm.Tasks(*((RNG.standard_normal((4, 5, 2)), RNG.standard_normal((4, 5))) for _ in range(2)))
MASK = {"w": True, "v": True, "decay": False}
KEY = jax.random.key(0)


def loss(params, data):
    x, y = data
    return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"] - y) ** 2)


def decayed(params, data):
    """An inner loss with a hyperparameter in a frozen leaf."""
    return loss(params, data) + params["decay"] * jnp.sum(params["w"] ** 2)


@nm.pytree
class LearnedOptimizer(nm.InnerRule):
    """A small network for each coordinate, from a gradient and its running mean to a step."""

    hidden: Any
    output: Any
    count: int  # a number that does not train
    steps: int = nm.static(default=3)

    def init(self, params):  # a function of numbers of the rule, too
        return jax.tree.map(lambda w: self.output[0] * w, params)

    def update(self, gradient, state, params):
        mean = jax.tree.map(lambda m, g: 0.5 * m + 0.5 * g, state, gradient)

        def move(w, g, m):
            return w - jnp.tanh(jnp.stack([g, m, g * m], -1) @ self.hidden) @ self.output

        return jax.tree.map(move, params, gradient, mean), mean


def learned(scale=0.3, steps=3):
    hidden, output = RNG.standard_normal((3, 4)), scale * RNG.standard_normal(4)
    return LearnedOptimizer(hidden, output, 7, steps)


RULES = {
    "schedule": nm.GradientDescent({"w": nm.Schedule([0.2, -0.3]), "v": 0.0, "decay": 0.1}, 3),
    "learned": learned(),
    "momentum": nm.Momentum(-0.1, 0.5, 2, nesterov=True),
    "one rate": nm.GradientDescent(-0.4, 1),
}
METHODS = {
    "schedule": ("mixed", "reverse", "low-rank"), "learned": ("mixed", "remat", None),
    "momentum": (None, "reverse"), "one rate": (None, "mixed", "low-rank"),
}  # fmt: skip
IMPLICIT = {"proximal": nm.Proximal(1.5), "negative": nm.Proximal(-40.0), "integer": nm.Proximal(2)}


def same(computed, expected, rtol=1e-8):
    """Equal leaves: None and zeros of integers in a gradient of a rule have none to compare."""
    computed, expected = jax.tree.leaves(computed), jax.tree.leaves(expected)
    expected = [x for x in expected if getattr(x, "dtype", None) != jax.dtypes.float0]
    assert len(computed) == len(expected)
    for a, b in zip(computed, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-10)


def double(tree):
    return jax.tree.map(jnp.asarray, tree)


@pytest.mark.parametrize("name", mostly_slow(list(RULES), 0, 1))
def test_every_method_is_autodiff_of_the_objective_in_rule_and_params(name, x64):
    rule, params, tasks = RULES[name], double(PARAMS), double(TASKS)
    options = {"inner_loss": decayed, "mask": MASK, "batch_size": 3}

    @jax.jit
    def everything(rule, params):
        def objective(pair):
            return nm.maml(loss, pair.rule, inner_loss=decayed, mask=MASK)(pair.params, tasks)

        expected = jax.value_and_grad(objective, allow_int=True)(nm.ParamsAndRule(params, rule))
        found = [
            nm.maml_value_and_grad(loss, rule, wrt="both", method=method, **options)(params, tasks)
            for method in METHODS[name]
        ]
        alone = nm.maml_value_and_grad(loss, rule, wrt="rule", **options)(params, tasks)
        return expected, found, alone

    expected, found, alone = everything(rule, params)
    for result in found:
        same(result, expected)
    same(alone, (expected[0], expected[1].rule))
    assert type(alone[1]) is type(rule) and alone[1].steps == rule.steps
    assert any(np.any(leaf) for leaf in jax.tree.leaves(alone[1]))


@pytest.mark.parametrize("name", mostly_slow(list(IMPLICIT), 0))
def test_a_strength_has_the_derivative_of_the_implicit_function_theorem(name, x64):
    rule, params, tasks = IMPLICIT[name], double(PARAMS), double(TASKS)
    rule = nm.Proximal(jnp.asarray(float(rule.strength))) if name != "integer" else rule
    options = {"inner_loss": decayed, "mask": MASK}

    @jax.jit
    def both(params, rule):
        found = nm.imaml(loss, rule, wrt="both", **options)(params, tasks)
        through = jax.value_and_grad(
            lambda pair: nm.maml(loss, pair.rule, **options)(pair.params, tasks), allow_int=True
        )(nm.ParamsAndRule(params, rule))
        return found, through

    if name == "integer":
        with pytest.raises(TypeError, match="rule must hold floating point numbers"):
            nm.imaml(loss, rule, wrt="rule")
        return
    found, through = both(params, rule)
    same(found, through, rtol=1e-6)
    value = jax.jit(lambda c: nm.maml(loss, nm.Proximal(c), **options)(params, tasks))
    slope = (value(rule.strength + 1e-4) - value(rule.strength - 1e-4)) / 2e-4
    np.testing.assert_allclose(found[1].rule.strength, slope, rtol=1e-5)


def test_implicit_has_the_gradient_of_its_strength_and_none_of_its_search(x64):
    params, tasks = double(PARAMS), double(TASKS)
    search = nm.Implicit(nm.GradientDescent(0.1, 3000), 1.5, tolerance=1e-9)

    @jax.jit
    def both():
        rules = search, nm.Proximal(1.5)
        return [nm.imaml(loss, rule, wrt="rule", mask=MASK)(params, tasks)[1] for rule in rules]

    found, expected = both()
    np.testing.assert_allclose(found.strength, expected.strength, rtol=1e-6)
    assert float(found.inner.rate) == 0


@nm.pytree
class Halfway(nm.InnerRule):
    """A step of gradient descent at a rate, back some of the way."""

    rate: float
    share: float
    implicit = True

    def solve(self, loss, start, *, remat=False):
        slope = jax.grad(loss)(start)
        return jax.tree.map(lambda w, g: w - self.share * self.rate * g, start, slope)


def test_a_rule_with_a_solve_of_its_own_has_the_gradient_of_that_solve(x64):
    params, tasks = double(PARAMS), double(TASKS)

    @jax.jit
    def both(rule):
        found = nm.maml_value_and_grad(loss, rule, wrt="rule")(params, tasks)
        plain = nm.GradientDescent(rule.share * rule.rate)
        return found, nm.maml_value_and_grad(loss, plain, wrt="rule")(params, tasks)

    found, expected = both(Halfway(-0.3, 0.5))
    np.testing.assert_allclose(found[1].rate, 0.5 * expected[1].rate, rtol=1e-10)
    np.testing.assert_allclose(found[1].share, -0.3 * expected[1].rate, rtol=1e-10)


@pytest.mark.parametrize("name", mostly_slow(("learned", "schedule"), 0))
def test_first_order_is_the_derivative_with_constant_inner_gradients(name, x64):
    rule, params, tasks = RULES[name], double(PARAMS), double(TASKS)

    def objective(pair):
        def one(support, query):
            theta, state = pair.params, pair.rule.init(pair.params)
            for k in range(3):
                own = jax.tree.map(
                    lambda x, k=k: x.values[min(k, 1)] if isinstance(x, nm.Schedule) else x,
                    pair.rule, is_leaf=lambda x: isinstance(x, nm.Schedule),
                )  # fmt: skip
                g = lax.stop_gradient(jax.grad(loss)(theta, support))
                theta, state = own.update(g, state, theta)
            return loss(theta, query)

        return jnp.mean(jax.vmap(one)(*tasks))

    @jax.jit
    def both(pair):
        found = nm.fomaml(loss, pair.rule, wrt="both")(pair.params, tasks)
        return found, jax.value_and_grad(objective, allow_int=True)(pair)

    same(*both(nm.ParamsAndRule(params, rule)))


def test_gradients_have_the_form_of_what_they_are_for():
    rule = learned()
    algorithm = partial(nm.maml_value_and_grad, loss, rule, has_aux=False)
    pair = nm.ParamsAndRule(PARAMS, rule)
    shapes = {wrt: jax.eval_shape(algorithm(wrt=wrt), PARAMS, TASKS)[1]
              for wrt in ("params", "rule", "both")}  # fmt: skip
    assert jax.tree.structure(shapes["params"]) == jax.tree.structure(PARAMS)
    assert isinstance(shapes["rule"], LearnedOptimizer) and shapes["rule"].count is None
    assert shapes["both"] == nm.ParamsAndRule(shapes["params"], shapes["rule"])
    of_pair = jax.eval_shape(algorithm(wrt="rule"), pair, TASKS)[1]
    assert of_pair.rule == shapes["rule"] and not jax.tree.leaves(of_pair.params)
    assert jax.eval_shape(algorithm(wrt="both"), pair, TASKS)[1] == shapes["both"]
    stateful = nm.Stateful(PARAMS, jnp.zeros(2))

    def counted(params, state, data):
        return loss(params, data), state + 1

    found = nm.maml_value_and_grad(counted, rule, wrt="both")
    found = jax.eval_shape(found, nm.ParamsAndRule(stateful, rule), TASKS)[1]
    assert found == nm.ParamsAndRule(nm.Stateful(shapes["params"], found.params.state), found.rule)
    assert found.params.state.shape == (2,)


def test_a_pair_brings_its_own_rule_to_every_algorithm():
    given, other = nm.GradientDescent(0.0, 2), nm.GradientDescent(-0.2, 2)
    pair = nm.ParamsAndRule(PARAMS, other)
    objective = jax.jit(lambda rule: nm.maml(loss, given)(nm.ParamsAndRule(PARAMS, rule), TASKS))
    expected = nm.maml(loss, other)(PARAMS, TASKS)
    np.testing.assert_allclose(objective(other), expected, rtol=1e-6)
    value, gradient = nm.maml_value_and_grad(loss, given, wrt="both")(pair, TASKS)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    learned_rate = nm.meta_sgd(loss, steps=2)(nm.MetaSGDParams(PARAMS, -0.2), TASKS)[1]
    same(gradient.rule.rate, learned_rate.rate, rtol=1e-5)
    same(gradient.params, learned_rate.params, rtol=1e-5)


@jax.jit
def trained_by_hand(params, rule, moves_params):
    def step(pair, _):
        value, slope = jax.value_and_grad(
            lambda pair: nm.maml(loss, pair.rule)(pair.params, TASKS)
        )(pair)
        descend = jax.tree.map(lambda x, g: x - 0.01 * g, pair, slope)
        keep = jax.tree.map(partial(jnp.where, moves_params), descend.params, pair.params)
        return nm.ParamsAndRule(keep, descend.rule), value

    return lax.scan(step, nm.ParamsAndRule(params, rule), length=4)


@pytest.mark.parametrize("wrt", ("rule", "both"))
def test_fit_trains_the_rule_with_or_without_the_parameters(wrt):
    params, rule = double(PARAMS), nm.GradientDescent(jnp.asarray(0.1), 2)
    value_and_grad = nm.maml_value_and_grad(loss, rule, wrt=wrt)
    start = nm.ParamsAndRule(params, rule)
    result = nm.fit(KEY, start, value_and_grad, TASKS, optax.sgd(0.01), 4,
                    evaluate=nm.maml(loss, rule), evaluate_every=2)  # fmt: skip
    expected, losses = trained_by_hand(params, rule, wrt == "both")
    np.testing.assert_allclose(result.loss, losses, rtol=1e-5)
    same(result.params, expected, rtol=1e-5)
    assert isinstance(result.params.rule, nm.GradientDescent) and result.params.rule.steps == 2
    if wrt == "rule":  # weight decay would move parameters that take part with a gradient of zero
        decayed = nm.fit(KEY, start, value_and_grad, TASKS, optax.adamw(0.1, weight_decay=1.0), 2)
        jax.tree.map(np.testing.assert_array_equal, decayed.params.params, params)
        assert len(jax.tree.leaves(decayed.optimizer_state)) == 3  # a count, two means
        again = nm.fit(KEY, None, value_and_grad, TASKS, optax.adamw(0.1), 1, state=decayed)
        assert int(again.step) == 3


def test_a_mesh_gives_the_gradient_of_one_device_in_the_rule():
    rule = learned(0.1)
    value_and_grad = nm.maml_value_and_grad(loss, rule, wrt="rule")
    start = nm.ParamsAndRule(PARAMS, rule)
    run = partial(nm.fit, KEY, start, value_and_grad, TASKS, optax.sgd(0.1), 2)
    same(run(mesh=jax.devices()).params, run().params, rtol=1e-5)


def test_a_module_with_a_state_trains_beside_its_rule():
    nnx = pytest.importorskip("flax.nnx")

    class Normalised(nnx.Module):
        def __init__(self, rngs):
            self.layer, self.norm = nnx.Linear(2, 1, rngs=rngs), nnx.BatchNorm(1, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.layer(x))[..., 0]

    def of_module(module, data):
        return jnp.mean((module(data[0]) - data[1]) ** 2)

    module, rule = Normalised(nnx.Rngs(0)), nm.GradientDescent(0.1, 2)
    pair = nm.ParamsAndRule(module, rule)
    before = jnp.asarray(module.norm.mean[...])
    weights = jnp.asarray(module.layer.kernel[...])
    value_and_grad = nm.maml_value_and_grad(of_module, rule, wrt="rule")
    result = nm.fit(KEY, pair, value_and_grad, TASKS, optax.adam(0.01), 2)
    assert not np.allclose(result.params.params.norm.mean[...], before)
    np.testing.assert_array_equal(result.params.params.layer.kernel[...], weights)
    assert abs(float(result.params.rule.rate) - 0.1) > 0.01
    slope = nm.maml_value_and_grad(of_module, rule, wrt="both")(module, TASKS)[1]
    assert jax.tree.structure(slope.params) == jax.tree.structure(nnx.state(module, nnx.Param))


def test_new_numbers_of_a_rule_do_not_compile_again():
    @jax.jit
    def gradient(rule):
        return nm.maml_value_and_grad(loss, rule, wrt="rule")(PARAMS, TASKS)

    for rate in (-0.1, 0.0, 0.2):
        gradient(nm.GradientDescent(rate, 2))
    assert gradient._cache_size() == 1


def test_memory_of_forward_over_reverse_holds_one_point_for_each_step():
    """Reverse mode stores every intermediate result of every step of a learned optimizer."""

    def bytes_of(steps, method):
        rule = learned(0.1, steps)
        algorithm = nm.maml_value_and_grad(loss, rule, wrt="rule", method=method)
        compiled = jax.jit(algorithm).lower(PARAMS, TASKS).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    slopes = [(bytes_of(300, m) - bytes_of(100, m)) / 200 for m in ("mixed", "reverse")]
    point = 2 * (6 + 3 + 1) * 4 * 4  # parameters and optimizer state of four tasks in float32
    assert slopes[0] < 2.5 * point and slopes[1] > 5 * slopes[0]
