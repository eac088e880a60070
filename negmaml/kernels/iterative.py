r"""(G + ridge) c = r for many points: conjugate gradients, with kernel matrices never stored.

A product with G = A K A^T is A (K (A^T c)), with blocks of rows of K computed again each time. All
rates, ridges and outputs are columns of one product, so K is computed once per iteration. The
preconditioner is a randomised Nystrom approximation of each G by `RANK` eigenvectors, which takes
one more product: with U, x the approximate eigenpairs and x_k the smallest of them,

    P^-1 = U ((x_k + ridge) / (x + ridge)) U^T + (1 - U U^T)

Source: Frangella, Tropp and Udell, "Randomized Nystrom preconditioning", SIAM J. Matrix Anal. 2023.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular
from jax.scipy.sparse.linalg import cg

from negmaml._core.arrays import contract
from negmaml._core.convergence import warn_unless
from negmaml._core.keys import fixed_key
from negmaml.kernels.points import TILE
from negmaml.kernels.system import responses, right_side, task_kernels
from negmaml.rules import InnerRule

RANK, ITERATIONS = 128, 400
INEXACT = (
    "conjugate gradients did not solve a kernel system, or one of its derivatives, to its "
    'tolerance on some output: give a larger meta_ridge, use float64, or method="direct"'
)


@jax.jit
def train_iteratively(kernel, x, y_t, y_v, rule: InnerRule, ridges):
    """Return (weights (rules, ridges, M, o), well_conditioned (rules, ridges)).

    A solution is well conditioned if the residual of every output is small. Solutions and
    derivatives with a larger one warn, in compiled programs too, since the systems of derivatives
    return no flag.
    """
    (m, n_t, _), n_v = y_t.shape, y_v.shape[1]
    blocks = task_kernels(kernel, x, (m, n_t, n_v))
    C = responses(blocks, rule).reshape(-1, m, n_v, n_t)
    times_K = partial(_times_kernel, kernel, x)
    eps = jnp.finfo(C.dtype).eps
    # Conjugate gradients stagnate above the rounding error of a product with K.
    tolerance = float(eps) ** (2 / 3)

    def adjoint(C, c):
        """A^T c, (M, columns)."""
        c = c.reshape(m, n_v, -1)
        on_support = -contract("ivt,ivo->ito", C, c)
        return jnp.concatenate([part.reshape(-1, c.shape[-1]) for part in (on_support, c)])

    def times_G(C, c):
        values = times_K(adjoint(C, c))
        t, v = (part.reshape(m, -1, c.shape[-1]) for part in jnp.split(values, [m * n_t]))
        return (v - contract("ivt,ito->ivo", C, t)).reshape(c.shape)

    def one_rule(C):
        right = right_side(C, y_t, y_v).reshape(m * n_v, -1)
        U, eigenvalues = _nystrom(partial(times_G, C), m * n_v, C.dtype)

        def one_ridge(ridge):
            def matrix(c):
                return times_G(C, c) + ridge * c

            # P^-1 - 1 on the eigenvectors of the Nystrom approximation.
            scale = (eigenvalues[-1] + ridge) / (eigenvalues + ridge) - 1

            def precondition(c):
                return c + contract("nk,k,mk,mo->no", U, scale, U, c)

            def iterate(matrix, right):
                # Scale columns to unit length: otherwise the residual of a small one has no weight.
                size = jnp.linalg.norm(right, axis=0)
                unit = jnp.where(size > 0, size, 1)
                c, _ = cg(matrix, right / unit, tol=tolerance, maxiter=ITERATIONS, M=precondition)
                left = jnp.linalg.norm(right / unit - matrix(c), axis=0)
                small = jnp.all(left <= 10 * tolerance)
                warn_unless(small, INEXACT)
                return c * unit, small.astype(c.dtype)

            c, small = lax.custom_linear_solve(
                matrix, right, iterate, iterate, symmetric=True, has_aux=True
            )
            return adjoint(C, c), small > 0

        return jax.vmap(one_ridge)(ridges.astype(C.dtype))

    return jax.vmap(one_rule)(C)


def _times_kernel(kernel: Callable, x, columns):
    """K columns, a block of rows of K at a time."""
    count = -(-len(x) // TILE)
    size = -(-len(x) // count)
    # Blocks of one size share a program; copies of the first point fill the last one up.
    filled = jnp.concatenate([x, jnp.broadcast_to(x[:1], (count * size - len(x), *x.shape[1:]))])
    blocks = filled.reshape(count, size, *x.shape[1:])
    rows = lax.map(lambda block: contract("xy,yo->xo", kernel(block, x), columns), blocks)
    return rows.reshape(count * size, -1)[: len(x)]


def _nystrom(times: Callable, size: int, dtype):
    """Approximate eigenvectors (size, k) and eigenvalues (k,), largest first, of a psd matrix."""
    rank = min(RANK, size)
    # The key is fixed: results do not depend on settings or calls.
    normals = jax.random.normal(fixed_key(), (size, rank), dtype)
    test = jnp.linalg.qr(normals)[0]
    image = lax.stop_gradient(times(test))
    # A small shift keeps the Cholesky factor real; it is subtracted again below.
    shift = size**0.5 * jnp.finfo(dtype).eps * jnp.linalg.norm(image)
    image = image + shift * test
    inner = contract("nk,nl->kl", test, image)
    L = jnp.linalg.cholesky((inner + inner.T) / 2)
    U, s, _ = jnp.linalg.svd(solve_triangular(L, image.T, lower=True).T, full_matrices=False)
    # Smaller ones are rounding, which the preconditioner would magnify.
    eigenvalues = jnp.maximum(s**2 - shift, shift)
    usable = jnp.all(jnp.isfinite(L))  # else no preconditioner
    return jnp.where(usable, U, 0), jnp.where(usable, eigenvalues, 1)
