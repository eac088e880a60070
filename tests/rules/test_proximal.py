"""Proximal adaptation of any model: a minimum of its objective, or a flag that says otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import negmaml as nm
from tests.helpers import mostly_slow

X = np.array([9.04662123, 1.59300598, -11.87906557])


def logistic(w, _):
    return jnp.mean(jnp.logaddexp(0, -X * w))


def network_loss(params, data):
    x, y = data
    return jnp.mean((jnp.tanh(x @ params["in"]) @ params["out"] - y) ** 2)


def network(inputs, width, rows, scale=1.0):
    """(parameters, data) of a network of one hidden layer."""
    keys = jax.random.split(jax.random.key(2), 4)
    shapes = (inputs, width), (width, 1), (rows, inputs), (rows, 1)
    w, v, x, y = (scale * jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    return {"in": w / inputs**0.5, "out": v / width**0.5}, (x, y)


def objective(loss, start, data, strength):
    """The function of flat parameters that is minimised, and the flat start."""
    flat, unravel = ravel_pytree(start)
    return lambda w: loss(unravel(w), data) + strength / 2 * jnp.sum((w - flat) ** 2), flat


def checked(loss, start, data, strength, **options):
    """(info, |F|, fall of the objective) of one adaptation."""
    rule = nm.Proximal(strength, **options)
    adapted, info = jax.jit(
        lambda start, data: nm.adapt(loss, start, data, rule, return_info=True)
    )(start, data)
    function, flat = objective(loss, start, data, strength)
    end = ravel_pytree(adapted)[0]
    residual = jnp.linalg.norm(jax.grad(function)(end))
    return info, float(residual), float(function(flat) - function(end))


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.float64))
def test_a_logistic_loss_of_one_weight_is_minimised(dtype, x64):
    start, rule = jnp.asarray(4.0074564, dtype), nm.Proximal(0.00181438696)
    w, info = nm.adapt(logistic, start, None, rule, return_info=True)
    assert w.dtype == dtype and bool(info.converged)
    # The root of the derivative, by bisection of a function that rises.
    slope = lambda w: np.mean(-X / (1 + np.exp(X * w))) + 0.00181438696 * (w - 4.0074564)  # noqa: E731
    low, high = -1.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    assert low == pytest.approx(-0.0106, abs=1e-4)
    assert float(w) == pytest.approx(low, abs=1e-6 if dtype == jnp.float32 else 1e-12)


def test_convex_losses_are_minimised_from_any_start(x64):
    """Logistic losses of one weight, labels of one sign or of both: 300 random ones."""
    rng = np.random.default_rng(0)
    x, start = rng.uniform(-20, 20, (300, 3)), rng.uniform(-10, 10, 300)
    strength = 10 ** rng.uniform(-4, 3, 300)

    @jax.jit
    @jax.vmap
    def adapted(x, start, strength):
        loss = lambda w, _: jnp.mean(jnp.logaddexp(0, -x * w))  # noqa: E731
        w, info = nm.adapt(loss, start, None, nm.Proximal(strength), return_info=True)
        whole = lambda w: loss(w, None) + strength / 2 * (w - start) ** 2  # noqa: E731
        return info, jnp.abs(jax.grad(whole)(w)), whole(start) - whole(w)

    info, residual, fall = adapted(x, start, strength)
    assert bool(info.converged.all()) and fall.min() >= 0
    assert np.all(residual <= 1e-10 * (1 + np.abs(x).max(1) + strength * np.abs(start)))


@jax.jit
def adapt_to_all(strength, params, support):
    """Return info, |F| and the rise of the objective for each task."""

    def one(data):
        rule = nm.Proximal(strength)
        adapted, info = nm.adapt(network_loss, params, data, rule, return_info=True)
        function, flat = objective(network_loss, params, data, strength)
        end = ravel_pytree(adapted)[0]
        return info, jnp.linalg.norm(jax.grad(function)(end)), function(end) - function(flat)

    return jax.vmap(one)(support)


def small_network(strength):
    """`adapt_to_all` of a network of 16 weights on 40 sinusoids."""
    tasks = nm.tasks.Sinusoid(m=40, n_t=10, n_v=1)(jax.random.key(3))
    return adapt_to_all(jnp.asarray(strength), network(1, 8, 1)[0], tasks.support)


@pytest.mark.parametrize("strength", (0.1, 1.0, 5.0, 20.0))
def test_every_task_of_a_small_network_ends_at_a_stationary_point(strength, x64):
    info, residual, rise = small_network(strength)
    assert bool(info.converged.all())
    np.testing.assert_allclose(info.residual, residual, atol=1e-12)
    assert residual.max() < 1e-9
    assert rise.max() <= 0


@pytest.mark.parametrize("dtype", mostly_slow((jnp.float32, jnp.float64), 1))
def test_a_wide_network_ends_no_higher_than_gradient_descent_nor_than_its_start(dtype, x64):
    start, data = jax.tree.map(lambda x: x.astype(dtype), network(8, 32, 20, scale=0.5))
    info, residual, fall = checked(network_loss, start, data, 0.1)
    function, flat = objective(network_loss, start, data, 0.1)
    descend = jax.jit(
        lambda w: jax.lax.fori_loop(0, 2000, lambda _, w: w - 0.1 * jax.grad(function)(w), w)
    )
    assert bool(info.converged) and residual < (1e-4 if dtype == jnp.float32 else 1e-9)
    assert fall >= float(function(flat) - function(descend(flat))) - 1e-6


def test_a_start_of_negative_curvature_is_left(x64):
    """(w^2 - 1)^2 near its maximum at 0, where H + strength < 0: Newton's step goes uphill."""
    double_well = lambda w, _: (w**2 - 1) ** 2  # noqa: E731
    info, residual, fall = checked(double_well, jnp.asarray(0.01), None, 0.5)
    assert bool(info.converged) and residual < 1e-9 and fall > 0.7


