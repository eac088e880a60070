"""Batches of small positive definite systems."""

import jax
import jax.numpy as jnp
from jax import lax

from negmaml._core.arrays import contract
from negmaml._core.factorisations import cpu_safe_vmap

UNROLLED = 8  # the largest system written out: the program grows with its cube


def cholesky_solve(G, b, unroll: bool = True):
    """Solve G z = b for symmetric positive definite G, by G = L L^T.

    Arguments:
        G: shape (batch, k, k), of which the lower triangle is read.
        b: shape (batch, k).
        unroll: whether small systems are solved by a longer program, which is faster for many.

    Returns z of the shape of b, and the pivots, the squared diagonal of L. A pivot is NaN or not
    positive if G is not positive definite. Pivots of systems above `UNROLLED` have no derivative.
    """
    return _unrolled(G, b) if unroll and G.shape[-1] <= UNROLLED else _blocked(G, b)


def quadratic_form(G, z, unroll: bool = True):
    """z^T G z for G of shape (batch, k, k) and z of shape (batch, k)."""
    k = G.shape[-1]
    if not unroll or k > UNROLLED:
        return jnp.sum(z * jnp.sum(G * z[:, :, None], 1), 1)
    rows = [sum(G[:, i, j] * z[:, j] for j in range(k)) for i in range(k)]
    return sum(z[:, i] * rows[i] for i in range(k))


def _blocked(G, b):
    """Solve with the linear algebra library."""
    # Mapped over single systems, so that `cpu_safe_vmap` decides on the size of batches.
    return jax.vmap(_one_system)(G, b)


def _one_system(G, b):
    L = _cholesky(lax.stop_gradient(G))
    lower = jnp.tril(G)
    # Derivatives pass through this product with G, not through the factorisation.
    z = lax.custom_linear_solve(
        lambda v: contract("ij,j->i", lower + jnp.tril(lower, -1).T, v),
        b,
        lambda _, right: _solve_factored(L, right),
        symmetric=True,
    )
    return z, jnp.diagonal(L) ** 2


@cpu_safe_vmap(lambda _, k: k**3 / 3)
def _cholesky(G):
    return lax.linalg.cholesky(G, symmetrize_input=False)


@cpu_safe_vmap(lambda _, k: 2 * k**2)
def _solve_factored(L, b):
    """(L L^T)^-1 b."""
    z = lax.linalg.triangular_solve(L, b[:, None], left_side=True, lower=True)
    return lax.linalg.triangular_solve(L, z, left_side=True, lower=True, transpose_a=True)[:, 0]


def _unrolled(G, b):
    """Solve with one vector operation over the batch for each entry of L.

    L is stored without its diagonal; `inverse` has the reciprocals of that.
    """
    # A library call for every small system takes ten times as long.
    k = G.shape[-1]
    inverse, pivots = [], []
    L: list[list] = [[] for _ in range(k)]
    for j in range(k):
        pivot = _minus_products(G[:, j, j], L[j], L[j])
        pivots.append(pivot)
        inverse.append(lax.rsqrt(pivot))
        # Column j of L, below the diagonal.
        for i in range(j + 1, k):
            L[i].append(_minus_products(G[:, i, j], L[i], L[j]) * inverse[j])
    # Forward substitution L u = b, then backward substitution L^T z = u.
    u: list = []
    for i in range(k):
        u.append(_minus_products(b[:, i], L[i], u) * inverse[i])
    z: list = []
    for i in reversed(range(k)):  # z holds the last first
        column = [L[t][i] for t in reversed(range(i + 1, k))]
        z.append(_minus_products(u[i], column, z) * inverse[i])
    return jnp.stack(z[::-1], -1), jnp.stack(pivots, -1)


def _minus_products(start, left, right):
    """start - left_0 right_0 - left_1 right_1 - ..., to the end of the shorter list."""
    for x, y in zip(left, right, strict=False):
        start = start - x * y
    return start
