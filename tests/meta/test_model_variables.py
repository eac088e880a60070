"""Models of other libraries, taken apart and made again, and their random streams."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import negmaml as nm
from tests.helpers import mostly_slow

linen, nnx = pytest.importorskip("flax.linen"), pytest.importorskip("flax.nnx")
flax_core = pytest.importorskip("flax.core")

KEY = jax.random.key(0)
TASKS = nm.tasks.Sinusoid(m=3, n_t=4, n_v=4)
BATCH = TASKS(KEY)
RULE = nm.GradientDescent(-0.05, 2)


class Module(nnx.Module):
    """Batch normalisation and dropout, or neither."""

    def __init__(self, rngs, rate=0.0):
        self.first, self.last = nnx.Linear(1, 4, rngs=rngs), nnx.Linear(4, 1, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.drop = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(jnp.tanh(self.norm(self.first(x)))))


def module_loss(module, data):
    return jnp.mean((module(data[0]) - data[1]) ** 2)


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.BatchNorm(use_running_average=False, momentum=0.9)(linen.Dense(4)(x))
        return linen.Dense(1)(jnp.tanh(x))


def linen_loss(variables, data):
    predicted, new = Linen().apply(variables, data[0], mutable=["batch_stats"])
    return jnp.mean((predicted - data[1]) ** 2), new


def by_hand(loss, params, state, rate=-0.05, steps=2):
    """(mean query loss, mean state after the query) of the tasks, adapted in a plain loop."""
    gradient_of = jax.jit(jax.value_and_grad(loss, has_aux=True))
    values, states = [], []
    for i in range(3):
        support, query = jax.tree.map(lambda x, i=i: x[i], tuple(BATCH))
        theta, own = params, state
        for _ in range(steps):
            (_, own), gradient = gradient_of(theta, own, support)
            theta = jax.tree.map(lambda t, g: t - rate * g, theta, gradient)
        value, own = loss(theta, own, query)
        values.append(value)
        states.append(own)

    def mean(*leaves):
        floating = jnp.issubdtype(leaves[0].dtype, jnp.floating)
        return np.mean(leaves, 0) if floating else leaves[0]

    return np.mean(values), jax.tree.map(mean, *states)


def same(first, second, rtol=1e-4):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, 1e-6), first, second)


def statistics(module):
    return np.asarray(module.norm.mean[...]), np.asarray(module.norm.var[...])


def split_loss(module):
    """The loss of a module as a function of parameters and statistics."""
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def loss(params, rest, data):
        own = nnx.merge(graph, params, rest, copy=True)
        return module_loss(own, data), nnx.state(own, nnx.Not(nnx.Param))

    return loss, params, rest


def test_a_module_trains_its_parameters_and_keeps_its_statistics():
    module = Module(nnx.Rngs(0))
    value, rest = by_hand(*split_loss(module))
    start = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    result = nm.fit(
        KEY, module, nm.maml_value_and_grad(module_loss, RULE), BATCH, optax.sgd(0.1), 1
    )
    assert isinstance(result.params, Module) and result.params is not module
    np.testing.assert_allclose(result.loss, [value], rtol=1e-4)
    same(statistics(result.params), (rest["norm"]["mean"][...], rest["norm"]["var"][...]))
    assert np.all(statistics(module)[0] == 0)  # the module that was passed is unchanged
    moved = nnx.to_pure_dict(nnx.state(result.params, nnx.Param))
    assert not np.allclose(moved["last"]["kernel"], start["last"]["kernel"])


def test_a_value_and_grad_updates_statistics_as_a_loss_of_nnx_does():
    module = Module(nnx.Rngs(0))
    loss, params, rest = split_loss(module)
    value_and_grad = nm.maml_value_and_grad(module_loss, RULE)
    apart = nm.maml_value_and_grad(loss, RULE)(nm.Stateful(params, rest), BATCH)
    optimizer = nnx.Optimizer(module, optax.adam(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer, tasks):
        value, gradient = value_and_grad(module, tasks)
        optimizer.update(module, gradient)
        return value, gradient

    value, gradient = step(module, optimizer, BATCH)
    same(value, apart[0])
    same(gradient, apart[1].params)
    same(statistics(module)[0], apart[1].state["norm"]["mean"][...])
    before = module.first.kernel[...]
    step(module, optimizer, BATCH)
    assert not np.allclose(before, module.first.kernel[...])


def test_adapting_and_evaluating_a_module():
    module = Module(nnx.Rngs(0))
    support, query = jax.tree.map(lambda x: x[0], tuple(BATCH))
    adapted = nm.adapt(module_loss, module, support, RULE)
    assert isinstance(adapted, Module) and not np.allclose(
        adapted.last.kernel[...], module.last.kernel[...]
    )
    assert np.any(statistics(adapted)[0] != 0) and np.all(statistics(module)[0] == 0)
    tested = nm.evaluate(KEY, module, module_loss, RULE, BATCH)
    np.testing.assert_allclose(tested.values[0], module_loss(adapted, query), rtol=1e-4)
    module.eval()
    metric = nm.evaluate(KEY, module, module_loss, RULE, BATCH, metric=module_loss, per_step=True)
    same(metric.values[0, 0], module_loss(module, query))


def test_variables_of_a_module_and_a_filter_of_what_trains():
    module = Module(nnx.Rngs(0))
    found = nm.variables(module)
    assert isinstance(found.model, Module) and len(jax.tree.leaves(found.params)) == 6
    only = nm.variables(module, trained=nnx.PathContains("last"))
    value_and_grad = nm.maml_value_and_grad(module_loss, RULE)
    trained = nm.fit(KEY, only, value_and_grad, BATCH, optax.sgd(0.1), 2).params
    assert np.all(trained.first.kernel[...] == module.first.kernel[...])
    assert not np.allclose(trained.last.kernel[...], module.last.kernel[...])


class Scale(nnx.Variable):
    """A variable that is no `nnx.Param`."""


class Scaled(Module):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.scale = Scale(jnp.ones(()))

    def __call__(self, x):
        return self.scale[...] * super().__call__(x)


@pytest.mark.parametrize("trained", mostly_slow([Scale, [nnx.Param, Scale]], 1))
def test_variables_that_train_need_not_be_parameters(trained):
    module = Scaled(nnx.Rngs(0))
    graph, params, rest = nnx.split(module, trained, ...)

    def loss(params, rest, data):
        whole = nnx.merge(graph, params, rest, copy=True)
        return module_loss(whole, data), nnx.split(whole, trained, ...)[-1]

    value, rest = by_hand(loss, params, rest)
    parts = nm.variables(module, trained=trained)
    value_and_grad = nm.maml_value_and_grad(module_loss, RULE)
    found, (gradient, state) = value_and_grad(parts, BATCH)
    same(found, value)
    same(state["norm"]["mean"][...], rest["norm"]["mean"][...])
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    fitted = nm.fit(KEY, parts, value_and_grad, BATCH, optax.sgd(0.1), 1).params
    same(nnx.state(fitted, trained), jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient))


def test_a_filter_of_what_trains_in_a_loop_of_nnx():
    module, trained = Module(nnx.Rngs(0)), nnx.PathContains("last")
    optimizer = nnx.Optimizer(module, optax.sgd(0.1), wrt=trained)
    value_and_grad = nm.maml_value_and_grad(module_loss, RULE)

    @nnx.jit
    def step(module, optimizer):
        parts = nm.variables(module, trained=trained)
        _, (gradient, state) = value_and_grad(parts, BATCH)
        optimizer.update(module, gradient)
        nnx.update(module, state)

    parts = nm.variables(Module(nnx.Rngs(0)), trained=trained)
    step(module, optimizer)
    step(module, optimizer)
    fitted = nm.fit(KEY, parts, value_and_grad, BATCH, optax.sgd(0.1), 2).params
    same(nnx.state(module, nnx.Param), nnx.state(fitted, nnx.Param))
    same(statistics(module), statistics(fitted))
    first = nm.fit(KEY, parts, value_and_grad, BATCH, optax.sgd(0.1), 1)
    more = nm.fit(KEY, parts, value_and_grad, BATCH, optax.sgd(0.1), 1, state=first).params
    same(nnx.state(more, nnx.Param), nnx.state(fitted, nnx.Param))


def test_a_filter_of_nnx_is_a_mask():
    module = Module(nnx.Rngs(0))
    mask = nnx.PathContains("last")
    adapted = nm.adapt(module_loss, module, jax.tree.map(lambda x: x[0], BATCH[0]), RULE, mask=mask)
    assert np.all(adapted.first.kernel[...] == module.first.kernel[...])
    assert not np.allclose(adapted.last.kernel[...], module.last.kernel[...])
    value, gradient = nm.anil(module_loss, RULE, mask)(module, BATCH)
    assert np.isfinite(value) and np.any(gradient["first"]["kernel"][...] != 0)


def test_a_module_of_booleans_is_a_mask_though_it_can_be_called():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.Linear(1, 1, key=jax.random.key(0))
    mask = eqx.tree_at(lambda m: m.bias, jax.tree.map(lambda _: False, model), True)
    loss = lambda model, x: jnp.sum(model(x) ** 2)  # noqa: E731
    adapted = nm.adapt(loss, model, jnp.ones(1), nm.GradientDescent(0.1), mask=mask)
    assert adapted.weight == model.weight and adapted.bias != model.bias
    nm.anil(loss, nm.GradientDescent(0.1), mask)(
        model, nm.Tasks(jnp.ones((2, 1)), jnp.ones((2, 1)))
    )


def test_a_function_of_path_and_leaf_is_a_mask_of_any_pytree():
    params = {"a": jnp.ones(2), "head": [jnp.ones(2)]}
    loss = lambda p, x: jnp.sum(p["a"] * p["head"][0] * x)  # noqa: E731
    mask = lambda path, leaf: path == ("head", 0) and leaf.ndim == 1  # noqa: E731
    adapted = nm.adapt(loss, params, jnp.ones(2), nm.GradientDescent(0.1), mask=mask)
    same(adapted, {"a": np.ones(2), "head": [np.full(2, 0.9)]})
    with pytest.raises(ValueError, match="mask must have a leaf that adapts"):
        nm.adapt(loss, params, jnp.ones(2), nm.GradientDescent(0.1), mask=lambda *_: False)


def test_linen_variables_train_their_parameters_and_keep_their_statistics():
    start = Linen().init(KEY, jnp.ones((1, 1)))
    stats = {"batch_stats": start["batch_stats"]}
    value, state = by_hand(
        lambda p, s, data: linen_loss({"params": p, **s}, data), start["params"], stats
    )
    optimizer = optax.adamw(0.1, weight_decay=1.0)
    value_and_grad = nm.maml_value_and_grad(linen_loss, RULE)
    result = nm.fit(KEY, start, value_and_grad, BATCH, optimizer, 1)
    np.testing.assert_allclose(result.loss, [value], rtol=1e-4)
    same(result.params["batch_stats"], state["batch_stats"])
    assert jax.tree.structure(result.params) == jax.tree.structure(dict(start))
    _, own = value_and_grad(start, BATCH)
    same(own["batch_stats"], state["batch_stats"])
    assert set(own) == set(start)


def test_a_frozen_dict_of_linen_is_as_a_dict():
    variables = Linen().init(KEY, BATCH.support[0][0])
    frozen = flax_core.freeze(variables)
    value_and_grad = nm.maml_value_and_grad(linen_loss, RULE)
    value, gradient = value_and_grad(frozen, BATCH)
    same((value, gradient.unfreeze()), value_and_grad(variables, BATCH))
    fitted = nm.fit(KEY, frozen, value_and_grad, BATCH, optax.sgd(0.1), 2).params
    assert jax.tree.structure(fitted) == jax.tree.structure(frozen)
    same(
        fitted.unfreeze(),
        nm.fit(KEY, variables, value_and_grad, BATCH, optax.sgd(0.1), 2).params,
    )
    support = jax.tree.map(lambda x: x[0], BATCH.support)
    adapted = nm.adapt(linen_loss, frozen, support, RULE)
    same(adapted.unfreeze(), nm.adapt(linen_loss, variables, support, RULE))


def test_a_loss_of_linen_that_returns_a_value_only_leaves_the_statistics():
    start = Linen().init(KEY, jnp.ones((1, 1)))
    value_and_grad = nm.maml_value_and_grad(lambda v, data: linen_loss(v, data)[0], RULE)
    result = nm.fit(KEY, start, value_and_grad, BATCH, optax.adamw(0.1, weight_decay=1.0), 2)
    same(result.params["batch_stats"], start["batch_stats"])


def test_a_dict_with_other_names_is_a_plain_pytree():
    params = {"params": 1.0, "rates": 0.5}
    assert set(nm.variables(params).params) == set(params)
    assert nm.variables(params).state == ()


# Random streams.


def drawn(params, state, data):
    """A loss whose value is the normal of its key, and the key as it was."""
    return params * jax.random.normal(state["key"]), state


def test_each_task_and_each_call_has_its_own_key():
    start = nm.Stateful(jnp.asarray(1.0), {"key": KEY})
    tasks = nm.Tasks(jnp.zeros(4), jnp.zeros(4))
    tested = nm.evaluate(KEY, start, drawn, nm.GradientDescent(0.0, 3), tasks, per_step=True)
    assert len(np.unique(tested.values)) == 16
    seen = []

    def noting(params, state, data):
        value, state = drawn(params, state, data)
        return value, state, value

    value_and_grad = nm.maml_value_and_grad(noting, nm.GradientDescent(0.0), has_aux=True)
    for size in (None, 1, 2):
        algorithm = nm.maml_value_and_grad(
            noting, nm.GradientDescent(0.0), has_aux=True, batch_size=size
        )
        (_, aux), gradient = algorithm(start, tasks)
        seen.append(np.asarray(aux))
    assert len(np.unique(seen[0])) == 4
    np.testing.assert_array_equal(seen[0], seen[1])
    np.testing.assert_array_equal(seen[0], seen[2])
    # The next meta-step draws others.
    following = value_and_grad(nm.Stateful(start.params, gradient.state), tasks)[0][1]
    assert not set(seen[0].tolist()) & set(np.asarray(following).tolist())


def test_dropout_of_a_module_differs_between_tasks_and_steps():
    module = Module(nnx.Rngs(0), rate=0.5)
    tasks = jax.tree.map(lambda x: jnp.stack([x[0]] * 3), BATCH)  # the same task three times
    losses = nm.evaluate(KEY, module, module_loss, nm.GradientDescent(0.0, 1), tasks, per_step=True)
    assert len(np.unique(losses.values)) == 6
    first, again = (
        nm.fit(KEY, module, nm.maml_value_and_grad(module_loss, RULE), TASKS, optax.sgd(0.1), 2)
        for _ in range(2)
    )
    same(first.loss, again.loss)
    same(statistics(first.params), statistics(again.params))


# Algorithms on models with a state.

CENTRE = nm.Stateful({"w": jnp.asarray(0.7)}, {"mean": jnp.asarray(0.2)})


def centred(params, state, data):
    """A loss that depends on a running mean of the data."""
    x, y = data
    mean = 0.9 * state["mean"] + 0.1 * jnp.mean(x)
    return jnp.mean((params["w"] * (x - mean) - y) ** 2), {"mean": mean}


def test_meta_sgd_of_a_model_with_state_is_the_gradient_of_maml():
    rate = jnp.asarray(-0.1)
    params = nm.MetaSGDParams(CENTRE, rate)
    value, gradient = nm.meta_sgd(centred, steps=2)(params, BATCH)

    def total(w, rate):
        objective = nm.maml(centred, nm.GradientDescent(rate, 2))
        return objective(nm.Stateful({"w": w}, CENTRE.state), BATCH)

    expected = jax.value_and_grad(total, (0, 1))(CENTRE.params["w"], rate)
    same((value, (gradient.params.params["w"], gradient.rate)), expected)
    _, state = by_hand(centred, *CENTRE, rate=-0.1)
    same(gradient.params.state, state)
    result = nm.fit(KEY, params, nm.meta_sgd(centred), BATCH, optax.adam(0.01), 3)
    assert isinstance(result.params.params, nm.Stateful) and np.isfinite(result.loss).all()


def test_meta_sgd_of_a_module():
    params = nm.MetaSGDParams(Module(nnx.Rngs(0)), jnp.asarray(-0.1))
    result = nm.fit(KEY, params, nm.meta_sgd(module_loss), BATCH, optax.adam(0.01), 2)
    assert isinstance(result.params.params, Module) and float(result.params.rate) != -0.1
    assert np.any(statistics(result.params.params)[0] != 0)


def test_implicit_maml_of_a_model_with_state_is_the_gradient_through_the_solution():
    rule = nm.Proximal(3.0)
    value, gradient = nm.imaml(centred, rule)(CENTRE, BATCH)

    def total(w):
        return nm.maml(centred, rule)(nm.Stateful({"w": w}, CENTRE.state), BATCH)

    expected = jax.value_and_grad(total)(CENTRE.params["w"])
    same((value, gradient.params["w"]), expected)
    step = 1e-2  # the gradient against a difference of the objective
    slope = (total(0.7 + step) - total(0.7 - step)) / (2 * step)
    np.testing.assert_allclose(gradient.params["w"], slope, rtol=2e-3)
    # The state is updated once on the support, at the solution, and once on the query.
    x_support, x_query = BATCH.support[0], BATCH.query[0]
    mean = 0.9 * (0.9 * 0.2 + 0.1 * x_support.mean((1, 2))) + 0.1 * x_query.mean((1, 2))
    same(gradient.state["mean"], mean.mean())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nm.variables({"w": 1.0}, trained=nnx.Param), "trained is a filter of a Flax NNX"),
        (
            lambda: nm.variables(Module(nnx.Rngs(0)), trained=nnx.PathContains("none")),
            "trained must select variables of Module, got a filter that selects none",
        ),
        (
            lambda: nm.variables(nnx.state(Module(nnx.Rngs(0)))),
            "params hold BatchStat, RngCount, RngKey of Flax NNX, which must not train",
        ),
        (
            lambda: nm.meta_sgd(centred)(CENTRE, BATCH),
            r"MetaSGDParams\(params, rate\) for meta_sgd",
        ),
    ],
)
def test_wrong_models_are_refused(call, message):
    with pytest.raises(TypeError, match=message):
        call()
