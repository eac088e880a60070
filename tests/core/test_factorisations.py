"""Functions of one matrix, whose `vmap`s are small calls: values and derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.internals import SAFE_WORK, cpu_safe_vmap, eigh, inverse, linear_solve

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("count", [1, 5, 16, 37])
def test_small_batches_are_the_whole(count):
    """Nested, with arrays that all share, and with batches that do not go into the count."""
    double = cpu_safe_vmap(lambda n, k: SAFE_WORK / 5)(lambda A, b: A @ b)
    A, b = np.arange(count * 12.0).reshape(count, 1, 4, 3), np.arange(6.0).reshape(2, 3)
    nested = jax.vmap(jax.vmap(double, (None, 0)), (0, None))
    np.testing.assert_allclose(nested(A[:, 0], b), np.einsum("xij,yj->xyi", A[:, 0], b))


def matrices(*shape):
    A = jax.random.normal(jax.random.key(0), shape)
    return A + A.mT


def columns(*shape):
    return jax.random.normal(jax.random.key(1), shape)


ALIKE = {
    "eigh": (lambda A, b: eigh(A)[0] @ b, lambda A, b: jnp.linalg.eigh(A)[0] @ b),
    "solve": (linear_solve, jnp.linalg.solve),
    "inverse": (lambda A, b: inverse(A) @ b, lambda A, b: jnp.linalg.inv(A) @ b),
}


@pytest.mark.parametrize(("ours", "plain"), ALIKE.values(), ids=ALIKE)
def test_as_the_functions_of_jax(ours, plain):
    """In two vmaps, of which one maps only the matrix, with derivatives of every order."""
    A, b = matrices(40, 9, 9), columns(2, 9)

    def everything(function):
        def of_both(A, b):
            return jnp.sum(function(A, b) ** 2)

        values = jax.vmap(jax.vmap(function, (0, None)), (None, 0))(A, b)
        slopes = jax.vmap(jax.grad(of_both, (0, 1)), (0, None))(A, b[0])
        along = jax.jvp(lambda b: jax.grad(of_both)(A[0], b), (b[0],), (b[1],))
        return values, slopes, along

    for found, expected in zip(*map(jax.tree.leaves, map(everything, (ours, plain))), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-7 * jnp.abs(expected).max())


def test_a_batch_of_batches_of_matrices():
    A = matrices(3, 4, 5, 5)
    np.testing.assert_allclose(inverse(A), jnp.linalg.inv(A), rtol=1e-9)
