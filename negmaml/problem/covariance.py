r"""Covariances of inputs and of task weights, and the numbers that means over inputs depend on.

A covariance is None (the identity), its eigenvalues of shape (p,) (a diagonal matrix), or a
symmetric positive semidefinite matrix of shape (p, p). The law of x ~ N(0, Sigma) does not change
if the component along one eigenvector v_k of Sigma changes its sign. Means over inputs therefore
depend on the task weights and the starting point only through the numbers in `Modes`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.arrays import contract, working_dtype
from negmaml._core.checks import as_array, check_finite, check_symmetric
from negmaml._core.display import add_fields_repr
from negmaml._core.factorisations import eigh
from negmaml._core.jit import is_concrete
from negmaml._core.settings import own_settings


@add_fields_repr
class Modes(NamedTuple):
    r"""A problem along the eigenvectors v_k of its input covariance Sigma; arrays of shape (p,).

    Attributes:
        s: eigenvalues of Sigma, at least 0.
        o: nu^2/p v_k^T Omega v_k, the variance of task weights along v_k.
        d: (v_k^T (omega_0 - w0))^2, the squared offset of the start along v_k.
        V: the v_k as columns, shape (p, p); None where they are the coordinate axes.

    >>> import negmaml as nm
    >>> sizes = {"p": 2, "m": 3, "n_t": 4, "n_v": 2, "n_r": 4}
    >>> problem = nm.MixedLinearRegression(**sizes, sigma=1.0, nu=1.0, input_covariance=[2.0, 0.5])
    >>> problem.modes.s.tolist(), problem.modes.o.tolist()
    ([2.0, 0.5], [0.5, 0.5])
    """

    s: jax.Array
    o: jax.Array
    d: jax.Array
    V: jax.Array | None


def modes(p: int, inputs, weights, nu, offset) -> Modes:
    """Return the `Modes` of two covariances, nu, and omega_0 - w0 of shape () or (p,).

    Only a matrix `inputs` needs an eigendecomposition. The arrays are NumPy's unless an argument is
    traced.
    """
    xp = np if is_concrete((inputs, weights, nu, offset)) else jnp
    dtype = working_dtype(inputs, weights, nu, offset)
    offset = xp.broadcast_to(xp.asarray(offset, dtype), (p,))
    if np.ndim(inputs) == 2:
        decompose: Any = np.linalg.eigh if xp is np else eigh
        s, V = decompose(xp.asarray(inputs, dtype))
        s = xp.maximum(s, 0)  # rounding leaves small negative eigenvalues
    else:
        s = xp.ones_like(offset) if inputs is None else xp.asarray(inputs, dtype)
        V = None
    # v_k^T Omega v_k in the cheapest way that the forms of both covariances allow.
    variance = xp.asarray(nu, dtype) ** 2 / p
    weights = None if weights is None else xp.asarray(weights, dtype)
    if weights is None:
        along = xp.ones_like(s)
    elif weights.ndim == 1:
        along = weights if V is None else contract("jk,j->k", V**2, weights)
    else:
        along = xp.diagonal(weights) if V is None else contract("ik,ij,jk->k", V, weights, V)
    rotated = offset if V is None else contract("p,pk->k", offset, V)
    return Modes(s, variance * along, rotated**2, V)


def apply_covariance(covariance, x):
    """Return Sigma x for vectors along the last axis of x."""
    if covariance is None:
        return x
    return covariance * x if np.ndim(covariance) == 1 else contract("...p,pq->...q", x, covariance)


def covariance_sqrt(covariance):
    """Return R with R R = Sigma, in the same form as the covariance."""
    if covariance is None:
        return None
    covariance = jnp.asarray(covariance)
    return jnp.sqrt(covariance) if covariance.ndim == 1 else symmetric_sqrt(covariance)


@jax.custom_jvp
def symmetric_sqrt(matrix):
    """Return the positive semidefinite square root; negative eigenvalues count as zero."""
    s, V = eigh(matrix)
    return contract("ik,k,jk->ij", V, jnp.sqrt(jnp.maximum(s, 0)), V)


@symmetric_sqrt.defjvp
@own_settings
def _symmetric_sqrt_jvp(primals, tangents):
    """Solve R dR + dR R = dSigma, which is regular where the derivatives of `eigh` are not.

    Between two directions of variance zero no derivative exists; it is set to zero.
    """
    (matrix,), (slope,) = primals, tangents
    # In the eigenbasis dR_kl = dSigma_kl/(root s_k + root s_l).
    s, V = eigh(matrix)
    roots = jnp.sqrt(jnp.maximum(s, 0))
    sums = roots[:, None] + roots
    rotated = contract("ik,ij,jl->kl", V, (slope + slope.T) / 2, V)
    rotated = jnp.where(sums > 0, rotated / jnp.where(sums > 0, sums, 1), 0)
    return symmetric_sqrt(matrix), contract("ik,kl,jl->ij", V, rotated, V)


def input_range(problem):
    """Return (the problem in the range of its input covariance, |omega_0 - w0|^2 outside of it).

    Training moves nothing along directions in which inputs have no variance. Where there are some,
    the reduced problem has coordinates along the other eigenvectors, with the same variance of task
    weights along each. A traced covariance is left as it is: its rank is not known.
    """
    covariance = problem.input_covariance
    if covariance is None or isinstance(covariance, jax.core.Tracer):
        return problem, 0.0
    # Rounding leaves eigenvalues of a singular matrix near zero, hence a threshold.
    matrix = np.asarray(covariance)
    if matrix.ndim == 1:
        s, V = matrix, np.eye(problem.p, dtype=matrix.dtype)
        varies = s > 0
    else:
        s, V = np.linalg.eigh(matrix.astype(np.result_type(np.float32, matrix)))
        varies = s > problem.p * np.finfo(s.dtype).eps * s[-1]
    if varies.all():
        return problem, 0.0
    varies[np.argmax(s)] = True  # a problem has at least one dimension
    s, V = s[varies], V[:, varies]
    weights = problem.weight_covariance
    if weights is None:
        weights = np.ones_like(s)
    else:
        form = "pk,p,pl->kl" if np.ndim(weights) == 1 else "pk,pq,ql->kl"
        weights = contract(form, V, weights, V)
    w0, omega0 = (
        contract("p,pk->k", jnp.broadcast_to(jnp.asarray(x), (problem.p,)), V)
        for x in (problem.w0, problem.omega0)
    )
    # The variance of a task weight is nu^2/p Omega, and p has become smaller.
    changes = dict(input_covariance=s, weight_covariance=weights * (s.size / problem.p))
    reduced = dataclasses.replace(problem, p=s.size, w0=w0, omega0=omega0, **changes)
    return reduced, problem.offset_squared - reduced.offset_squared


def check_covariance(name: str, value: Any, p: int) -> Any:
    """Return `value` if it is None, p eigenvalues or a p x p covariance matrix; raise otherwise."""
    if value is None:
        return None
    value = as_array(name, value)
    if np.shape(value) not in ((p,), (p, p)):
        raise ValueError(
            f"{name} must be None (the identity), eigenvalues of shape ({p},) or a matrix of shape "
            f"({p}, {p}), got shape {np.shape(value)}"
        )
    value = check_finite(name, value, "a covariance")
    # Values that are traced cannot be checked.
    if isinstance(value, jax.core.Tracer):
        return value
    if value.ndim == 2:
        check_symmetric(name, value)
    elif (least := np.asarray(value, float).min()) < 0:
        raise ValueError(f"{name} must hold eigenvalues of at least 0, got one of {least:g}")
    return value
