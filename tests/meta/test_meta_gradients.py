"""Every meta-gradient against the plain nested definition, by autodiff and by differences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import negmaml as nm
from tests.helpers import mostly_slow

SHAPES = {"w": (2, 3), "b": (3,), "v": (3, 1)}
HEAD = {"w": False, "b": False, "v": True}


def loss(params, data):
    x, y = data
    hidden = jnp.tanh(x @ params["w"] + params["b"])
    return jnp.mean((jnp.sin(hidden @ params["v"])[:, 0] - y) ** 2)


def setting(count=5, points=4):
    """Parameters and tasks, the same whenever they are asked for."""
    rng = np.random.default_rng(3)
    params = {name: jnp.asarray(rng.standard_normal(s)) for name, s in SHAPES.items()}
    parts = [
        (rng.standard_normal((count, points, 2)), rng.standard_normal((count, points)))
        for _ in range(2)
    ]
    return params, nm.Tasks(*jax.tree.map(jnp.asarray, parts))


def task(tasks, i):
    return jax.tree.map(lambda x: x[i], tasks)


def nested(params, tasks, rates, mask=None, stop=lambda g: g):
    """The objective as it is defined, with loops over steps and leaves; rates: a tree a step."""
    mask = mask or dict.fromkeys(SHAPES, True)

    def one_task(support, query):
        theta = params
        for rate in rates:
            g = stop(jax.grad(loss)(theta, support))
            theta = {k: theta[k] - rate[k] * g[k] if mask[k] else theta[k] for k in theta}
        return loss(theta, query)

    return jnp.mean(jax.vmap(one_task)(*tasks))


def same(computed, expected, rtol=1e-10, atol=1e-12):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=atol), computed, expected)


def every(rate):
    return dict.fromkeys(SHAPES, rate)


def elements(scale):
    return {
        name: scale * np.linspace(-1, 1, int(np.prod(s))).reshape(s) for name, s in SHAPES.items()
    }


# (rate of the rule, its steps, one tree of rates a step)
RATES = {
    "negative": (-0.3, 1, [every(-0.3)]),
    "zero": (0.0, 1, [every(0.0)]),
    "positive": (0.4, 1, [every(0.4)]),
    "three steps": (-0.1, 3, [every(-0.1)] * 3),
    "one a step": (nm.Schedule([0.2, -0.3]), 2, [every(0.2), every(-0.3)]),
    "one a leaf": ({"w": 0.1, "b": -0.2, "v": 0.0}, 2, [{"w": 0.1, "b": -0.2, "v": 0.0}] * 2),
    "one an element": (elements(0.3), 1, [elements(0.3)]),
    "elements and steps": (
        jax.tree.map(lambda a: nm.Schedule(np.stack([a, -2 * a])), elements(0.2)),
        2,
        [elements(0.2), elements(-0.4)],
    ),
}


QUICK = ("elements and steps",)  # several steps, and a rate of either sign for each element


@pytest.fixture(
    params=[
        pytest.param(case, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, case in RATES.items()
    ]
)
def rates(request):
    return request.param


def test_maml_is_the_gradient_of_the_nested_definition(rates, x64):
    rate, steps, each = rates
    params, tasks = setting()
    expected = jax.jit(jax.value_and_grad(lambda p: nested(p, tasks, each)))(params)
    for method in ("mixed", "reverse", "remat", "low-rank", None):
        rule = nm.GradientDescent(rate, steps)
        same(jax.jit(nm.maml_value_and_grad(loss, rule, method=method))(params, tasks), expected)


def differences(objective, params, step=1e-4):
    """The gradient by differences of fourth order, flat."""
    flat, unravel = ravel_pytree(params)
    shifts = step * jnp.array([-2, -1, 1, 2])[:, None, None] * jnp.eye(flat.size)
    values = jax.jit(jax.vmap(jax.vmap(lambda s: objective(unravel(flat + s)))))(shifts)
    return jnp.array([1, -8, 8, -1]) @ values / (12 * step)


@pytest.mark.parametrize("steps", (pytest.param(1, marks=pytest.mark.slow), 3))
def test_maml_is_the_finite_difference_of_its_value(steps, x64):
    params, tasks = setting()

    @jax.jit
    def both(rate):
        rule = nm.GradientDescent(rate, steps)
        gradient = nm.maml_value_and_grad(loss, rule)(params, tasks)[1]
        expected = differences(lambda params: nm.maml(loss, rule)(params, tasks), params)
        return ravel_pytree(gradient)[0], expected

    for rate in (-0.1, 0.0, 0.1):
        np.testing.assert_allclose(*both(rate), rtol=1e-6, atol=1e-9)


def test_first_order_stops_the_gradient_of_every_inner_gradient(rates, x64):
    rate, steps, each = rates
    params, tasks = setting()
    computed = jax.jit(nm.fomaml(loss, nm.GradientDescent(rate, steps)))(params, tasks)

    def stopped(params):
        return nested(params, tasks, each, stop=jax.lax.stop_gradient)

    same(computed, jax.jit(jax.value_and_grad(stopped))(params))


def test_first_order_differs_from_second_order_unless_the_rate_is_zero(x64):
    params, tasks = setting()

    @jax.jit
    def both(rule):
        algorithms = (f(loss, rule) for f in (nm.fomaml, nm.maml_value_and_grad))
        return [ravel_pytree(algorithm(params, tasks)[1])[0] for algorithm in algorithms]

    for rate, equal in ((-0.3, False), (0.0, True), (0.3, False)):
        first, second = both(nm.GradientDescent(rate))
        assert (float(jnp.max(jnp.abs(first - second))) < 1e-14) is equal


def test_anil_adapts_the_head_and_differentiates_everything(rates, x64):
    rate, steps, each = rates
    params, tasks = setting()
    computed = jax.jit(nm.anil(loss, nm.GradientDescent(rate, steps), HEAD))(params, tasks)
    expected = jax.jit(jax.value_and_grad(lambda p: nested(p, tasks, each, HEAD)))(params)
    same(computed, expected)
    assert float(jnp.max(jnp.abs(computed[1]["w"]))) > 1e-4
    support, more = task(tasks, 0).support, nm.GradientDescent(0.3)
    adapted = jax.jit(lambda params: nm.adapt(loss, params, support, more, mask=HEAD))(params)
    np.testing.assert_array_equal(adapted["w"], params["w"])
    assert float(jnp.max(jnp.abs(adapted["v"] - params["v"]))) > 1e-3


def test_a_mask_may_be_a_prefix_of_the_parameters(x64):
    params, tasks = setting()
    nested_params = {"body": {"w": params["w"], "b": params["b"]}, "head": params["v"]}

    def nested_loss(p, data):
        return loss({**p["body"], "v": p["head"]}, data)

    mask = {"body": False, "head": True}
    rule = nm.GradientDescent(-0.4, 2)
    computed = jax.jit(nm.anil(nested_loss, rule, mask))(nested_params, tasks)
    expected = jax.jit(nm.anil(loss, rule, HEAD))(params, tasks)
    same(computed[1]["body"]["w"], expected[1]["w"])
    same(computed[1]["head"], expected[1]["v"])


def test_reptile_is_the_sum_of_the_inner_gradients(x64):
    params, tasks = setting()
    slope = jax.jit(jax.grad(loss))
    reptile = jax.jit(lambda rule: nm.reptile(loss, rule)(params, tasks))
    maml = jax.jit(lambda rule: nm.maml(loss, rule)(params, tasks))
    for rate in (-0.1, 0.0, 0.2):
        expected = jax.tree.map(jnp.zeros_like, params)
        for i in range(5):
            theta = params
            for _ in range(3):
                g = slope(theta, task(tasks, i).support)
                expected = jax.tree.map(lambda e, x: e + x / 5, expected, g)
                theta = jax.tree.map(lambda t, x, rate=rate: t - rate * x, theta, g)
        rule = nm.GradientDescent(rate, 3)
        value, gradient = reptile(rule)
        same(gradient, expected)
        assert float(value) == pytest.approx(float(maml(rule)))


def test_reptile_with_an_optimizer_is_the_change_of_the_parameters(x64):
    params, tasks = setting()
    rule = nm.InnerOptimizer(optax.adam(0.01), 4)
    _, gradient = jax.jit(nm.reptile(loss, rule))(params, tasks)
    adapted = jax.jit(jax.vmap(lambda s: nm.adapt(loss, params, s, rule)))(tasks.support)
    same(gradient, jax.tree.map(lambda p, t: p - jnp.mean(t, 0), params, adapted))


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(optax.sgd(-0.1), id="sgd", marks=pytest.mark.slow),
        pytest.param(
            optax.sgd(0.1, momentum=0.9, nesterov=True), id="momentum", marks=pytest.mark.slow
        ),
        pytest.param(optax.adam(0.05, eps_root=1e-8), id="adam"),
    ],
)
def test_the_meta_gradient_through_an_optimizer_is_that_of_its_updates(optimizer, x64):
    params, tasks = setting(count=2)

    def unrolled(params):
        def one_task(support, query):
            theta, state = params, optimizer.init(params)
            for _ in range(3):
                updates, state = optimizer.update(jax.grad(loss)(theta, support), state, theta)
                theta = optax.apply_updates(theta, updates)
            return loss(theta, query)

        return jnp.mean(jax.vmap(one_task)(*tasks))

    expected = jax.jit(jax.value_and_grad(unrolled))(params)
    for method in ("mixed", "reverse", "remat"):
        algorithm = nm.maml_value_and_grad(loss, nm.InnerOptimizer(optimizer, 3), method=method)
        same(jax.jit(algorithm)(params, tasks), expected, rtol=1e-8)


def test_learned_rates_get_the_gradient_of_the_nested_definition(rates, x64):
    rate, steps, _ = rates
    params, tasks = setting()
    meta = nm.MetaSGDParams(params, jax.tree.map(jnp.asarray, rate))

    def objective(meta):
        return nm.maml(loss, nm.GradientDescent(meta.rate, steps))(meta.params, tasks)

    computed = jax.jit(nm.meta_sgd(loss, steps=steps))(meta, tasks)
    same(computed, jax.jit(jax.value_and_grad(objective))(meta))


@pytest.mark.parametrize("rate", mostly_slow((-0.1, 0.0, 0.2), 0))
def test_the_gradient_in_the_rate_is_the_finite_difference(rate, x64):
    params, tasks = setting()
    meta = nm.MetaSGDParams(params, rate)
    gradient = jax.jit(nm.meta_sgd(loss, steps=2))(meta, tasks)[1].rate
    expected = differences(
        lambda rate: nm.maml(loss, nm.GradientDescent(rate, 2))(params, tasks), rate, 1e-5
    )
    np.testing.assert_allclose(gradient, expected[0], rtol=1e-7)


ALGORITHMS = {
    "maml": nm.maml_value_and_grad,
    "low-rank": partial(nm.maml_value_and_grad, method="low-rank"),
    "reverse": partial(nm.maml_value_and_grad, method="reverse"),
    "fomaml": nm.fomaml,
    "anil": partial(nm.anil, head=HEAD),
    "reptile": nm.reptile,
}
every_algorithm = pytest.mark.parametrize("name", mostly_slow(ALGORITHMS, 0, 5))


@every_algorithm
def test_the_task_batch_size_changes_rounding_only(name, x64):
    params, tasks = setting()
    rule = nm.GradientDescent(-0.3)
    whole = jax.jit(ALGORITHMS[name](loss, rule))(params, tasks)
    for size in (2, 9):
        same(jax.jit(ALGORITHMS[name](loss, rule, batch_size=size))(params, tasks), whole, 1e-12)


@pytest.mark.slow
def test_a_batch_size_serves_the_objective_and_learned_rates_too(x64):
    params, tasks = setting()
    rule = nm.GradientDescent(0.2)
    meta = nm.MetaSGDParams(params, 0.2)
    small, whole = (
        jax.jit(lambda n=n: (nm.maml(loss, rule, batch_size=n)(params, tasks),
                             nm.meta_sgd(loss, batch_size=n)(meta, tasks)))()
        for n in (2, None)
    )  # fmt: skip
    same(small, whole)


def noisy_loss(params, data):
    """A random loss: the data of a task hold its key, and the output has the random numbers."""
    (x, y), key = data
    kept = jax.random.bernoulli(key, 0.7, (3,))
    hidden = jnp.tanh(x @ params["w"] + params["b"]) * kept
    return jnp.mean((hidden @ params["v"])[:, 0] ** 2 - y), {"kept": kept}


@every_algorithm
def test_tasks_may_contain_keys_and_auxiliary_output_is_returned(name, x64):
    params, tasks = setting()
    keys = jax.random.split(jax.random.key(0), 10).reshape(2, 5)
    tasks = nm.Tasks(*((part, k) for part, k in zip(tasks, keys, strict=True)))
    algorithm = ALGORITHMS[name](noisy_loss, nm.GradientDescent(-0.2), has_aux=True, batch_size=2)
    (value, aux), gradient = jax.jit(algorithm)(params, tasks)
    expected = jax.vmap(lambda key: jax.random.bernoulli(key, 0.7, (3,)))(keys[1])
    np.testing.assert_array_equal(aux["kept"], expected)
    assert jnp.isfinite(value) and jax.tree.structure(gradient) == jax.tree.structure(params)


def square_loss(w, data):
    X, y = data
    return jnp.mean((X @ w - y) ** 2) / 2


@pytest.mark.parametrize("strength", mostly_slow((-0.7, 0.3, 2.0), 0))
def test_the_proximal_point_of_a_linear_model_is_its_spectral_filter(strength, x64):
    rng = np.random.default_rng(0)
    X, y, omega = (jnp.asarray(rng.standard_normal(s)) for s in ((8, 5), (8,), (5,)))
    S = X.T @ X / 8
    expected = jnp.linalg.solve(S + strength * jnp.eye(5), X.T @ y / 8 + strength * omega)
    computed = jax.jit(lambda w: nm.adapt(square_loss, w, (X, y), nm.Proximal(strength)))(omega)
    np.testing.assert_allclose(computed, expected, rtol=1e-8)


@pytest.mark.slow
def test_implicit_maml_is_the_finite_difference_of_its_value(x64):
    params, tasks = setting(count=2)
    rule = nm.Proximal(1.5)
    gradient = jax.jit(nm.imaml(loss, rule))(params, tasks)[1]
    expected = differences(lambda params: nm.maml(loss, rule)(params, tasks), params, 1e-3)
    np.testing.assert_allclose(ravel_pytree(gradient)[0], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("strength", mostly_slow((-0.7, 0.5), 0))
def test_implicit_maml_on_the_linear_model_is_the_gradient_of_its_meta_system(strength, x64):
    problem = nm.MixedLinearRegression(p=4, m=3, n_t=6, n_v=5, n_r=2, sigma=0.5, nu=1.0)
    data = nm.linear.sample(jax.random.key(0), problem)
    tasks, omega = nm.Tasks(data[:2], data[2:]), jnp.linspace(-1, 2, 4)
    value, gradient = jax.jit(nm.imaml(square_loss, nm.Proximal(strength)))(omega, tasks)
    Phi, r = nm.linear.meta_system(data, nm.Proximal(strength))
    residual = Phi @ omega - r
    np.testing.assert_allclose(gradient, Phi.T @ residual / problem.rows, rtol=1e-7)
    assert float(value) == pytest.approx(float(residual @ residual) / (2 * problem.rows), rel=1e-8)


@pytest.mark.slow
def test_other_inner_rules_of_sgd_are_gradient_descent(x64):
    params, tasks = setting()
    one = nm.maml_value_and_grad(loss, nm.InnerOptimizer(optax.sgd(-0.2), 2))(params, tasks)
    same(one, nm.maml_value_and_grad(loss, nm.GradientDescent(-0.2, 2))(params, tasks))


def test_a_new_rate_or_new_data_does_not_recompile():
    params, tasks = setting()
    traces = []

    def counted(params, data):
        traces.append(1)
        return loss(params, data)

    @jax.jit
    def step(value_and_grad, params, tasks):
        return value_and_grad(params, tasks)

    step(nm.maml_value_and_grad(counted, nm.GradientDescent(0.1)), params, tasks)
    seen = len(traces)
    for rate in (-0.2, 0.0, 3.0):
        step(nm.maml_value_and_grad(counted, nm.GradientDescent(rate)), params, tasks)
    step(nm.maml_value_and_grad(counted, nm.GradientDescent(0.5)), *setting())
    assert len(traces) == seen
    assert step._cache_size() == 1


def test_float32_and_bfloat16_parameters_get_gradients_of_their_own_type():
    params, tasks = setting()
    for dtype in (jnp.float32, jnp.bfloat16):
        cast = jax.tree.map(lambda x, d=dtype: x.astype(d), (params, tasks))
        for method in ("mixed", "reverse", "low-rank"):
            rule = nm.GradientDescent(-0.1, 2)
            algorithm = nm.maml_value_and_grad(loss, rule, method=method)
            gradient = jax.eval_shape(algorithm, *cast)[1]
            assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(dtype)}


def test_invalid_arguments_raise_with_their_names():
    params, tasks = setting()
    rule = nm.GradientDescent(0.1)
    fine = nm.maml_value_and_grad(loss, rule)
    with pytest.raises(ValueError, match="lead with the same axis"):
        fine(params, nm.Tasks(tasks.support, jax.tree.map(lambda x: x[:3], tasks.query)))
    with pytest.raises(ValueError, match="at least one entry"):
        fine(params, jax.tree.map(lambda x: x[:0], tasks))
    with pytest.raises(TypeError, match=r"Tasks\(support, query\)"):
        fine(params, tasks.support[0])
    with pytest.raises(TypeError, match=r"floating point arrays, got int32\[\]"):
        fine(jnp.array(3), tasks)
    with pytest.raises(ValueError, match="loss must return one real number"):
        nm.maml_value_and_grad(lambda p, d: d[1], rule)(params, tasks)
    with pytest.raises(ValueError, match="has_aux=True"):
        nm.maml_value_and_grad(lambda p, d: (loss(p, d), 1), rule)(params, tasks)
    with pytest.raises(ValueError, match="rate must be finite"):
        nm.GradientDescent(float("nan"))
    with pytest.raises(ValueError, match="mask must be a pytree of booleans"):
        nm.anil(loss, rule, {"w": True})(params, tasks)
    with pytest.raises(ValueError, match="head must hold booleans"):
        nm.anil(loss, rule, {"w": 1, "b": 0, "v": 1})(params, tasks)
    with pytest.raises(ValueError, match="batch_size"):
        nm.maml_value_and_grad(loss, rule, batch_size=0)
    with pytest.raises(ValueError, match="method must be one of"):
        nm.maml_value_and_grad(loss, rule, method="forward")
    with pytest.raises(ValueError, match="low-rank"):
        nm.maml_value_and_grad(loss, nm.InnerOptimizer(optax.sgd(0.1)), method="low-rank")(
            params, tasks
        )
    with pytest.raises(TypeError, match="Proximal"):
        nm.imaml(loss, rule)
    with pytest.raises(TypeError, match="MetaSGDParams"):
        nm.meta_sgd(loss)(params, tasks)
    with pytest.raises(TypeError, match="GradientTransformation"):
        nm.InnerOptimizer(0.1)
    with pytest.raises(ValueError, match=r"got shape \(2,\) .* Schedule"):
        nm.adapt(lambda w, _: w @ w, jnp.ones(3), 0.0, nm.GradientDescent(jnp.ones(2), 2))
    for call in (nm.maml, nm.maml_value_and_grad, nm.fomaml, nm.reptile):
        with pytest.raises(TypeError, match=r"rule must be .* GradientDescent\(0.05\)"):
            call(loss, 0.05)
