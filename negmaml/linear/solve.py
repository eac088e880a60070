r"""The exact minimiser of the meta-loss that gradient descent from omega_0 reaches.

    omega* = omega_0 + pinv(Phi) (r - Phi omega_0)                     ridge = 0
    omega* = omega_0 + (Phi^T Phi + ridge I)^-1 Phi^T (r - Phi omega_0)

Wide systems (p > N) use Phi^T (Phi Phi^T + ridge I)^-1 instead, the same vector. So the matrix
to invert is always the smaller Gram matrix G + ridge I of size k = min(N, p).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from negmaml._core.arrays import contract
from negmaml._core.checks import check_array, check_nonnegative
from negmaml._core.deprecation import renamed_attribute
from negmaml._core.display import add_fields_repr
from negmaml._core.factorisations import cpu_safe_vmap
from negmaml._core.settings import own_settings
from negmaml._core.types import Array, ArrayLike, Bool, Float, ScalarLike
from negmaml.linear.cholesky import cholesky_solve, quadratic_form
from negmaml.linear.system import OneStepSystem


@add_fields_repr
class MetaSolution(NamedTuple):
    """A minimiser of the meta-loss and whether it is accurate.

    Attributes:
        omega: shape (..., p).
        well_conditioned: shape (...,), False where the solution is not finite or the system is
            singular to working precision.

    >>> import negmaml as nm
    >>> found = nm.linear.minimiser(jnp.array([[1.0, 1.0]]), jnp.array([2.0]))
    >>> found.omega.shape, bool(found.well_conditioned)
    ((2,), True)
    """

    omega: Float[Array, "*batch p"]
    well_conditioned: Bool[Array, "*batch"]


MetaSolution.reliable = renamed_attribute(  # type: ignore[attr-defined]
    "MetaSolution.reliable", "well_conditioned"
)


@own_settings
def minimiser(
    Phi: Float[ArrayLike, "*batch N p"],
    r: Float[ArrayLike, "*batch N"],
    omega0: ArrayLike = 0.0,
    *,
    meta_ridge: ScalarLike = 0.0,
) -> MetaSolution:
    r"""Minimiser of |Phi omega - r|^2 + meta_ridge |omega - omega_0|^2, minimum norm if not unique.

    Accurate to a relative error of about cond(Phi) times the machine epsilon: the triangular
    factor comes from a QR decomposition of Phi stacked on sqrt(meta_ridge) I, and one step of
    refinement with residuals taken through Phi removes what forming normal equations would lose.

    Arguments:
        Phi: shape (..., N, p).
        r: shape (..., N).
        omega0: where training starts, shape () or (p,).
        meta_ridge: scalar of at least 0.

    Returns a `MetaSolution`. Differentiable in all arguments, at meta_ridge = 0 too.

    Many systems, on leading axes or under `vmap`, are factorised a few at a time on CPU, where
    large batches of `jnp.linalg` can deadlock (jaxlib 0.10).

    >>> import negmaml as nm
    >>> Phi, r = jnp.array([[1.0, 1.0]]), jnp.array([2.0])
    >>> [round(float(x), 3) for x in nm.linear.minimiser(Phi, r).omega]  # of minimum norm
    [1.0, 1.0]
    >>> [round(float(x), 3) for x in nm.linear.minimiser(Phi, r, meta_ridge=2.0).omega]
    [0.5, 0.5]
    """
    Phi, r, omega0 = (
        check_array(name, value, "real numbers")
        for name, value in (("Phi", Phi), ("r", r), ("omega0", omega0))
    )
    meta_ridge = check_nonnegative("meta_ridge", meta_ridge, "a ridge strength")
    if np.ndim(Phi) < 2 or np.shape(r) != np.shape(Phi)[:-1]:
        raise ValueError(
            f"Phi must have shape (..., N, p) and r (..., N), got {np.shape(Phi)} and {np.shape(r)}"
        )
    if np.shape(omega0) not in ((), np.shape(Phi)[-1:]):
        raise ValueError(
            f"omega0 must be a number or have shape {np.shape(Phi)[-1:]}, got {np.shape(omega0)}"
        )
    dtype = jnp.result_type(float, Phi)
    Phi, r = jnp.asarray(Phi, dtype), jnp.asarray(r, dtype)
    N, p = Phi.shape[-2:]
    omega0 = jnp.broadcast_to(jnp.asarray(omega0, Phi.dtype), (p,))
    residual = r - contract("...np,p->...n", Phi, omega0)
    meta_ridge = jnp.asarray(meta_ridge, Phi.dtype)
    batch = Phi.shape[:-2]
    delta, well_conditioned = jax.vmap(_correction, (0, 0, None))(
        Phi.reshape(-1, N, p), residual.reshape(-1, N), meta_ridge
    )
    return MetaSolution(omega0 + delta.reshape(*batch, p), well_conditioned.reshape(batch))


def _correction(Phi, residual, ridge):
    """omega* - omega_0 for one system, and whether it is well conditioned."""
    N, p = Phi.shape
    # Both cases solve with the smaller Gram matrix, tall^T tall + ridge I.
    tall = Phi if p <= N else Phi.T
    stacked = jnp.vstack([tall, jnp.sqrt(ridge) * jnp.eye(tall.shape[1], dtype=Phi.dtype)])
    # QR of the stacked matrix gives R^T R = G + ridge I without forming G.
    R = _triangular_factor(lax.stop_gradient(stacked))

    def gram(v):
        return contract("nk,n->k", tall, contract("nk,k->n", tall, v)) + ridge * v

    def solve(matvec, b):
        v = _solve_factored(R, b)
        # One step of iterative refinement.
        return v + _solve_factored(R, b - matvec(v))

    # custom_linear_solve differentiates through `gram`, not through the factorisation: exact
    # derivatives of every order, and none of sqrt(ridge), which is infinite at zero.
    if p <= N:
        # Phi^T residual is rounded before it meets 1/cond^2, so start from a first solution and
        # solve for the rest of the residual, taken through Phi. The sum equals G^-1 Phi^T residual
        # for any first solution, so that is a constant to derivatives.
        first = _solve_factored(R, lax.stop_gradient(contract("np,n->p", Phi, residual)))
        rest = residual - contract("np,p->n", Phi, first)
        b = contract("np,n->p", Phi, rest) - ridge * first
        delta = first + lax.custom_linear_solve(gram, b, solve, symmetric=True)
    else:
        z = lax.custom_linear_solve(gram, residual, solve, symmetric=True)
        delta = contract("np,n->p", Phi, z)
    # The diagonal of R bounds the smallest singular value from above: small means singular.
    diagonal = jnp.abs(jnp.diagonal(R))
    floor = max(N, p) * jnp.finfo(Phi.dtype).eps
    well_conditioned = (diagonal.min() > floor * diagonal.max()) & jnp.all(jnp.isfinite(delta))
    return delta, well_conditioned


@cpu_safe_vmap(lambda n, k: 2 * n * k**2)
def _triangular_factor(stacked):
    return jnp.linalg.qr(stacked, mode="r")


@cpu_safe_vmap(lambda _, k: 2 * k**2)
def _solve_factored(R, b):
    """(R^T R)^-1 b."""
    y = lax.linalg.triangular_solve(R, b[:, None], left_side=True, transpose_a=True)
    return lax.linalg.triangular_solve(R, y, left_side=True)[:, 0]


def one_step_corrections(system: OneStepSystem, rates, ridge, panel: int = 0) -> MetaSolution:
    r"""omega* - omega_0 at every rate of one gradient step, from one pass over the data.

    Labels in `system` are relative to omega_0. The Gram matrix squares the condition number, which
    is harmless for systems that are far from square; use `minimiser` for others.

    `rates` has the shape (R,); `panel` is as in `cholesky_solve`. Returns a `MetaSolution` of
    shapes (R, p) and (R,).
    """
    solved = _normal_equations(system, rates, ridge, panel)
    delta = _weights(system, rates, solved)
    return MetaSolution(delta, solved.well & jnp.all(jnp.isfinite(delta), -1))


def one_step_distances(system: OneStepSystem, rates, ridge, offset, panel: int = 0):
    r"""|omega* - w0|^2 at every rate, where offset = omega_0 - w0, without forming omega*.

    A wide system needs no weights, only the solution z of its Gram matrix: delta = Phi^T z gives

        |offset + delta|^2 = |offset|^2 + 2 z.(Phi offset) + z^T Phi Phi^T z

    and Phi offset = A offset - alpha B offset needs no pass over the data either. The sum does not
    cancel: the offset outside the row space stays, at least about 1 - N/p of it.

    Returns (distances, well_conditioned), each of shape (R,).
    """
    A, B, _, _ = system
    solved = _normal_equations(system, rates, ridge, panel)
    # |offset + Phi^T z|^2 expanded, with Phi = A - alpha B.
    if _is_wide(system):
        across = contract("np,p->n", A, offset) - rates[:, None] * contract("np,p->n", B, offset)
        spread = quadratic_form(solved.gram, solved.z, panel)
        distance = jnp.sum(offset**2) + 2 * contract("rn,rn->r", solved.z, across) + spread
    else:
        distance = jnp.sum((offset + solved.z) ** 2, -1)
    return distance, solved.well & jnp.isfinite(distance)


class _GramSolution(NamedTuple):
    """gram (R, k, k) without ridge, z (R, k) with (gram + ridge I) z = b, and well (R,)."""

    gram: jax.Array
    z: jax.Array
    well: jax.Array


def _is_wide(system: OneStepSystem) -> bool:
    return system.A.shape[1] > system.A.shape[0]


def _weights(system: OneStepSystem, rates, solved: _GramSolution):
    """delta: Phi^T z of a wide system, z itself of a tall one."""
    A, B, _, _ = system
    if not _is_wide(system):
        return solved.z
    return contract("rn,np->rp", solved.z, A) - rates[:, None] * contract("rn,np->rp", solved.z, B)


def _normal_equations(system: OneStepSystem, rates, ridge, panel: int) -> _GramSolution:
    r"""The smaller Gram matrix and its solution, at every rate.

    Phi = A - alpha B and r = a - alpha c make the Gram matrix and the right-hand side quadratics
    in alpha with data-only coefficients,

        G(alpha) = A A^T - alpha (A B^T + B A^T) + alpha^2 B B^T        (wide; A^T A ... if tall)

    so a further rate costs a k x k Cholesky factorisation and no pass over the data.
    """
    A, B, a, c = system
    if _is_wide(system):
        AA, BB = contract("kp,lp->kl", A, A), contract("kp,lp->kl", B, B)
        AB = contract("kp,lp->kl", A, B)
        G, b = jnp.stack([AA, AB + AB.T, BB]), jnp.stack([a, c])
    else:  # one product with all factors of A^T, one with those of B^T; no block is computed twice
        p = A.shape[1]
        AtA, Ata, AtB, Atc = jnp.split(_transposed_product(A, A, a, B, c), (p, p + 1, 2 * p + 1), 1)
        Bta, BtB, Btc = jnp.split(_transposed_product(B, a, B, c), (1, p + 1), 1)
        G, b = jnp.stack([AtA, AtB + AtB.T, BtB]), jnp.stack([Ata, Atc + Bta, Btc])[..., 0]
    # G(alpha) and b(alpha) of all rates at once, by Horner's rule in -alpha.
    gram = _polynomial(G, -rates[:, None, None])
    b = _polynomial(b, -rates[:, None])
    z, pivots = cholesky_solve(gram + ridge * jnp.eye(gram.shape[-1], dtype=gram.dtype), b, panel)
    # A pivot over its diagonal entry, which inputs of unequal variance do not change.
    kept = pivots / (jnp.diagonal(gram, axis1=-2, axis2=-1) + ridge)
    return _GramSolution(gram, z, kept.min(-1) > max(A.shape) * jnp.finfo(gram.dtype).eps)


def _polynomial(coefficients, x):
    """The sum of coefficients[i] x^i."""
    total = coefficients[-1]
    for c in coefficients[-2::-1]:
        total = total * x + c
    return total


def _transposed_product(left, *right):
    """left^T [right_1 right_2 ...], vectors as single columns."""
    columns = jnp.hstack([x if x.ndim == 2 else x[:, None] for x in right])
    return contract("nk,nl->kl", left, columns)