def test_a_quadratic_takes_one_newton_step(x64):
    def square(w, data):
        return jnp.mean((data[0] @ w - data[1]) ** 2) / 2

    rng = np.random.default_rng(0)
    data = jnp.asarray(rng.standard_normal((30, 12))), jnp.asarray(rng.standard_normal(30))
    for strength in (1e-3, 1.0, 50.0, -0.3):
        info, residual, _ = checked(square, jnp.ones(12), data, strength)
        assert bool(info.converged) and int(info.steps) == 1 and residual < 1e-10


def test_a_stationary_start_is_returned_as_it_is():
    start = jnp.asarray([0.0, 2.0])
    w, info = nm.adapt(lambda w, t: jnp.sum((w - t) ** 4), start, start, nm.Proximal(1.0),
                       return_info=True)  # fmt: skip
    np.testing.assert_array_equal(w, start)
    assert bool(info.converged) and int(info.steps) == 0 and float(info.residual) == 0


@pytest.mark.slow
@pytest.mark.parametrize("scale", mostly_slow((1e-4, 1.0, 1e4), 2))
def test_single_precision_reaches_its_tolerance_in_any_units(scale):
    """In units of `scale` for weights, and started again from where it ended."""
    params, data = network(3, 8, 12)
    scaled = lambda p, d: network_loss(jax.tree.map(lambda w: w / scale, p), d)  # noqa: E731
    start = jax.tree.map(lambda w: scale * w, params)
    adapt = jax.jit(
        lambda p: nm.adapt(scaled, p, data, nm.Proximal(0.5 / scale**2), return_info=True)
    )
    end, info = adapt(start)
    assert bool(info.converged)
    assert bool(adapt(end)[1].converged)


@pytest.mark.parametrize("strength", (-100.0, -20.0, -1.0))
def test_a_negative_strength_gives_a_stationary_point_or_says_that_it_does_not(strength, x64):
    info, residual, _ = small_network(strength)
    np.testing.assert_array_equal(info.converged, residual < 1e-8)
    assert strength == -1.0 or bool(info.converged.all())


@pytest.mark.slow
def test_too_few_steps_and_a_loss_without_minimum_do_not_converge(x64):
    start, data = network(8, 32, 20)
    info, residual, fall = checked(network_loss, start, data, 0.1, max_steps=2)
    assert not bool(info.converged) and int(info.steps) == 2 and fall >= 0
    assert float(info.residual) == pytest.approx(residual) and residual > 1e-3
    info, _, _ = checked(lambda w, _: -(w**4), jnp.asarray(1.0), None, 0.1)
    assert not bool(info.converged)
    info, _, _ = checked(lambda w, _: jnp.sqrt(w), jnp.asarray(-1.0), None, 0.1)  # NaN
    assert not bool(info.converged)


@pytest.mark.slow
def test_a_loose_tolerance_takes_fewer_steps(x64):
    start, data = network(8, 32, 20)
    loose, far, _ = checked(network_loss, start, data, 0.1, tolerance=1e-2)
    tight, near, _ = checked(network_loss, start, data, 0.1)
    assert bool(loose.converged) and int(loose.steps) < int(tight.steps) and far > near


@pytest.mark.slow
def test_leaves_of_several_types_keep_them_and_converge():
    start, data = network(3, 8, 12)
    start["out"] = start["out"].astype(jnp.bfloat16)
    adapted, info = nm.adapt(network_loss, start, data, nm.Proximal(0.5), return_info=True)
    assert adapted["out"].dtype == jnp.bfloat16 and adapted["in"].dtype == jnp.float32
    assert bool(info.converged)
