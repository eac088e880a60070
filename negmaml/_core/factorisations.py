"""Factorisations of many matrices on CPU, where a large batch may wait for ever.

What the linear algebra library does with a batch (Cholesky, QR, eigenvectors, and so on, of enough
work in all) waits there for parts of it that it gives to the threads of XLA. So as many batches at
once as there are threads, of programs side by side or of independent parts of one program, wait for
each other for ever (jaxlib 0.10). A call with one matrix, or with little work, gives no parts away.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from negmaml._core import tape
from negmaml._core.arrays import contract, namespace
from negmaml._core.batching import batched_custom_vmap
from negmaml._core.settings import own_settings

# Operations of one call. Told from the threads that wake up on two cores, the library shares out
# triangular solutions and QR from twice as many on, and Cholesky from three times as many.
SAFE_WORK = 2**16


def cpu_safe_vmap(work: Callable[..., float]) -> Callable:
    """A decorator of functions of one matrix and more arrays: `vmap`s are loops of calls on CPU.

    The calls are safe under any number of `vmap`s. Without derivatives, see `batched_custom_vmap`.

    work: the operations that a matrix of so many rows and columns costs.
    """

    def run(each, stacks, shape):
        safe = int(SAFE_WORK // max(1, work(*shape)))

        def on_cpu(stacks):
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
    """(eigenvalues, eigenvectors) of one symmetric matrix, for any number of `vmap`s.

    As those of `jnp.linalg.eigh`, derivatives are not finite where eigenvalues coincide.
    """
    return _eigh(A)


@eigh.defjvp
@own_settings
def _eigh_jvp(primals, tangents):
    x, V = eigh(*primals)
    rotated = contract("ji,jk,kl->il", V, tangents[0], V)
    unit = jnp.eye(len(x), dtype=x.dtype)
    turned = (1 / (x - x[:, None] + unit) - unit) * rotated
    return (x, V), (jnp.diagonal(rotated), contract("ij,jk->ik", V, turned))


@cpu_safe_vmap(lambda _, k: 4 * k**3)
def _solve(A, b):
    return jnp.linalg.solve(A, b)


def linear_solve(A, b):
    """A^-1 b of one matrix and one or more columns b, for any number of `vmap`s."""
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
    unit = jnp.asarray(order[..., None] == jnp.arange(order.shape[-1]), matrix.dtype)
    half = lax.linalg.triangular_solve(lu, unit, left_side=True, lower=True, unit_diagonal=True)
    return lax.linalg.triangular_solve(lu, half, left_side=True)


def inverse(matrix):
    """Of (..., n, n), with its derivative in products; few operations, which are traced often."""
    xp = namespace(matrix)
    if xp is tape:
        return tape.inverse(matrix)
    return np.linalg.inv(matrix) if xp is np else _traced_inverse(matrix)


@jax.custom_jvp
def _traced_inverse(matrix):
    return jax.vmap(_traced_inverse)(matrix) if matrix.ndim > 2 else _inverse(matrix)


@_traced_inverse.defjvp
@own_settings
def _inverse_jvp(primals, tangents):
    found = _traced_inverse(primals[0])
    return found, -(found @ tangents[0] @ found)
