"""Forms of arguments: rates by prefix and by step, inner losses, modules, models with a state."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import negmaml as nm
from tests.helpers import mostly_slow

KEY = jax.random.key(0)
PARAMS = {"body": {"w": jnp.array([[0.3, -0.4]]), "b": jnp.array([0.1, 0.2])}, "head": jnp.ones(2)}
ROWS = jax.random.normal(KEY, (2, 3, 4, 2))
TASKS = nm.Tasks((ROWS[0, ..., :1], ROWS[0, ..., 1]), (ROWS[1, ..., :1], ROWS[1, ..., 1]))


def loss(params, data):
    x, y = data
    hidden = jnp.sin(x @ params["body"]["w"] + params["body"]["b"])
    return jnp.mean((hidden @ params["head"] - y) ** 2)


def same(computed, expected, rtol=1e-5):
    assert jax.tree.structure(computed) == jax.tree.structure(expected)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=1e-6), computed, expected)


def nested(params, rates, tasks=TASKS):
    """The objective as it is defined, with (rate of the body, rate of the head) of each step."""

    def one(support, query):
        theta = params
        for of_body, of_head in rates:
            g = jax.grad(loss)(theta, support)
            body = jax.tree.map(lambda t, d, r=of_body: t - r * d, theta["body"], g["body"])
            theta = {"body": body, "head": theta["head"] - of_head * g["head"]}
        return loss(theta, query)

    return jnp.mean(jax.vmap(one)(*tasks))


# (rate, steps, (body, head) of each step): prefixes of the parameters, and values by step.
FORMS = {
    "schedule of a prefix": (
        {"body": nm.Schedule([0.1, -0.3]), "head": 0.2}, 2, [(0.1, 0.2), (-0.3, 0.2)],
    ),
    "more steps than values": (
        {"body": nm.Schedule([0.1, -0.3]), "head": nm.Schedule([0.2])}, 3,
        [(0.1, 0.2), (-0.3, 0.2), (-0.3, 0.2)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", mostly_slow(FORMS, 1))
def test_rates_by_prefix_and_by_step_mean_the_same_everywhere(form):
    rate, steps, each = FORMS[form]
    rule = nm.GradientDescent(rate, steps)

    @jax.jit
    def everything(params):
        expected = jax.value_and_grad(nested)(params, each)
        by_method = {
            method: nm.maml_value_and_grad(loss, rule, method=method)(params, TASKS)
            for method in ("mixed", "reverse", "low-rank")
        }
        objective = nm.maml(loss, rule)(params, TASKS)
        adapted = jax.vmap(lambda s: nm.adapt(loss, params, s, rule))(TASKS.support)
        value = jnp.mean(jax.vmap(loss)(adapted, TASKS.query))
        learned = nm.meta_sgd(loss, steps=steps)(nm.MetaSGDParams(params, rate), TASKS)
        return expected, by_method, objective, value, learned

    expected, by_method, objective, value, learned = everything(PARAMS)
    for result in by_method.values():
        same(result, expected)
    same(objective, expected[0])
    same(value, expected[0])
    same((learned[0], learned[1].params), expected)
    assert jax.tree.structure(learned[1].rate) == jax.tree.structure(rate)


def test_the_rates_of_steps_beyond_a_schedule_learn_through_its_last():
    """d/d last = the sum of the derivatives of the steps that use it."""

    def value(each):
        return nested(PARAMS, [(r, r) for r in each])

    by_step = jax.jit(jax.grad(value))(jnp.array([0.1, -0.2, -0.2]))
    rates = nm.MetaSGDParams(PARAMS, nm.Schedule(jnp.array([0.1, -0.2])))
    gradient = jax.jit(nm.meta_sgd(loss, steps=3))(rates, TASKS)[1].rate.values
    np.testing.assert_allclose(gradient, [by_step[0], by_step[1] + by_step[2]], rtol=1e-4)


@pytest.mark.parametrize("method", mostly_slow(("mixed", "reverse", "low-rank"), 0))
def test_the_inner_loss_may_be_another_with_parameters_that_are_learned(method):
    """A learned ridge towards zero: its strength adapts in no step and gets a meta-gradient."""
    meta = {"model": PARAMS, "ridge": jnp.asarray(0.3)}
    mask = {"model": True, "ridge": False}

    def outer(meta, data):
        return loss(meta["model"], data)

    def inner(meta, data):
        squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(meta["model"]))
        return loss(meta["model"], data) + meta["ridge"] * squares

    def defined(meta):
        def one(support, query):
            model = meta["model"]
            for _ in range(2):
                g = jax.grad(lambda m: inner(meta | {"model": m}, support))(model)
                model = jax.tree.map(lambda t, d: t + 0.1 * d, model, g)
            return loss(model, query)

        return jnp.mean(jax.vmap(one)(*TASKS))

    algorithm = nm.maml_value_and_grad(
        outer, nm.GradientDescent(-0.1, 2), inner_loss=inner, mask=mask, method=method
    )
    expected = jax.jit(jax.value_and_grad(defined))(meta)
    same(jax.jit(algorithm)(meta, TASKS), expected)
    assert abs(float(expected[1]["ridge"])) > 1e-3


def test_leaves_that_are_not_floating_point_are_unchanged():
    """Functions, integers, keys and strings stay; their places in the gradient are None."""
    more = {"activation": jnp.sin, "layers": 2, "ids": jnp.arange(3), "key": KEY, "name": "a"}
    module = {"params": PARAMS, **more}

    def of_module(module, data):
        assert module["activation"] is jnp.sin and module["name"] == "a"
        return loss(module["params"], data) * module["layers"] / 2 + 0 * module["ids"].sum()

    rule = nm.GradientDescent(-0.1)
    head = {"params": {"body": False, "head": True}, **dict.fromkeys(more, False)}
    support = jax.tree.map(lambda x: x[0], TASKS.support)

    @jax.jit
    def everything(params):
        whole = module | {"params": params}
        pairs = [
            (make(of_module, rule)(whole, TASKS), make(loss, rule)(params, TASKS))
            for make in (nm.maml_value_and_grad, nm.fomaml, nm.reptile)
        ]
        anil = nm.anil(of_module, rule, head)(whole, TASKS)
        pairs.append((anil, nm.anil(loss, rule, head["params"])(params, TASKS)))
        learned = nm.meta_sgd(of_module)(nm.MetaSGDParams(whole, -0.1), TASKS)
        adapted = nm.adapt(of_module, whole, support, rule)
        assert adapted["activation"] is jnp.sin and adapted["layers"] == 2
        return pairs, (learned[0], learned[1].params)

    pairs, learned = everything(PARAMS)
    for (value, gradient), expected in (*pairs, (learned, pairs[0][1])):
        same((value, gradient["params"]), expected)
        assert all(gradient[name] is None for name in more)


def test_tasks_may_be_a_pair_or_a_dict():
    algorithm = jax.jit(nm.fomaml(loss, nm.GradientDescent(0.1)))
    expected = algorithm(PARAMS, TASKS)
    for form in (tuple(TASKS), list(TASKS), TASKS._asdict()):
        same(algorithm(PARAMS, form), expected)
    with pytest.raises(TypeError, match=r"a dict with 'support' and 'query'.*\['query', 'train'\]"):
        algorithm(PARAMS, {"train": TASKS.support, "query": TASKS.query})


# A model with a state: inputs are centred by the batch, and the running mean is kept.


def centred_loss(params, mean, data):
    x, y = data
    own = jnp.mean(x, 0)
    return loss(params, (x - own, y)), 0.9 * mean + 0.1 * own


def batch_loss(params, data):
    return centred_loss(params, jnp.zeros(1), data)[0]


def test_a_state_changes_with_every_inner_step_and_is_averaged_over_tasks():
    start, rule = nm.Stateful(PARAMS, jnp.array([2.0])), nm.GradientDescent(-0.1, 2)

    @jax.jit
    def everything(start):
        value, gradient = nm.maml_value_and_grad(centred_loss, rule)(start, TASKS)
        objective = nm.maml(centred_loss, rule)(start, TASKS)
        blocks = nm.maml_value_and_grad(centred_loss, rule, batch_size=2)(start, TASKS)
        first = nm.fomaml(centred_loss, rule)(start, TASKS)
        summed = [nm.reptile(centred_loss, own)(start, TASKS) for own in (rule, optimizer)]
        return value, gradient, objective, blocks, first, *summed

    @jax.jit
    def without_state(params):
        algorithms = (
            nm.maml_value_and_grad(batch_loss, rule),
            nm.fomaml(batch_loss, rule),
            *(nm.reptile(batch_loss, own) for own in (rule, optimizer)),
        )
        return [algorithm(params, TASKS) for algorithm in algorithms]

    optimizer = nm.InnerOptimizer(optax.sgd(-0.1), 2)
    value, gradient, objective, blocks, first, *summed = everything(start)
    expected, expected_first, *expected_sums = without_state(PARAMS)
    same((value, gradient.params), expected)
    same(objective, value)
    same(blocks, (value, gradient))
    same((first[0], first[1].params), expected_first)
    for result, expected in zip(summed, expected_sums, strict=True):
        same((result[0], result[1].params), expected)
        np.testing.assert_allclose(result[1].state, gradient.state, rtol=1e-5)
    means = []
    for i in range(3):
        support, query = (np.mean(part[0][i], 0) for part in TASKS)
        mean = 2.0
        for own in (support, support, query):
            mean = 0.9 * mean + 0.1 * own
        means.append(mean)
    for state in (gradient.state, first[1].state):
        np.testing.assert_allclose(state, np.mean(means, 0), rtol=1e-5)


def test_a_state_that_the_loss_reads_is_differentiated_through():
    """theta1 = theta - r 2 theta s0, s1 = s0 + theta: the query theta1 s1 depends on both."""

    def product(theta, s, points):  # the support has points, the query none
        return theta**2 * s if points.ndim else theta * s, s + theta

    def value(theta):
        return (theta - 0.1 * 2 * theta * 1.5) * (1.5 + theta)

    tasks = nm.Tasks(jnp.zeros((1, 1)), jnp.zeros(1))
    start = nm.Stateful(jnp.asarray(0.7), jnp.asarray(1.5))
    algorithm = nm.maml_value_and_grad(product, nm.GradientDescent(0.1))
    computed, gradient = algorithm(start, tasks)
    same((computed, gradient.params), jax.value_and_grad(value)(jnp.asarray(0.7)))
    with pytest.raises(TypeError, match=r"Stateful parameters go with.*got 'mixed'"):
        nm.maml_value_and_grad(product, nm.GradientDescent(0.1), method="mixed")(start, tasks)
    with pytest.raises(
        TypeError, match=r"MetaSGDParams\(params, rate\) for meta_sgd, got Stateful"
    ):
        nm.meta_sgd(product)(start, tasks)
    with pytest.raises(TypeError, match="must return"):
        without = lambda params, state, data: loss(params, data)  # noqa: E731
        nm.maml(without, nm.GradientDescent(0.1))(nm.Stateful(PARAMS, 0.0), TASKS)


def test_per_step_state_has_a_state_for_each_step():
    stepped, init = nm.per_step_state(centred_loss, steps=2)
    start = nm.Stateful(PARAMS, init(jnp.array([2.0])))
    rule = nm.GradientDescent(-0.1, 2)
    gradient = jax.jit(nm.maml_value_and_grad(stepped, rule))(start, TASKS)[1]
    stack, step = gradient.state
    support, query = (np.mean(part[0], (0, 1)) for part in TASKS)
    np.testing.assert_allclose(stack, 1.8 + 0.1 * np.stack([support, support, query]), rtol=1e-5)
    assert (int(step.inner), int(step.outer)) == (0, 1)
    one = jax.tree.map(lambda x: x[0], TASKS.support)
    more = jax.jit(lambda start: nm.adapt(stepped, start, one, nm.GradientDescent(-0.1, 5)))(start)
    assert int(more.state[1].inner) == 5  # the last state took the rest


def test_rates_and_optimizers_as_rules():
    for make in (nm.maml, nm.maml_value_and_grad, nm.fomaml, nm.reptile, nm.imaml):
        with pytest.raises(
            TypeError, match=r"rule must be an inner rule .*GradientDescent\(0.05\)"
        ):
            make(loss, 0.05)
    sgd = jax.jit(nm.fomaml(loss, optax.sgd(-0.1)))(PARAMS, TASKS)
    same(sgd, jax.jit(nm.fomaml(loss, nm.GradientDescent(-0.1)))(PARAMS, TASKS))


def test_invalid_arguments_raise_with_their_names():
    rule = nm.GradientDescent(0.1)
    with pytest.raises(TypeError, match="params must hold floating point arrays, got int32"):
        nm.maml(loss, rule)(jnp.array(3), TASKS)
    with pytest.raises(TypeError, match=r"params must be real, got a complex .*params\['z'\]"):
        nm.maml(loss, rule)({**PARAMS, "z": 1j}, TASKS)
    with pytest.raises(TypeError, match="loss must be a function"):
        nm.maml(3, rule)
    with pytest.raises(TypeError, match="inner_loss must be a function"):
        nm.maml(loss, rule, inner_loss=3)
    with pytest.raises(TypeError, match="has_aux must be True or False"):
        nm.maml(loss, rule, has_aux=1)


X, Y = jnp.ones((4, 6, 3)), jnp.ones((4, 6))


def rows_loss(w, data):
    x, y = data
    return jnp.mean((x @ w - y) ** 2)


@pytest.mark.parametrize(
    "rows", ((X, Y), (X, Y[..., None]), [X, Y], (X, jnp.ones((4, 6, 3), int))), ids=range(4)
)
def test_a_pair_of_rows_raises_instead_of_being_read_as_support_and_query(rows):
    """A loss that indexes its data would take the pair in silence."""
    mean = nm.maml_value_and_grad(lambda w, data: jnp.mean(data * w), nm.GradientDescent(0.1))
    with pytest.raises(TypeError, match=r"tasks must be \(support, query\).*never as the rows"):
        mean(jnp.float32(1), tuple(rows))


def test_an_error_of_the_loss_notes_how_the_pair_was_read():
    with pytest.raises(ValueError) as raised:
        nm.maml(rows_loss, nm.GradientDescent(0.1))(jnp.ones(3), (X, X))
    assert "never as the rows (x, y)" in raised.value.__notes__[-1]


def test_unlike_arrays_are_tasks_when_they_are_named():
    mean = nm.maml(lambda w, data: jnp.mean(data * w), nm.GradientDescent(0.0))
    assert mean(jnp.float32(2), nm.Tasks(X, Y)) == mean(jnp.float32(2), (Y, Y)) == 2
