"""Factorisations of many matrices on CPU, where large batches can deadlock.

A batched call of the linear algebra library (Cholesky, QR, eigenvectors and others) hands parts of
its work to the threads of XLA and waits for them. If as many such calls as there are threads run at
once, in several programs or in independent parts of one, all of them wait for ever (jaxlib 0.10).
A call with one matrix, or with little work, does not hand over parts.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from negmaml._core import taylor
from negmaml._core.arrays import contract, namespace
from negmaml._core.batching import batched_custom_vmap
from negmaml._core.settings import own_settings

# Operations in one call. By the threads that wake up on two cores, the library hands over parts of
# triangular solutions and QR from twice this number on, and of Cholesky from three times on.
SAFE_WORK = 2**16


def cpu_safe_vmap(work: Callable[..., float]) -> Callable:
    """Decorator for a function of a matrix and more arrays: on CPU `vmap` becomes a loop of calls.

    The calls are safe under any number of `vmap`s. They have no derivative, see
    `batched_custom_vmap`.

    work: the number of operations as a function of rows and columns.
    """

    def run(each, stacks, one):
        safe = int(SAFE_WORK // max(1, work(*one[0].shape)))

        def on_cpu(stacks):
            # A batch with little work is not split among threads, so it cannot deadlock.
            if len(stacks[0]) <= safe:
                return jax.vmap(each)(stacks)
            return lax.map(each, stacks, batch_size=safe if safe > 1 else None)

        return lax.platform_dependent(stacks, cpu=on_cpu, default=jax.vmap(each))

    return batched_custom_vmap(run)


@cpu_safe_vmap(lambda _, k: 20 * k**3)
def _eigh(A):
    return tuple(jnp.linalg.eigh(A))


@jax.custom_jvp
def eigh(A):
    """(eigenvalues, eigenvectors) of one symmetric matrix, under any number of `vmap`s.

    Derivatives are not finite where eigenvalues coincide, as in `jnp.linalg.eigh`.
    """
    return _eigh(A)


@eigh.defjvp
@own_settings
def _eigh_jvp(primals, tangents):
    x, V = eigh(*primals)
    rotated = contract("ji,jk,kl->il", V, tangents[0], V)
    # The identity avoids a division by zero on the diagonal and is subtracted again.
    unit = jnp.eye(len(x), dtype=x.dtype)
    turned = (1 / (x - x[:, None] + unit) - unit) * rotated
    return (x, V), (jnp.diagonal(rotated), contract("ij,jk->ik", V, turned))


@cpu_safe_vmap(lambda _, k: 4 * k**3)
def _solve(A, b):
    return jnp.linalg.solve(A, b)


def linear_solve(A, b):
    """Return A^-1 b for one matrix and one or more columns b, under any number of `vmap`s."""
    # Derivatives pass through the products with A, not through the factorisation.
    constant = lax.stop_gradient(A)
    return lax.custom_linear_solve(
        lambda x: contract("ij,j...->i...", A, x),
        b,
        lambda _, right: _solve(constant, right),
        lambda _, right: _solve(constant.T, right),
    )


@cpu_safe_vmap(lambda _, k: 4 * k**3)
def _inverse(matrix):
    lu, _, order = lax.linalg.lu(matrix)
    # The permuted identity as right-hand side: L U X = P.
    unit = jnp.asarray(order[..., None] == jnp.arange(order.shape[-1]), matrix.dtype)
    half = lax.linalg.triangular_solve(lu, unit, left_side=True, lower=True, unit_diagonal=True)
    return lax.linalg.triangular_solve(lu, half, left_side=True)


def inverse(matrix):
    """The inverse of matrices (..., n, n), with a derivative that needs only products."""
    xp = namespace(matrix)
    if xp is taylor:
        return taylor.inverse(matrix)
    return np.linalg.inv(matrix) if xp is np else _traced_inverse(matrix)


@jax.custom_jvp
def _traced_inverse(matrix):
    return jax.vmap(_traced_inverse)(matrix) if matrix.ndim > 2 else _inverse(matrix)


@_traced_inverse.defjvp
@own_settings
def _inverse_jvp(primals, tangents):
    found = _traced_inverse(primals[0])
    return found, -(found @ tangents[0] @ found)
