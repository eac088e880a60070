"""Exact meta-training in kernel space against the same in parameters, by other code."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tinygp
from jax.tree_util import Partial

import negmaml as nm
from negmaml.kernels import leave_one_task_out, meta_train
from negmaml.linear import Data, meta_system, minimiser
from tests.helpers import mostly_slow

RULES = (
    nm.GradientDescent(-0.7),
    nm.GradientDescent(0.0),
    nm.GradientDescent(0.4),
    nm.GradientDescent(-0.2, steps=3),
    nm.GradientFlow(-0.3),
    nm.GradientFlow(0.8),
    nm.Proximal(0.5),
    nm.Proximal(-9.0),
)


def linear_kernel(a, b):
    return a @ b.T


def draw(m, n_t, n_v, p, outputs=(), key=0):
    normal = np.random.default_rng(key).standard_normal  # of NumPy: no program for every shape
    parts = [(normal((m, n, p)), normal((m, n, *outputs))) for n in (n_t, n_v)]
    return nm.Tasks(*jax.tree.map(jnp.asarray, parts))


def primal(tasks, rule, ridge):
    """omega* of the linear model, by `minimiser`."""
    (x_t, y_t), (x_v, y_v) = tasks
    return minimiser(*meta_system(Data(x_t, y_t, x_v, y_v), rule), meta_ridge=ridge)


WIDE, TALL = (3, 6, 4, 30), (8, 5, 6, 10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("rule", "sizes"), mostly_slow(list(product(RULES, (WIDE, TALL))), 7))
def test_linear_kernel_is_the_linear_minimiser(rule, sizes):
    tasks = draw(*sizes)
    ridges = jnp.array([0.0, 0.3])
    model = meta_train(linear_kernel, tasks, rule, meta_ridge=ridges)
    assert model.well_conditioned.all()
    x = jax.random.normal(jax.random.key(9), (7, sizes[-1]))
    for i, ridge in enumerate(ridges):
        omega = primal(tasks, rule, ridge).omega
        np.testing.assert_allclose(model(x)[i], x @ omega, rtol=0, atol=1e-10)
        np.testing.assert_allclose(model.points.T @ model.weights[i, :, 0], omega, atol=1e-10)


def without(tasks, j):
    return jax.tree.map(lambda x: np.delete(x, j, 0), tasks)


def only(tasks, j):
    return jax.tree.map(lambda x: np.asarray(x)[j : j + 1], tasks)


BY_RULE = nm.GradientDescent(jnp.array([-0.5, 0.0, 0.3])), nm.Proximal(0.7)


# p below, a little below and above m n_v = 24: singular without a ridge, singular with all tasks
# but not without one, and never singular.
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("rule", "p"), mostly_slow(list(product(BY_RULE, (9, 22, 60))), 1))
def test_leaving_a_task_out_is_training_on_the_others(p, rule):
    tasks, ridges = draw(6, 5, 4, p, (2,)), jnp.array([0.0, 0.5])
    left = leave_one_task_out(linear_kernel, tasks, rule, meta_ridge=ridges)
    assert left.well_conditioned.all()
    for adapt in (nm.GradientDescent(jnp.array([-0.4, 0.2])), nm.GradientFlow(0.3)):
        losses = left.losses(adapt)
        for j in range(6):
            model = meta_train(linear_kernel, without(tasks, j), rule, meta_ridge=ridges)
            np.testing.assert_allclose(losses[..., j], model.loss(only(tasks, j), adapt), rtol=1e-8)


# Adapting, and the shapes and batches of results.


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "outputs",
    [pytest.param((), marks=pytest.mark.slow), pytest.param((1,), marks=pytest.mark.slow), (3,)],
)
def test_batches_are_single_models_side_by_side(outputs):
    tasks, test = draw(4, 5, 3, 20, outputs), draw(2, 6, 7, 20, outputs, key=1)
    rates, ridges = jnp.array([[-0.6, 0.0], [0.2, 1.5]]), jnp.array([0.0, 0.1, 3.0])
    adapt = nm.GradientDescent(jnp.array([-0.1, 0.3]), steps=2)
    model = meta_train(linear_kernel, tasks, nm.GradientDescent(rates), meta_ridge=ridges)
    x, support = test.query[0][0], jax.tree.map(lambda leaf: leaf[0], test.support)
    values, adapted, loss = model(x), model.adapt(support, adapt)(x), model.loss(test, adapt)
    assert values.shape == (2, 2, 3, 7, *outputs)
    assert adapted.shape == (2, 2, 3, 2, 7, *outputs)
    assert loss.shape == (2, 2, 3, 2)
    one = meta_train(linear_kernel, tasks, nm.GradientDescent(rates[1, 0]), meta_ridge=ridges[1])
    np.testing.assert_allclose(values[1, 0, 1], one(x), rtol=1e-8)
    own = nm.GradientDescent(0.3, steps=2)
    np.testing.assert_allclose(adapted[1, 0, 1, 1], one.adapt(support, own)(x), rtol=1e-8)
    np.testing.assert_allclose(loss[1, 0, 1, 1], one.loss(test, own), rtol=1e-8)


def network(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(jax.random.key(5), 3)
    shapes = {"w": (4, 30), "b": (30,), "v": (30,)}
    return {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}


def linearised(params):
    """The network's linear model in its parameters, and half the mean squared error."""

    def apply(theta, x):
        change = jax.tree.map(jnp.subtract, theta, params)
        value, slope = jax.jvp(lambda p: network(p, x), (params,), (change,))
        return value + slope

    def loss(theta, data):
        x, y = data
        return jnp.mean((apply(theta, x) - y) ** 2) / 2

    return apply, loss


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("rate", "steps"), mostly_slow([(-0.02, (4,)), (-0.02, (1,)), (0.0, (1, 4)), (0.05, (1, 4))], 0)
)
def test_tangent_model_is_the_linearised_network(params, rate, steps):
    """The same minimiser in parameters, and the same function after `nm.adapt` from it."""
    params = jax.tree.map(lambda leaf: leaf.astype(float), params)
    tasks, test = draw(3, 5, 4, 4), draw(1, 6, 8, 4, key=2)
    apply, loss = linearised(params)
    f0 = Partial(network, params)
    kernel = nm.kernels.empirical_ntk(network, params)
    model = meta_train(kernel, tasks, nm.GradientDescent(rate), f0=f0)
    # omega* = params + J^T weights, J the Jacobian of the points.
    (pulled,) = jax.vjp(lambda p: network(p, model.points), params)[1](model.weights[:, 0])
    omega = jax.tree.map(jnp.add, params, pulled)
    x = test.query[0][0]
    np.testing.assert_allclose(model(x), apply(omega, x), atol=1e-10)

    gradient = jax.jit(jax.grad(nm.maml(loss, nm.GradientDescent(rate))))(omega, tasks)
    assert all(jnp.max(jnp.abs(g)) < 1e-10 for g in jax.tree.leaves(gradient))

    support = jax.tree.map(lambda leaf: leaf[0], test.support)

    @jax.jit
    def in_parameters(rule):
        theta = nm.adapt(loss, omega, support, rule)
        return apply(theta, x), nm.maml(loss, rule)(omega, test)

    for count, test_rate in product(steps, (-0.03, 0.04)):
        rule = nm.GradientDescent(test_rate, count)
        values, expected = in_parameters(rule)
        np.testing.assert_allclose(model.adapt(support, rule)(x), values, atol=1e-10)
        np.testing.assert_allclose(model.loss(test, rule), expected, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_fit_on_the_linearised_network_ends_at_the_kernel_solution(params):
    params = jax.tree.map(lambda leaf: leaf.astype(float), params)
    tasks, rule = draw(2, 5, 4, 4), nm.GradientDescent(-0.02)
    _, loss = linearised(params)
    model = meta_train(
        nm.kernels.empirical_ntk(network, params), tasks, rule, f0=Partial(network, params)
    )
    algorithm = nm.maml_value_and_grad(loss, rule)
    trained = nm.fit(jax.random.key(0), params, algorithm, tasks, optax.sgd(0.05, 0.95, True), 6000)
    assert trained.loss[-1] < 1e-12
    x = jax.random.normal(jax.random.key(3), (9, 4))
    np.testing.assert_allclose(model(x), linearised(params)[0](trained.params, x), atol=1e-5)


# Kernels of others, and derivatives.


@pytest.mark.slow
def test_kernels_of_tinygp_plug_in():
    tasks = draw(4, 5, 3, 1)
    theirs = tinygp.kernels.ExpSquared(scale=1.3) + 0.1 * tinygp.kernels.Matern32(scale=2.0)

    def ours(a, b):
        r = jnp.abs(a - b.T) * 3**0.5 / 2.0
        return jnp.exp(-(((a - b.T) / 1.3) ** 2) / 2) + 0.1 * (1 + r) * jnp.exp(-r)

    x, rule = tasks.query[0][0], nm.GradientDescent(-0.3)
    expected = meta_train(ours, tasks, rule, meta_ridge=0.1)(x)
    model = meta_train(theirs, tasks, rule, meta_ridge=0.1)
    np.testing.assert_allclose(model(x), expected, rtol=1e-4)


def test_kernels_with_a_cross_covariance_plug_in():
    """Those of GPJax: called they take two single points."""

    class Theirs:
        def __call__(self, a, b):
            return jnp.exp(-jnp.sum((a - b) ** 2) / 2)

        def cross_covariance(self, x, y):
            return jax.vmap(lambda a: jax.vmap(lambda b: self(a, b))(y))(x)

    found, expected = (
        meta_train(kernel, SMALL, STEP, meta_ridge=0.1) for kernel in (Theirs(), rbf)
    )
    np.testing.assert_allclose(found(X[0]), expected(X[0]), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_matrix_of_all_points_is_a_kernel_of_indices():
    points = jax.random.normal(jax.random.key(0), (20, 3))
    K = linear_kernel(points, points) + jnp.eye(20)
    indices = jax.random.permutation(jax.random.key(1), 20)
    x_t, x_v = indices[:12].reshape(4, 3), indices[12:].reshape(4, 2)
    y = jax.random.normal(jax.random.key(2), (20,))
    tasks = nm.Tasks((x_t, y[x_t]), (x_v, y[x_v]))
    model = meta_train(lambda i, j: K[i][:, j], tasks, nm.GradientDescent(0.2))

    def kernel(a, b):
        same = jnp.all(a[:, None] == b, -1)
        return linear_kernel(a, b) + same

    inputs = nm.Tasks((points[x_t], y[x_t]), (points[x_v], y[x_v]))
    expected = meta_train(kernel, inputs, nm.GradientDescent(0.2))
    np.testing.assert_allclose(model(jnp.arange(20)), expected(points), atol=1e-10)


@pytest.mark.usefixtures("x64")
# Singular without a ridge, and not.
@pytest.mark.parametrize(
    ("ridge", "p", "axis"), mostly_slow(list(product((0.0, 0.2), (5, 60), (0, 1))), 0)
)
def test_derivatives_are_those_of_the_minimiser(p, ridge, axis):
    tasks, x = draw(4, 5, 4, p), jax.random.normal(jax.random.key(1), (p,))

    def by_kernel(rate, scale):
        model = meta_train(
            lambda a, b: scale * a @ b.T, tasks, nm.GradientDescent(rate), meta_ridge=ridge
        )
        return model(x[None])[0]

    def in_parameters(rate, scale):
        (x_t, y_t), (x_v, y_v) = tasks
        data = Data(scale**0.5 * x_t, y_t, scale**0.5 * x_v, y_v)
        system = meta_system(data, nm.GradientDescent(rate))
        return scale**0.5 * x @ minimiser(*system, meta_ridge=ridge).omega

    @jax.jit
    def both(*at):
        slopes = (jax.grad(f, argnums=axis) for f in (by_kernel, in_parameters))
        return [(slope(*at), jax.grad(slope, argnums=axis)(*at)) for slope in slopes]

    found, expected = both(-0.3, 1.5)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_models_are_pytrees_under_jit_and_vmap():
    tasks, test = draw(4, 5, 3, 20), draw(3, 4, 6, 20, key=1)

    @jax.jit
    @jax.vmap
    def loss(rate):
        model = meta_train(linear_kernel, tasks, nm.GradientDescent(rate), meta_ridge=0.1)
        return model, model.loss(test, nm.GradientDescent(0.1))

    models, losses = loss(jnp.array([-0.3, 0.2]))
    one = meta_train(linear_kernel, tasks, nm.GradientDescent(0.2), meta_ridge=0.1)
    np.testing.assert_allclose(losses[1], one.loss(test, nm.GradientDescent(0.1)), rtol=1e-4)
    np.testing.assert_allclose(models.weights[1], one.weights, rtol=1e-3, atol=1e-5)


# Flags of ill-conditioned solutions, and errors.


def rbf(a, b):
    return jnp.exp(-jnp.sum((a[:, None] - b) ** 2, -1) / 2)


def repeat_query(tasks):
    x, y = tasks.query
    return nm.Tasks(tasks.support, (x.at[:, 1].set(x[:, 0]), y))


def test_a_rank_that_is_not_clear_is_flagged_and_a_ridge_or_float64_clears_it():
    tasks = draw(6, 8, 8, 1)  # 48 smooth functions on a line: eigenvalues fall below rounding
    rule = nm.GradientDescent(jnp.array([-0.2, 0.1]))
    assert not meta_train(rbf, tasks, rule).well_conditioned.any()
    assert meta_train(rbf, tasks, rule, meta_ridge=1e-2).well_conditioned.all()
    few = draw(3, 3, 3, 2)
    sharp = lambda a, b: rbf(a / 1.5, b / 1.5)  # noqa: E731
    with jax.enable_x64(True):
        double = jax.tree.map(lambda leaf: leaf.astype(float), few)
        assert meta_train(sharp, double, rule).well_conditioned.all()


@pytest.mark.usefixtures("x64")
def test_repeated_points_get_their_least_squares():
    tasks, rule = repeat_query(draw(4, 5, 3, 30)), nm.GradientDescent(-0.4)
    model = meta_train(linear_kernel, tasks, rule)
    (x_t, y_t), (x_v, y_v) = tasks
    Phi, r = meta_system(Data(x_t, y_t, x_v, y_v), rule)
    omega = np.linalg.lstsq(Phi, r)[0]
    np.testing.assert_allclose(model.points.T @ model.weights[:, 0], omega, atol=1e-10)
    assert model.well_conditioned
    left = leave_one_task_out(linear_kernel, tasks, rule)
    assert np.isfinite(left.losses(rule)).all()


@pytest.mark.parametrize(
    ("kernel", "error", "words"),
    [
        (lambda a, b: a @ b.T + jnp.arange(len(a))[:, None], ValueError, "symmetric"),
        (lambda a, b: -(a @ b.T), ValueError, "positive semidefinite"),
        (lambda a, b: jnp.abs(a[:, None] - b).sum(-1), ValueError, "positive semidefinite"),
        (lambda a, b: jnp.full((len(a), len(b)), jnp.nan), ValueError, "finite"),
        (lambda a, b: 1j * a @ b.T, TypeError, "real"),
        (lambda a, b: jnp.sum(a) * jnp.sum(b), ValueError, r"shape \(\d+, \d+\)"),
        ("rbf", TypeError, "function"),
    ],
)
def test_kernels_that_are_none_are_refused(kernel, error, words):
    with pytest.raises(error, match=words):
        meta_train(kernel, draw(3, 4, 2, 5), nm.GradientDescent(0.1))


SMALL, STEP = draw(3, 4, 2, 5), nm.GradientDescent(0.1)
X, Y = SMALL.support


@pytest.mark.parametrize(
    ("tasks", "error", "words"),
    [
        (nm.Tasks(X, SMALL.query), TypeError, "pair"),
        (nm.Tasks((X, Y[:, :-1]), SMALL.query), ValueError, "tasks.support must be"),
        (nm.Tasks((X[:-1], Y[:-1]), SMALL.query), ValueError, "the same axis"),
        (nm.Tasks((X[..., :-1], Y), SMALL.query), ValueError, "the same shapes"),
        (nm.Tasks((X, Y[..., None]), SMALL.query), ValueError, "the same shapes"),
        (nm.Tasks((X, Y * jnp.nan), SMALL.query), ValueError, "finite"),
        (nm.Tasks((X, Y + 0j), SMALL.query), TypeError, "real"),
    ],
)
def test_tasks_that_do_not_fit_are_refused(tasks, error, words):
    with pytest.raises(error, match=words):
        meta_train(linear_kernel, tasks, nm.GradientDescent(0.1))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: meta_train(rbf, SMALL, 0.1), TypeError, "GradientDescent"),
        (lambda: meta_train(rbf, SMALL, nm.InnerOptimizer(optax.adam(0.1))), TypeError, "label"),
        (
            lambda: meta_train(rbf, SMALL, nm.Preconditioned(0.1, jnp.ones(5))),
            TypeError,
            "into the kernel",
        ),
        (lambda: meta_train(rbf, SMALL, STEP, meta_ridge=-1.0), ValueError, "0"),
        (
            lambda: meta_train(rbf, SMALL, STEP, meta_ridge=jnp.nan),
            ValueError,
            "finite",
        ),
        (
            lambda: meta_train(rbf, SMALL, STEP, f0=lambda x: x),
            ValueError,
            "f0 must return",
        ),
        (
            lambda: leave_one_task_out(rbf, only(SMALL, 0), nm.GradientDescent(0.1)),
            ValueError,
            "two",
        ),
    ],
)
def test_other_bad_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_support_of_another_form_is_refused():
    model = meta_train(rbf, SMALL, STEP, meta_ridge=0.1)
    with pytest.raises(ValueError, match="one task"):
        model.adapt(SMALL.support, nm.GradientDescent(0.1))
