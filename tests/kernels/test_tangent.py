"""Tangent kernels against the Jacobian itself, and against their infinite-width limit."""

from functools import cache, partial
from itertools import pairwise

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import negmaml as nm
from negmaml.kernels import empirical_ntk, relu_network
from tests.helpers import mostly_slow
from tests.internals import tangent

SIZES = (5, 48, 48, 1)


def init(key, sizes=SIZES):
    """Standard normal weights and biases."""
    keys = iter(jax.random.split(key, 2 * len(sizes)))
    return [
        (jax.random.normal(next(keys), shape), jax.random.normal(next(keys), shape[1:]))
        for shape in pairwise(sizes)
    ]


def network(params, x, bias=0.0):
    """ReLU layers in the parametrisation of `relu_network`, weight variance 2."""
    for i, (weight, shift) in enumerate(params):
        x = jax.nn.relu(x) if i else x
        x = (2 / len(weight)) ** 0.5 * x @ weight + bias**0.5 * shift
    return x


@cache
def jacobian_of(apply):
    """One compiled function for all points, which is most of the time of these tests."""
    return jax.jit(jax.jacobian(apply))


def by_jacobian(apply, params, x1, x2):
    def rows(x):
        jacobian = jacobian_of(apply)(params, x)
        n_outputs = apply(params, x).shape[1:]
        leaves = [leaf.reshape(len(x), *n_outputs, -1) for leaf in jax.tree.leaves(jacobian)]
        return jnp.concatenate(leaves, -1).reshape(len(x), -1), n_outputs

    (left, outputs), (right, _) = rows(x1), rows(x2)
    return left @ right.T / np.prod(outputs, dtype=int)


def points(n, *shape, key=0):
    return jax.random.normal(jax.random.key(key), (n, *shape))


def tied(params, x):
    """One weight both ways, and in a scan-free chain of its own."""
    h = jnp.tanh(x @ params["w"])
    return jnp.tanh(h @ params["w"].T) @ params["v"]


def repeated(params, x):
    """One weight twice in the same way."""
    h = jnp.tanh(x @ params["w"])
    return jnp.tanh(h @ params["w"] + params["b"]) @ params["v"]


def sequence(params, x):
    """A point of several rows, and several outputs: (n, 3, 30) -> (n, 2)."""
    h = jax.nn.gelu(x @ params["w"] + params["b"])
    return jnp.einsum("nti,io->no", h, params["v"])


def images(params, x):
    z = jax.nn.relu(nm.im2col_convolution(x, params["kernel"]))
    return z.reshape(len(x), -1) @ params["head"]


def normals(**shapes):
    return {
        name: jax.random.normal(jax.random.key(i), shape) / shape[0] ** 0.5
        for i, (name, shape) in enumerate(shapes.items())
    }


