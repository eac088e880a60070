"""The multi-step loss and MAML++ against plain loops with nested derivatives, in float64."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import negmaml as nm

linen, nnx = pytest.importorskip("flax.linen"), pytest.importorskip("flax.nnx")

KEY = jax.random.key(0)
RATES = (-0.05, 0.02)  # by step, of both signs
STEPS = len(RATES)
ANNEALING = 8

pytestmark = pytest.mark.usefixtures("x64")


def batch():
    return nm.tasks.Sinusoid(m=2, n_t=4, n_v=5)(KEY)


def same(first, second):
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


# Each kind of model: (model, loss, (params, state), its loss as a function of these).


def centred(params, mean, data):
    """A loss with a running mean of the inputs."""
    mean = 0.8 * mean + 0.2 * data[0].mean()
    hidden = jnp.tanh((data[0] - mean) @ params["w"])
    return jnp.mean((hidden @ params["v"] - data[1]) ** 2), mean


def plain():
    params = {"w": jnp.linspace(-1, 1, 3)[None], "v": jnp.ones((3, 1))}
    parts = params, jnp.asarray(0.3)
    return nm.Stateful(*parts), centred, parts, centred


class Module(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first, self.last = nnx.Linear(1, 3, rngs=rngs), nnx.Linear(3, 1, rngs=rngs)
        self.norm = nnx.BatchNorm(3, momentum=0.9, rngs=rngs)

    def __call__(self, x):
        return self.last(jnp.tanh(self.norm(self.first(x))))


def module_loss(module, data):
    # The running variance enters the loss, so that its gradient depends on the step's own state.
    value = jnp.mean((module(data[0]) - data[1]) ** 2)
    return value * module.norm.var[...].sum()


def module():
    made = Module()
    nnx.update(made, jax.tree.map(lambda x: jnp.asarray(x, float), nnx.state(made)))
    graph, params, rest = nnx.split(made, nnx.Param, ...)

    def loss(params, rest, data):
        own = nnx.merge(graph, params, rest, copy=True)
        return module_loss(own, data), nnx.state(own, nnx.Not(nnx.Param))

    return made, module_loss, (params, rest), loss


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.BatchNorm(use_running_average=False, momentum=0.9)(linen.Dense(3)(x))
        return linen.Dense(1)(jnp.tanh(x))


def linen_loss(variables, data):
    predicted, new = Linen().apply(variables, data[0], mutable=["batch_stats"])
    scale = jax.tree.leaves(new)[-1].sum()
    return scale * jnp.mean((predicted - data[1]) ** 2), new


def collections():
    made = jax.tree.map(lambda x: jnp.asarray(x, float), Linen().init(KEY, jnp.ones((1, 1))))
    parts = made["params"], {"batch_stats": made["batch_stats"]}

    def loss(params, state, data):
        return linen_loss({"params": params, **state}, data)

    return made, linen_loss, parts, loss


@partial(jax.jit, static_argnums=(0, 1))
def by_hand(loss, first_order, parts, rates, weights):
    """((value, mean states by step), (gradient in params, in rates)) by a loop over steps."""
    constant = jax.lax.stop_gradient if first_order else lambda x: x

    def one_task(params, rates, support, query):
        theta, own, value = params, [parts[1]] * (STEPS + 1), 0.0
        for k in range(STEPS):
            gradient, own[k] = constant(jax.grad(loss, has_aux=True)(theta, own[k], support))
            theta = jax.tree.map(lambda t, g, r, k=k: t - r[k] * g, theta, gradient, rates)
            own_loss, last = loss(theta, own[k + 1], query)
            value += weights[k] * own_loss
        own[-1] = last
        return value, own

    def total(params, rates):
        found = jax.vmap(one_task, (None, None, 0, 0))(params, rates, *batch())
        return jax.tree.map(lambda x: x.mean(0), found)

    return jax.value_and_grad(total, (0, 1), has_aux=True)(parts[0], rates)


@pytest.mark.parametrize("kind", [plain, module, collections])
def test_maml_plus_plus_is_a_plain_loop_at_every_outer_step(kind):
    model, loss, parts, own_loss = kind()
    start = nm.maml_plus_plus_params(model, rate=nm.Schedule(jnp.asarray(RATES)), steps=STEPS)
    algorithm = jax.jit(nm.maml_plus_plus(loss, annealing=ANNEALING, second_order_from=3))
    rates = jax.tree.map(lambda _: jnp.asarray(RATES), parts[0])
    for outer in (0, 2, 5, 9):
        count = start.params.counter._replace(outer=jnp.asarray(outer))
        point = start._replace(params=dataclasses.replace(start.params, counter=count))
        value, gradient = algorithm(point, batch())
        share = min(outer / ANNEALING, 1)
        weights = np.full(STEPS, (1 - share) / STEPS) + share * np.arange(STEPS)
        (expected, states), slopes = by_hand(own_loss, outer < 3, parts, rates, weights)
        same((value, gradient.params.model, gradient.rate), (expected, *slopes))
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
        same(gradient.params.states, stacked)
        assert gradient.params.counter == (0, outer + 1)


def nested(weights, steps):
    """The multi-step loss by adapting anew for every number of steps."""
    _, loss, parts, _ = plain()

    def total(params, rate):
        start, value = nm.Stateful(params, parts[1]), 0.0
        for i in range(2):
            support, query = jax.tree.map(lambda x, i=i: x[i], tuple(batch()))
            for k in range(steps):
                rule = nm.GradientDescent(rate, k + 1)
                value += weights[k] / 2 * loss(*nm.adapt(loss, start, support, rule), query)[0]
        return value

    return jax.value_and_grad(total)(parts[0], jnp.asarray(-0.1))


@pytest.mark.parametrize(
    "options", [{}, {"method": "remat"}, {"batch_size": 1}, {"method": "remat", "segment": 2}]
)
@pytest.mark.parametrize("weights", [(0.5, -1.0, 2.0), (3.0,)])
def test_step_weights_weigh_the_query_losses_after_each_step(weights, options):
    model, loss, *_ = plain()
    rule = nm.GradientDescent(-0.1, len(weights))
    algorithm = nm.maml_value_and_grad(loss, rule, step_weights=weights, **options)
    value, gradient = algorithm(model, batch())
    same((value, gradient.params), nested(weights, len(weights)))
    options.pop("method", None)
    same(nm.maml(loss, rule, step_weights=weights, **options)(model, batch()), value)


def test_a_weight_on_the_last_step_only_is_maml():
    model, loss, *_ = plain()
    rule, last = nm.GradientDescent(0.1, 3), jnp.array([0.0, 0.0, 1.0])
    weighted = nm.maml_value_and_grad(loss, rule, step_weights=last)
    expected = nm.maml_value_and_grad(loss, rule)
    same(weighted(model, batch()), expected(model, batch()))
    # Without annealing MAML++ is Meta-SGD.
    start = nm.maml_plus_plus_params({"w": 0.3}, rate=-0.2, steps=3)
    square = lambda p, data: jnp.mean((data[0] * p["w"] - data[1]) ** 2)  # noqa: E731
    value, gradient = nm.maml_plus_plus(square, annealing=0)(start, batch())
    params = nm.MetaSGDParams({"w": 0.3}, start.rate)
    expected = nm.meta_sgd(square, steps=3)(params, batch())
    same((value, gradient.params.model, gradient.rate), (expected[0], *expected[1]))


def test_a_function_of_the_outer_step_gives_the_weights():
    model, loss, *_ = plain()
    start = nm.maml_plus_plus_params(model, rate=-0.1, steps=2)

    def annealing(step):
        return jnp.stack([0.5 / (1 + step), 1.0])

    found = nm.maml_plus_plus(loss, annealing=annealing)(start, batch())
    weighted = nm.maml_value_and_grad(loss, nm.GradientDescent(-0.1, 2), step_weights=(0.5, 1.0))
    own = weighted(start.params, batch())
    same((found[0], found[1].params.model), (own[0], own[1].model))
    with pytest.raises(ValueError, match=r"weight for each of 2 inner steps, got shape \(\)"):
        nm.maml_plus_plus(loss, annealing=lambda step: 1.0)(start, batch())


def test_only_one_order_is_computed():
    model, loss, *_ = plain()
    start = nm.maml_plus_plus_params(model, rate=-0.1, steps=2)
    algorithm = nm.maml_plus_plus(loss, annealing=0, second_order_from=3)
    names = [e.primitive.name for e in jax.make_jaxpr(algorithm)(start, batch()).eqns]
    assert names.count("cond") == 1 and "scan" not in names  # both loops are within its branches


def test_fit_counts_outer_steps_and_resumes_and_the_trained_object_tests_itself():
    model, loss, *_ = plain()
    start = nm.maml_plus_plus_params(model, rate={"w": 0.01, "v": -0.02}, steps=2)
    algorithm = nm.maml_plus_plus(loss, annealing=4, second_order_from=3)
    tasks = nm.tasks.Sinusoid(m=2, n_t=4, n_v=5)
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 6))
    whole = nm.fit(KEY, start, algorithm, tasks, optimizer, 6)
    first = nm.fit(KEY, start, algorithm, tasks, optimizer, 2)
    resumed = nm.fit(KEY, start, algorithm, tasks, optimizer, 4, state=first)
    same(resumed.params, whole.params)
    trained = whole.params
    assert trained.params.counter == (0, 6) and trained.rule.steps == 2
    # More steps than in training: the last rates and the last statistics are used.
    longer = nm.GradientDescent(trained.rate, 4)
    support, query = jax.tree.map(lambda x: x[0], tuple(batch()))
    adapted = nm.adapt(loss, trained.params, support, longer)
    assert adapted.counter.inner == 4
    theta = trained.params.model.params
    states = list(trained.params.states)
    for k in range(4):
        g, states[min(k, 2)] = jax.grad(loss, has_aux=True)(theta, states[min(k, 2)], support)
        theta = {n: theta[n] - trained.rate[n].values[min(k, 1)] * g[n] for n in theta}
    same(adapted.model, (theta, states[2]))
    tested = nm.evaluate(KEY, trained.params, loss, longer, batch())
    same(tested.values[0], loss(theta, states[2], query)[0])


def test_seeds_train_under_vmap():
    model, loss, *_ = plain()
    algorithm = nm.maml_plus_plus(loss, annealing=2, second_order_from=1)

    def train(rate):
        start = nm.maml_plus_plus_params(model, rate=rate, steps=2)
        return nm.fit(KEY, start, algorithm, batch(), optax.adam(1e-2), 3).params

    rates = jnp.array([-0.02, 0.01])
    together = jax.vmap(train)(rates)
    same(together, jax.tree.map(lambda *x: jnp.stack(x), *map(train, rates)))


def test_random_keys_differ_from_step_to_step():
    def drawn(params, state, data):
        return params * jax.random.normal(state), state

    start = nm.per_step_model(nm.Stateful(1.0, KEY), steps=2)
    tasks = nm.Tasks(jnp.zeros(3), jnp.zeros(3))
    tested = nm.evaluate(KEY, start, drawn, nm.GradientDescent(0.0, 2), tasks, per_step=True)
    assert len(np.unique(tested.values)) == 9


def test_a_state_for_each_step_goes_with_every_algorithm():
    model, loss, *_ = plain()
    own = nm.per_step_model(model, 2)
    rule = nm.GradientDescent(-0.1, 2)
    stepped, init = nm.per_step_state(loss, 2)
    as_functions = nm.Stateful(model.params, init(model.state))
    for make in (nm.maml_value_and_grad, nm.fomaml, nm.reptile):
        value, gradient = make(loss, rule)(own, batch())
        expected, other = make(stepped, rule)(as_functions, batch())
        same((value, gradient.model, gradient.states), (expected, other.params, other.state.stack))
