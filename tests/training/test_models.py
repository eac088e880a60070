"""Models of other libraries, with running statistics, in inner and outer loops."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import negmaml as nm

KEY, TASKS = jax.random.key(0), nm.tasks.Sinusoid(m=3, n_t=4, n_v=4)
RULE = nm.GradientDescent(-0.05, 2)


def square(predicted, data):
    return jnp.mean((predicted - data[1]) ** 2)


def trained(loss, params, **options):
    algorithm = nm.maml_value_and_grad(loss, RULE)
    return nm.fit(KEY, params, algorithm, TASKS, optax.adam(1e-2), 3, **options)


def check_statistics(loss, start, mean_of):
    """Assert that the running mean after a training step is the mean over tasks of the model's.

    mean_of: the running mean in a state.
    """
    tasks = TASKS(jax.random.fold_in(jax.random.fold_in(KEY, 0), 0))
    algorithm = nm.maml_value_and_grad(loss, RULE)
    first = nm.fit(KEY, start, algorithm, TASKS, optax.sgd(0.0), 1).params
    gradient_of, value_of = jax.jit(jax.value_and_grad(loss, has_aux=True)), jax.jit(loss)
    ends = []
    for i in range(3):
        support, query = jax.tree.map(lambda x, i=i: x[i], tuple(tasks))
        theta, state = start
        for _ in range(2):
            (_, state), gradient = gradient_of(theta, state, support)
            theta = jax.tree.map(lambda t, g: t + 0.05 * g, theta, gradient)
        ends.append(mean_of(value_of(theta, state, query)[1]))
    np.testing.assert_allclose(mean_of(first.state), np.mean(ends, 0), rtol=1e-4, atol=1e-6)
    assert np.abs(ends[0] - mean_of(start.state)).max() > 1e-3
    assert jax.tree.structure(first) == jax.tree.structure(start)


def test_flax_nnx_with_batch_norm():
    nnx = pytest.importorskip("flax.nnx")

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.first, self.last = nnx.Linear(1, 4, rngs=rngs), nnx.Linear(4, 1, rngs=rngs)
            self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)

        def __call__(self, x):
            return self.last(jnp.tanh(self.norm(self.first(x))))

    graph, params, rest = nnx.split(Network(nnx.Rngs(0)), nnx.Param, ...)

    def loss(params, state, data):
        model = nnx.merge(graph, params, state, copy=True)
        value = square(model(data[0]), data)
        return value, nnx.state(model, nnx.Not(nnx.Param))

    start = nm.Stateful(params, rest)
    check_statistics(loss, start, lambda s: np.asarray(s["norm"]["mean"][...]))


@pytest.mark.slow
def test_equinox_with_batch_norm():
    eqx = pytest.importorskip("equinox")

    class Network(eqx.Module):
        first: eqx.nn.Linear
        norm: eqx.nn.BatchNorm
        last: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key)
            self.first = eqx.nn.Linear(1, 4, key=keys[0])
            self.norm = eqx.nn.BatchNorm(4, axis_name="rows", momentum=0.9, mode="batch")
            self.last = eqx.nn.Linear(4, 1, key=keys[1])

        def __call__(self, x, state):
            hidden, state = self.norm(self.first(x), state)
            return self.last(jnp.tanh(hidden)), state

    model, state = eqx.nn.make_with_state(Network)(KEY)
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params, state, data):
        of_row = jax.vmap(eqx.combine(params, static), axis_name="rows", in_axes=(0, None),
                          out_axes=(0, None))  # fmt: skip
        predicted, state = of_row(data[0], state)
        return square(predicted, data), state

    index = model.norm.batch_state_index

    def mean_of(state):
        return np.asarray(state.get(index)[1][0])

    check_statistics(loss, nm.Stateful(params, state), mean_of)

    def whole(model, state, data):  # the module as it is, functions and settings included
        return loss(eqx.filter(model, eqx.is_inexact_array), state, data)

    result = trained(whole, nm.Stateful(model, state))
    assert isinstance(result.params.params, Network) and np.isfinite(result.loss).all()
    test = nm.evaluate(KEY, result.params, whole, RULE, TASKS, episodes=3, per_step=True)
    assert np.isfinite(test.values).all()


@pytest.mark.slow
def test_dicts_of_modules_as_in_haiku():
    """{module: {name: array}} for parameters and for state, and a function of both."""
    params = {"linear": {"w": jnp.ones((1, 4)), "b": jnp.zeros(4)}, "last": {"w": jnp.ones((4, 1))}}
    state = {"norm/mean": {"average": jnp.zeros(4), "counter": jnp.zeros((), jnp.int32)}}

    def loss(params, state, data):
        hidden = data[0] @ params["linear"]["w"] + params["linear"]["b"]
        old = state["norm/mean"]
        mean = 0.9 * old["average"] + 0.1 * hidden.mean(0)
        new = {"norm/mean": {"average": mean, "counter": old["counter"] + 1}}
        return square(jnp.tanh(hidden - hidden.mean(0)) @ params["last"]["w"], data), new

    start = nm.Stateful(params, state)
    check_statistics(loss, start, lambda s: np.asarray(s["norm/mean"]["average"]))
    counter = trained(loss, start).params.state["norm/mean"]["counter"]
    assert int(counter) == 9 and counter.dtype == jnp.int32  # three steps of two inner and a query


@pytest.mark.slow
def test_an_equinox_module_trains_unchanged():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(1, 1, 4, 1, activation=jnp.tanh, key=KEY)

    def loss(model, data):
        return square(jax.vmap(model)(data[0]), data)

    params, static = eqx.partition(model, eqx.is_inexact_array)
    result = trained(loss, model, callback=lambda step, metrics, model: model(jnp.ones(1)))
    apart = trained(lambda params, data: loss(eqx.combine(params, static), data), params)
    assert isinstance(result.params, eqx.nn.MLP) and result.params.activation is model.activation
    np.testing.assert_allclose(result.loss, apart.loss, rtol=1e-5)
    further = nm.fit(KEY, None, nm.maml_value_and_grad(loss, RULE), TASKS, optax.adam(1e-2), 1,
                     state=result)  # fmt: skip
    assert int(further.step) == 4