CASES = {
    "wide network": (network, lambda: init(jax.random.key(0)), (5,)),
    "tied": (tied, lambda: normals(w=(30, 40), v=(30,)), (30,)),
    "repeated": (repeated, lambda: normals(w=(30, 30), b=(30,), v=(30,)), (30,)),
    "sequence": (sequence, lambda: normals(w=(30, 40), b=(40,), v=(40, 2)), (3, 30)),
    "images": (images, lambda: normals(kernel=(3, 3, 1, 4), head=(100, 3)), (5, 5, 1)),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", mostly_slow(CASES, 0, 3))
def test_kernel_is_that_of_the_jacobian(name):
    apply, params, shape = CASES[name]
    params, x1, x2 = params(), points(5, *shape), points(5, *shape, key=1)
    kernel = empirical_ntk(apply, params)
    for left, right in ((x1, x2), (x1, x1)):
        expected = by_jacobian(apply, params, left, right)
        np.testing.assert_allclose(kernel(left, right), expected, rtol=1e-10, atol=1e-12)


def test_wide_layers_keep_their_factors():
    one, _, _ = tangent._plan(*_parts(network, init(jax.random.key(0))), points(1, 5)[0])
    held = jax.eval_shape(one, points(1, 5)[0])
    assert [h.shape for h in held.inputs] == [(1, 5), (1, 48)]
    assert sum(leaf.size for leaf in held.rest) == 48 + 48 + 48 + 1  # biases, the last layer


def _parts(apply, params):
    kernel = empirical_ntk(apply, params)
    return kernel.func, kernel.args[0]


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_blocks_do_not_change_the_kernel(monkeypatch):
    params, x1, x2 = init(jax.random.key(0)), points(11, 5), points(6, 5, key=1)
    whole = empirical_ntk(network, params)(x1, x2)
    monkeypatch.setattr(tangent, "BLOCK_ROWS", 4)
    tangent._kernel.clear_cache()
    kernel = empirical_ntk(network, params)
    np.testing.assert_allclose(kernel(x1, x2), whole, rtol=1e-12)
    np.testing.assert_allclose(kernel(x1, x1), kernel(x1, x1 + 0.0), rtol=1e-12)
    tangent._kernel.clear_cache()


@pytest.mark.slow
def test_flax_and_equinox_models_work_as_they_are():
    module = linen.Sequential([linen.Dense(30), jnp.tanh, linen.Dense(2)])
    x = points(4, 3)
    variables = module.init(jax.random.key(0), x)
    expected = by_jacobian(module.apply, variables, x, x)
    np.testing.assert_allclose(empirical_ntk(module.apply, variables)(x, x), expected, rtol=1e-4)

    model = eqx.nn.MLP(3, 1, 40, 2, key=jax.random.key(1))
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    expected = by_jacobian(lambda p, x: jax.vmap(eqx.combine(p, rest))(x), params, x, x)
    kernel = empirical_ntk(lambda model, x: jax.vmap(model)(x), model)
    np.testing.assert_allclose(kernel(x, x), expected, rtol=1e-4)


def test_new_parameters_do_not_compile_anew():
    x = points(3, 5)
    empirical_ntk(network, init(jax.random.key(0)))(x, x)
    before = tangent._kernel._cache_size()
    empirical_ntk(network, init(jax.random.key(1)))(x, x)
    assert tangent._kernel._cache_size() == before


# Infinite width.


def deviation(width, depth, bias, seeds=16):
    """Root mean square of (finite - infinite) tangent kernel over seeds, relative."""
    x = points(5, 4)
    sizes = (4, *(width,) * depth, 1)
    limit = relu_network(depth, bias_variance=bias)(x, x)

    @jax.jit
    @jax.vmap
    def finite(key):
        return empirical_ntk(partial(network, bias=bias), init(key, sizes))(x, x)

    kernels = finite(jax.random.split(jax.random.key(0), seeds))
    return float(jnp.sqrt(jnp.mean((kernels - limit) ** 2)) / jnp.sqrt(jnp.mean(limit**2)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("depth", "widths"),
    [(1, (32, 512)), pytest.param(3, (32, 128, 512), marks=pytest.mark.slow)],
)
def test_finite_networks_approach_the_limit_as_one_over_the_root_of_the_width(depth, widths):
    errors = np.array([deviation(width, depth, 0.3) for width in widths])
    slope = np.polyfit(np.log(widths), np.log(errors), 1)[0]
    assert -0.62 < slope < -0.38
    assert errors[-1] < 0.15


@pytest.mark.slow
def test_the_covariance_at_initialisation_is_the_process_kernel():
    x = points(4, 3)
    keys = jax.random.split(jax.random.key(0), 4000)
    values = jax.jit(jax.vmap(lambda k: network(init(k, (3, 64, 64, 1)), x, 0.5)[:, 0]))(keys)
    limit = relu_network(2, kind="nngp", bias_variance=0.5)(x, x)
    # A covariance of n samples has a standard error of at most sqrt(2/n) of the variances.
    error = 4 * (2 / 4000) ** 0.5 * jnp.max(limit)
    np.testing.assert_allclose(values.T @ values / 4000, limit, atol=error, rtol=0)


def test_infinite_kernel_is_exact_where_points_repeat():
    x = points(3, 4)
    kernel = relu_network(3)
    # On the diagonal the angle is zero at every layer: depth + 1 layers of the same share.
    np.testing.assert_allclose(jnp.diag(kernel(x, x)), 4 * 2 * jnp.sum(x**2, 1) / 4, rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("inputs", [1, 3])
def test_derivatives_exist_where_points_repeat_and_are_opposite(inputs):
    x = jnp.concatenate([points(3, inputs), -points(2, inputs)]) + 0.0

    def total(variance):
        kernel = relu_network(2, weight_variance=variance, bias_variance=0.3 * (inputs > 1))
        return jnp.sum(kernel(x, x) ** 2)

    slope = (total(2.0 + 1e-5) - total(2.0 - 1e-5)) / 2e-5
    np.testing.assert_allclose(jax.grad(total)(2.0), slope, rtol=1e-6)


@pytest.mark.parametrize(("inputs", "bias"), [(1, 0.5), (3, 0.0), (3, 0.5)])
def test_single_precision_is_single_precision_where_points_nearly_repeat(inputs, bias):
    """An arc cosine near one would have half of the digits."""
    x = np.random.default_rng(0).uniform(-5, 5, (60, inputs)).astype("f")
    x[1], x[2], x[4] = x[0], -x[3], x[5] * np.float32(1.001)
    kernel = relu_network(3, bias_variance=bias)
    single = kernel(x, x)
    with jax.enable_x64(True):
        double = np.asarray(kernel(x.astype(float), x.astype(float)))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, double, atol=3e-5 * double.max(), rtol=0)


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        (
            lambda: empirical_ntk(network, {"n": jnp.arange(3)}),
            ValueError,
            "floating point arrays",
        ),
        (lambda: empirical_ntk(network, {}), ValueError, "floating point arrays"),
        (lambda: empirical_ntk(network, jnp.ones(2, complex)), TypeError, "two real ones"),
        (lambda: relu_network(0), ValueError, "depth"),
        (lambda: relu_network(1, kind="tanh"), ValueError, "'ntk', 'nngp'"),
        (lambda: relu_network(1, weight_variance=-1.0), ValueError, "weight_variance"),
        (lambda: relu_network(1)(jnp.ones(3), jnp.ones(3)), ValueError, "points, d"),
    ],
)
def test_bad_networks_are_refused(wrong, error, words):
    with pytest.raises(error, match=words):
        wrong()


@pytest.mark.parametrize(
    ("apply", "error", "words"),
    [
        (lambda w, x: 1j * (x @ w), TypeError, "real numbers"),
        (lambda w, x: jnp.sum(x @ w), ValueError, "an entry a point"),
        (lambda w, x: (x @ w, x @ w), ValueError, "one array"),
    ],
)
def test_outputs_that_are_no_functions_of_points_are_refused(apply, error, words):
    with pytest.raises(error, match=words):
        empirical_ntk(apply, jnp.ones(3))(jnp.ones((2, 3)), jnp.ones((2, 3)))
