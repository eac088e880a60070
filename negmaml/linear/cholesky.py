"""Batches of small positive definite systems.

Three programs solve them. Small systems are written out, with a vector operation over the batch
for each entry of the factor. Middle ones are written out by panels of columns on accelerators,
whose libraries are slow for many small matrices. Others call the linear algebra library.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from negmaml._core.arrays import contract
from negmaml._core.factorisations import cpu_safe_vmap
from negmaml._core.platform import DeviceSizes

# Columns of a panel at most. The program grows with their cube, and the traffic falls with their
# number: for 20 x 20 systems on a GPU, 4, 8 and 20 columns compile in 1.7, 2.2 and 6.9 CPU seconds.
PANEL = 6


def panel_width(k: int, sizes: DeviceSizes, few: bool = False) -> int:
    """The columns of a panel for systems of size k, 0 for the library.

    few: whether the systems are too few to repay a longer program.
    """
    if k <= (sizes.unrolled_few if few else sizes.unrolled):
        return k
    # Panels of equal width, or nearly so.
    return -(-k // -(-k // PANEL)) if k <= sizes.paneled and not few else 0


def cholesky_solve(G, b, panel: int = 0):
    """Solve G z = b for symmetric positive definite G, by G = L L^T.

    Arguments:
        G: shape (batch, k, k), of which the lower triangle is read.
        b: shape (batch, k).
        panel: columns of a panel of a program that is written out, from `panel_width`; 0 for the
            linear algebra library.

    Returns z of the shape of b, and the pivots, the squared diagonal of L. A pivot is NaN or not
    positive if G is not positive definite. Pivots from the library have no derivative.
    """
    return _written_out(G, b, panel) if panel else _by_library(G, b)


def quadratic_form(G, z, panel: int = 0):
    """z^T G z for G of shape (batch, k, k) and z of shape (batch, k); panel of `panel_width`."""
    k = G.shape[-1]
    if panel < k:
        return jnp.sum(z * jnp.sum(G * z[:, :, None], 1), 1)
    rows = [sum(G[:, i, j] * z[:, j] for j in range(k)) for i in range(k)]
    return sum(z[:, i] * rows[i] for i in range(k))


def _by_library(G, b):
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


def _written_out(G, b, panel: int):
    """Solve by panels of `panel` columns of L, with vector operations over the batch.

    The square block of a panel is computed entry by entry, the rows below it as whole columns.
    """
    # A library call for every small system takes ten times as long.
    k, panels = G.shape[-1], []
    for start in range(0, k, panel):
        w = min(panel, k - start)
        square = _factor([[G[:, i, j] for j in range(i + 1)] for i in range(w)])
        below: list = []
        if start + w < k:
            for row, inverse in zip(square.L, square.inverse, strict=True):
                column = _minus_products(G[:, w:, len(row)], below, [x[:, None] for x in row])
                below.append(column * inverse[:, None])
            # The Schur complement of the columns so far.
            left, right = [c[:, :, None] for c in below], [c[:, None] for c in below]
            G = _minus_products(G[:, w:, w:], left, right)
        panels.append((square, below))
    # Forward substitution L u = b, then backward substitution L^T z = u.
    parts: list = []
    for square, below in panels:
        u: list = []
        for i, (row, inverse) in enumerate(zip(square.L, square.inverse, strict=True)):
            u.append(_minus_products(b[:, i], row, u) * inverse)
        if below:
            b = _minus_products(b[:, len(u) :], below, [x[:, None] for x in u])
        parts.append(u)
    z = None
    for (square, below), u in zip(reversed(panels), reversed(parts), strict=True):
        if z is not None:
            u = [x - jnp.sum(column * z, 1) for x, column in zip(u, below, strict=True)]
        last: list = []  # holds the last first
        for i in reversed(range(len(u))):
            column = [square.L[t][i] for t in reversed(range(i + 1, len(u)))]
            last.append(_minus_products(u[i], column, last) * square.inverse[i])
        found = jnp.stack(last[::-1], -1)
        z = found if z is None else jnp.concatenate([found, z], -1)
    return z, jnp.concatenate([jnp.stack(square.pivots, -1) for square, _ in panels], -1)


class _Factor(NamedTuple):
    """Rows of L without its diagonal, the reciprocals of that, and its squares, all lists."""

    L: list[list]
    inverse: list
    pivots: list


def _factor(G: list[list]) -> _Factor:
    """Factorise a matrix given by the rows of its lower triangle, as lists of entries."""
    k = len(G)
    found = _Factor([[] for _ in range(k)], [], [])
    L = found.L
    for j in range(k):
        pivot = _minus_products(G[j][j], L[j], L[j])
        found.pivots.append(pivot)
        found.inverse.append(lax.rsqrt(pivot))
        # Column j of L, below the diagonal.
        for i in range(j + 1, k):
            L[i].append(_minus_products(G[i][j], L[i], L[j]) * found.inverse[j])
    return found


def _minus_products(start, left, right):
    """start - left_0 right_0 - left_1 right_1 - ..., to the end of the shorter list."""
    for x, y in zip(left, right, strict=False):
        start = start - x * y
    return start
