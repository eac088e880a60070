"""Conjugate gradients find what the direct solution is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm
from negmaml.kernels import iterative, meta_train, points, relu_network
from tests.helpers import mostly_slow

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
    assert found.reliable.all()
    x = tasks.query[0][0]
    np.testing.assert_allclose(found(x), direct(x), atol=1e-6 * float(jnp.abs(direct(x)).max()))


def test_what_does_not_converge_is_flagged(monkeypatch):
    monkeypatch.setattr(iterative, "ITERATIONS", 2)
    monkeypatch.setattr(iterative, "RANK", 2)
    iterative.train_iteratively.clear_cache()
    model = meta_train(
        relu_network(2), quadratic(8, 7), RATES, meta_ridge=RIDGES, method="iterative"
    )
    assert not model.reliable.all()
    iterative.train_iteratively.clear_cache()


def test_unknown_methods_are_refused():
    with pytest.raises(ValueError, match="'direct', 'iterative'"):
        meta_train(relu_network(1), quadratic(2, 3), RATES, method="cg")


@pytest.mark.slow
def test_ten_thousand_points_without_a_kernel_matrix():
    """Fresh tasks have the loss that training on these promises, and each residual is small."""
    tasks, test = quadratic(500, 10), quadratic(501, 10)
    rule = nm.GradientDescent(jnp.array([-0.2, 0.2]))
    model = meta_train(relu_network(1, bias_variance=0.5), tasks, rule, meta_ridge=1.0)
    assert model.reliable.all()
    assert model.points.shape == (10_000, 4)
    few = jax.tree.map(lambda leaf: leaf[-50:], test)
    zero = jnp.mean(few.query[1] ** 2) / 2
    assert (model.loss(few, nm.GradientDescent(0.2)) < 0.7 * zero).all()
