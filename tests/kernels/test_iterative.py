"""Conjugate gradients find what the direct solution is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm
from negmaml.kernels import meta_train, relu_network
from tests.helpers import mostly_slow
from tests.internals import iterative, points

RATES = nm.GradientDescent(jnp.array([-0.4, 0.0, 0.2]))
RIDGES = jnp.array([1e-2, 1.0])


def quadratic(m, n):
    return nm.tasks.Quadratic(p=4, m=m, n_t=n, n_v=n, sigma=0.3, nu=1.0)(jax.random.key(0))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("rule", mostly_slow([RATES, nm.Proximal(0.5)], 0))
def test_iterative_is_direct(rule, monkeypatch):
    monkeypatch.setattr(points, "TILE", 64)
    monkeypatch.setattr(iterative, "TILE", 64)  # of 200 points: four blocks, the last not full
    monkeypatch.setattr(iterative, "RANK", 30)
    tasks, kernel = quadratic(10, 10), relu_network(1, bias_variance=0.5)
    direct, found = (
        meta_train(kernel, tasks, rule, meta_ridge=RIDGES, method=method)
        for method in ("direct", "iterative")
    )
    assert found.well_conditioned.all()
    x = tasks.query[0][0]
    np.testing.assert_allclose(found(x), direct(x), atol=1e-6 * float(jnp.abs(direct(x)).max()))


def rbf(x, y):
    return jnp.exp(-jnp.sum((x[:, None] - y) ** 2, -1) / 8)


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(iterative, "ITERATIONS", 2)
    monkeypatch.setattr(iterative, "RANK", 2)
    iterative.train_iteratively.clear_cache()
    yield
    iterative.train_iteratively.clear_cache()


def test_what_does_not_converge_is_flagged_and_warns(few_steps):
    with pytest.warns(nm.ConvergenceWarning, match="larger meta_ridge"):
        model = meta_train(rbf, quadratic(8, 7), RATES, meta_ridge=RIDGES, method="iterative")
        jax.effects_barrier()
    assert not model.well_conditioned.all()


@pytest.mark.slow
def test_a_derivative_that_does_not_converge_warns(few_steps):
    """Labels of zero are solved at once; what a label does to the weights is not."""
    tasks = quadratic(8, 7)

    def weights(scale):
        labels = tasks._replace(
            support=(tasks.support[0], scale * tasks.support[1]),
            query=(tasks.query[0], scale * tasks.query[1]),
        )
        model = meta_train(rbf, labels, nm.GradientDescent(0.1), method="iterative")
        return model.weights.sum(), model.well_conditioned

    assert weights(0.0) == (0, True)
    with pytest.warns(nm.ConvergenceWarning, match="derivatives"):
        jax.block_until_ready(jax.jvp(lambda scale: weights(scale)[0], (0.0,), (1.0,)))
        jax.effects_barrier()


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_every_output_is_solved_even_if_another_is_larger(monkeypatch):
    monkeypatch.setattr(iterative, "RANK", 2)
    (x_t, y_t), (x_v, y_v) = quadratic(8, 7)
    x = x_v.reshape(-1, 4)
    easy = jnp.linalg.eigh(rbf(x, x))[1][:, -1].reshape(y_v.shape)  # one iteration solves it
    both = nm.Tasks((x_t, jnp.stack([y_t, y_t], -1)), (x_v, jnp.stack([easy, 1e-12 * y_v], -1)))
    iterative.train_iteratively.clear_cache()
    direct, found = (
        meta_train(rbf, both, nm.GradientDescent(0.0), meta_ridge=1e-3, method=method)
        for method in ("direct", "iterative")
    )
    iterative.train_iteratively.clear_cache()
    assert found.well_conditioned
    largest = jnp.abs(direct.weights).max(0)
    np.testing.assert_allclose(found.weights / largest, direct.weights / largest, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_derivatives_are_those_of_the_direct_solution():
    tasks = quadratic(4, 5)

    def loss(numbers, method):
        model = meta_train(
            rbf, tasks, nm.GradientDescent(numbers[0]), meta_ridge=numbers[1],
            method=method,
        )  # fmt: skip
        return model.loss(tasks, nm.GradientDescent(0.1))

    at = jnp.array([0.2, 0.1])
    direct, found = (jax.grad(loss)(at, method) for method in ("direct", "iterative"))
    np.testing.assert_allclose(found, direct, rtol=1e-7)


def test_unknown_methods_are_refused():
    with pytest.raises(ValueError, match="'direct', 'iterative'"):
        meta_train(relu_network(1), quadratic(2, 3), RATES, method="cg")


@pytest.mark.slow
def test_ten_thousand_points_without_a_kernel_matrix():
    """Fresh tasks have the loss that training on these promises, and each residual is small."""
    tasks, test = quadratic(500, 10), quadratic(501, 10)
    rule = nm.GradientDescent(jnp.array([-0.2, 0.2]))
    model = meta_train(relu_network(1, bias_variance=0.5), tasks, rule, meta_ridge=1.0)
    assert model.well_conditioned.all()
    assert model.points.shape == (10_000, 4)
    few = jax.tree.map(lambda leaf: leaf[-50:], test)
    zero = jnp.mean(few.query[1] ** 2) / 2
    assert (model.loss(few, nm.GradientDescent(0.2)) < 0.7 * zero).all()
