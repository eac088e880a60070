r"""(G + ridge)^-1 r for many ridges from one decomposition, and its form without one task.

Where G + ridge is singular, the solution is pinv(G) r: least squares among the functions that the
kernel allows, of minimum norm. That takes eigenvalues. Where it is not, at any of the ridges, G =
V T V^T with T tridiagonal does as well for a third of the work, and a further ridge costs a
tridiagonal solve, where a Cholesky factorisation would cost N^3 / 3. T itself says which it is: all
its eigenvalues are above a number c just when the pivots of T - c are positive, in any order of its
rows. From the first row to the last, with d the diagonal of T - c and a_i beside d_i and d_i+1,

    p_1 = d_1,      p_i = d_i - a_i-1^2 / p_i-1.

An accelerator takes log2 N steps in place of N. Parallel cyclic reduction removes from every row
those at distances s = 1, 2, 4, ..., with a_i beside rows i and i + s, and zero beyond the end. Each
d_i on the way is a pivot in some order:

    d'_i = d_i - a_i-s^2 / d_i-s - a_i^2 / d_i+s,      a'_i = -a_i a_i+s / d_i+s.

**Leaving a task out.** Let B = (G + ridge)^-1 and c = B r. Without the rows j of a task the
solution is c - B_:j e with e = (B_jj)^-1 c_j, and e is the residual on its query after adapting by
the training rule: both follow from G B + ridge B = I. Its support rows have H_j (c - B_:j e) for a
prediction, so with y less f_0 throughout

    support:  s = y_t - H_j c + H_j B_:j e             (before adapting)
    query:    e + C_j s                                (before adapting, since e = query - C_j s)

and any rule adapts from these two. Where ridge -> 0 on a singular G, with P the projector on its
null space, B = P/ridge + pinv(G) + O(ridge), and c alike. Since A^T P = 0 (P G P = 0), the
predictions need only pinv(G), and e is the limit of (P_jj + ridge Q)^-1 (P_j: r + ridge q), Q =
pinv(G)_jj, q = (pinv(G) r)_j. With U a basis of the null space of P_jj, to which P_j: r is
orthogonal,

    e = e_1 + U (U^T Q U)^-1 U^T (q - Q e_1),      e_1 = pinv(P_jj) P_j: r.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from negmaml._core.arrays import contract
from negmaml._core.factorisations import cpu_safe_vmap, eigh, linear_solve
from negmaml.kernels.system import KernelSystem


class Inverse(NamedTuple):
    """G + ridge by the eigenvalues of G, with 1/eigenvalue zero where the matrix is singular.

    inverse: (N,).   kept: (N,), where the inverse is not zero.   well_conditioned: scalar.
    """

    inverse: jax.Array
    kept: jax.Array
    well_conditioned: jax.Array


def invert(x, ridge) -> Inverse:
    """The inverse of G + ridge from the eigenvalues x of G.

    It is well conditioned where G + ridge has full rank to working precision, and where its rank is
    clear: the smallest eigenvalue kept is above the square root of the machine epsilon, so far from
    those cut that it does not matter where the cut is.
    """
    eps = jnp.finfo(x.dtype).eps
    total = jnp.maximum(x, 0) + ridge
    # Eigenvalues below the rounding of the largest count as zero.
    kept = total > len(x) * eps * total.max()
    smallest = jnp.min(jnp.where(kept, total, jnp.inf))
    well_conditioned = jnp.all(kept) | (smallest > eps**0.5 * total.max())
    inverse = jnp.where(kept, 1 / jnp.where(kept, total, 1), 0)
    return Inverse(inverse, kept, well_conditioned & jnp.all(jnp.isfinite(x)))


class Decomposition(NamedTuple):
    """G = V T V^T with V orthogonal and T tridiagonal.

    diagonal: (N,).   off_diagonal: (N - 1,), zero if T holds eigenvalues.
    nonsingular: scalar, whether no G + ridge is singular to working precision. If False, T holds
        the eigenvalues.
    """

    V: jax.Array
    diagonal: jax.Array
    off_diagonal: jax.Array
    nonsingular: jax.Array


@cpu_safe_vmap(lambda _, k: 20 * k**3)
def decompose(G, ridges) -> Decomposition:
    """Decompose G for the solutions at all ridges, into eigenvalues if one G + ridge is singular.

    It has no derivatives.
    """

    def by_eigenvalues(G):
        x, V = jnp.linalg.eigh(G)
        return Decomposition(V, x, jnp.zeros_like(x[1:]), jnp.asarray(False))

    def tridiagonal(positive, G):
        # Householder reduction: a third of the work of eigenvalues.
        reflectors, diagonal, off_diagonal, scales = lax.linalg.tridiagonal(G, lower=True)[:4]
        nonsingular = _agreed(_is_nonsingular(positive, diagonal, off_diagonal, ridges))

        def orthogonal(G):
            # The reflectors leave the first coordinate, so Q fills the rest of V.
            Q = lax.linalg.householder_product(reflectors[1:, :-1], scales)
            V = jnp.zeros_like(G).at[0, 0].set(1).at[1:, 1:].set(Q)
            return Decomposition(V, diagonal, off_diagonal, nonsingular)

        return lax.cond(nonsingular, orthogonal, by_eigenvalues, G)

    # The reduction of the library needs at least three rows.
    if len(G) < 3:
        return by_eigenvalues(G)
    # Only these platforms have the routine.
    return lax.platform_dependent(
        G,
        cpu=partial(tridiagonal, _positive_by_recurrence),
        cuda=partial(tridiagonal, _positive_by_reduction),
        default=by_eigenvalues,
    )


def _is_nonsingular(positive: Callable, diagonal, off_diagonal, ridges):
    """Return whether every G + ridge has full rank to working precision, as `invert` has it.

    positive: `_positive_by_recurrence` or `_positive_by_reduction`.
    """
    sides = jnp.pad(jnp.abs(off_diagonal), 1)
    largest = jnp.max(jnp.abs(diagonal) + sides[1:] + sides[:-1])  # Gershgorin: not too small
    # The threshold of `invert`, as a bound c on the eigenvalues of T.
    cut = len(diagonal) * jnp.finfo(sides.dtype).eps * (largest + ridges) - ridges

    return positive(diagonal - cut[:, None], jnp.append(off_diagonal, 0))


def _positive_by_recurrence(d, a):
    """Return whether all pivots are positive, of diagonals d (k, N) and off-diagonal a (N,)."""

    # After a pivot that is not positive it stays there.
    def pivot(before, entries):
        entry, side = entries
        return jnp.where(before > 0, entry - side**2 / before, before), None

    last, _ = lax.scan(pivot, jnp.ones_like(d[:, 0]), (d.T, jnp.roll(a, 1)))
    return jnp.all(last > 0)


def _positive_by_reduction(d, a):
    """Return the same as `_positive_by_recurrence`, in log2 N steps on all rows at once."""

    def remove(state, s):
        d, a, positive = state
        ratio = a / jnp.roll(d, -s, -1)  # the zeros of a are where this wraps around
        left = d - a * ratio - jnp.roll(a**2 / d, s, -1)
        return (left, -ratio * jnp.roll(a, -s, -1), positive & jnp.all(left > 0)), None

    shifts = 2 ** jnp.arange((d.shape[-1] - 1).bit_length())
    (*_, positive), _ = lax.scan(remove, (d, jnp.broadcast_to(a, d.shape), jnp.all(d > 0)), shifts)
    return positive


@custom_vmap
def _agreed(flag):
    """Return a truth value; under `vmap` one for the whole batch, whether all are true.

    `lax.cond` on it computes one branch, where `vmap` would compute both for every matrix.
    """
    return flag


@_agreed.def_vmap
def _all_agree(size, batched, flags):
    return _agreed(jnp.all(flags)), False


@cpu_safe_vmap(lambda k: 10 * k)
def _solve_tridiagonal(below, diagonal, above, right):
    return lax.linalg.tridiagonal_solve(below, diagonal, above, right)


def solve(G, right, ridges) -> tuple[jax.Array, jax.Array]:
    """((G + ridge)^-1 right for each ridge, (ridges, N, o); well_conditioned, (ridges,)).

    Derivatives of every order are those of the least squares problem (G + ridge)^2 c = (G + ridge)
    r, which has no derivative of an eigenvector in it.
    """
    V, diagonal, off_diagonal, nonsingular = decompose(*lax.stop_gradient((G, ridges)))
    own = jax.vmap(invert, (None, 0))(diagonal, lax.stop_gradient(ridges))
    kept, added = nonsingular | own.kept, lax.stop_gradient(ridges)[:, None]  # (ridges, N)
    total = jnp.where(kept, jnp.where(nonsingular, diagonal, jnp.maximum(diagonal, 0)) + added, 1)
    above, below = (
        jnp.append(off_diagonal, 0),
        jnp.append(jnp.zeros(1, off_diagonal.dtype), off_diagonal),
    )

    def matrix(v):
        return contract("ij,rjo->rio", G, v) + ridges[:, None, None] * v

    def inverse(b):
        rotated = jnp.where(kept[:, :, None], contract("jk,rjo->rko", V, b), 0)

        divided = jax.vmap(_solve_tridiagonal, (None, 0, None, 0))(below, total, above, rotated)
        return contract("ik,rko->rio", V, divided)

    right = jnp.broadcast_to(right, (len(ridges), *right.shape))
    # A first solution without derivative, and one step of refinement.
    first = inverse(lax.stop_gradient(right))
    first = first + inverse(lax.stop_gradient(right - matrix(first)))
    # The rest carries the derivatives: of the least squares problem, see above.
    rest = lax.custom_linear_solve(
        lambda v: matrix(matrix(v)),
        matrix(right - matrix(first)),
        lambda _, b: inverse(inverse(b)),
        symmetric=True,
    )
    solution = first + rest
    return solution, (nonsingular | own.well_conditioned) & jnp.all(
        jnp.isfinite(solution), (-2, -1)
    )


def leave_out(system: KernelSystem, right, y_t, ridges):
    """Residuals of the labels of each task, before adapting, under the solution without it.

    Arguments:
        right: r of the meta-system, (m, n_v, o).   y_t: labels of the support less f_0, (m, n_t,
            o).

    Returns (support (ridges, m, n_t, o), query (ridges, m, n_v, o), well_conditioned (ridges,)).
    """
    m, n_v, outputs = right.shape
    x, V = eigh(system.G)
    V_j, HV = V.reshape(m, n_v, -1), contract("tn,nk->tk", system.H, V).reshape(m, -1, len(x))
    rotated = contract("nk,no->ko", V, right.reshape(-1, outputs))

    def one(ridge):
        own = invert(x, ridge)
        Q = contract("ivk,k,iwk->ivw", V_j, own.inverse, V_j)
        q = contract("ivk,k,ko->ivo", V_j, own.inverse, rotated)

        # B_jj e = c_j. Without a ridge B has no limit on the null space, but e has one: `_limit`.
        def regular():
            return jax.vmap(linear_solve)(Q, q)

        def singular():
            # P, the projector on the null space, stands apart: no ridge is left to divide it by.
            null = jnp.where(own.kept, 0, 1).astype(x.dtype)
            return _limit(
                contract("ivk,k,iwk->ivw", V_j, null, V_j),
                contract("ivk,k,ko->ivo", V_j, null, rotated),
                Q,
                q,
            )

        e = lax.cond(jnp.all(own.kept), regular, singular)
        support = y_t - contract("itk,k,ko->ito", HV, own.inverse, rotated)
        support += contract("itk,k,ivk,ivo->ito", HV, own.inverse, V_j, e)
        query = e + contract("ivt,ito->ivo", system.C, support)
        return support, query, own.well_conditioned & jnp.all(jnp.isfinite(support))

    return lax.map(one, ridges)


def _limit(P, p, Q, q):
    """The limit of (P + ridge Q)^-1 (p + ridge q) of each task, as at the head of this module."""
    x, W = jax.vmap(eigh)(P)
    inside = x > jnp.finfo(x.dtype).eps ** 0.5  # eigenvalues of a block of a projector, 0 to 1
    inverse = jnp.where(inside, 1 / jnp.where(inside, x, 1), 0)
    e = contract("ivk,ik,iwk,iwo->ivo", W, inverse, W, p)
    U = W * ~inside[:, None, :]
    # The identity on columns that U does not use keeps the system regular.
    inner = contract("ivk,ivw,iwl->ikl", U, Q, U) + inside[:, None, :] * jnp.eye(
        x.shape[-1], dtype=x.dtype
    )
    rest = contract("ivk,ivo->iko", U, q - contract("ivw,iwo->ivo", Q, e))
    solved = jax.vmap(linear_solve)(inner, rest)
    return e + contract("ivk,iko->ivo", U, solved)
