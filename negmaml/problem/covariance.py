r"""Covariances of inputs and of task weights, and the coordinates in which only numbers are left.

A covariance is None (the identity), its eigenvalues of shape (p,) (a diagonal matrix), or a
symmetric positive semidefinite matrix of shape (p, p). Inputs x ~ N(0, Sigma) are invariant under a
change of sign of each coordinate along an eigenvector v_k of Sigma. So of task weights with
covariance nu^2/p Omega and of the start omega_0, means over inputs see the numbers of `Modes`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.arrays import contract, working_dtype
from negmaml._core.checks import as_array, check_finite, check_symmetric
from negmaml._core.factorisations import eigh
from negmaml._core.jit import concrete
from negmaml._core.settings import own_settings


class Modes(NamedTuple):
    r"""A problem along the eigenvectors v_k of its input covariance Sigma; arrays of shape (p,).

    s: eigenvalues of Sigma, at least 0.
    o: nu^2/p v_k^T Omega v_k, the variance of task weights along v_k.
    d: (v_k^T (omega_0 - w0))^2, the squared offset of the start along v_k.
    V: the v_k as columns, shape (p, p); None where they are the coordinate axes.
    """

    s: jax.Array
    o: jax.Array
    d: jax.Array
    V: jax.Array | None


def modes(p: int, inputs, weights, nu, offset) -> Modes:
    """The `Modes` of covariances as above and of omega_0 - w0, shape () or (p,).

    No eigendecomposition unless `inputs` is a matrix. Arrays of NumPy where nothing is traced.
    """
    xp = np if concrete((inputs, weights, nu, offset)) else jnp
    dtype = working_dtype(inputs, weights, nu, offset)
    offset = xp.broadcast_to(xp.asarray(offset, dtype), (p,))
    if np.ndim(inputs) == 2:
        decompose: Any = np.linalg.eigh if xp is np else eigh
        s, V = decompose(xp.asarray(inputs, dtype))
        s = xp.maximum(s, 0)
    else:
        s = xp.ones_like(offset) if inputs is None else xp.asarray(inputs, dtype)
        V = None
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


def apply(covariance, x):
    """Sigma x for vectors along the last axis."""
    if covariance is None:
        return x
    return covariance * x if np.ndim(covariance) == 1 else contract("...p,pq->...q", x, covariance)


def root(covariance):
    """R with R R = Sigma, in the form of the covariance."""
    if covariance is None:
        return None
    covariance = jnp.asarray(covariance)
    return jnp.sqrt(covariance) if covariance.ndim == 1 else symmetric_root(covariance)


@jax.custom_jvp
def symmetric_root(matrix):
    """The positive semidefinite square root of a symmetric matrix; rounding below 0 counts as 0."""
    s, V = eigh(matrix)
    return contract("ik,k,jk->ij", V, jnp.sqrt(jnp.maximum(s, 0)), V)


@symmetric_root.defjvp
@own_settings
def _symmetric_root_jvp(primals, tangents):
    """R dR + dR R = dSigma, which coinciding eigenvalues do not disturb as those of eigh are.

    Between directions of variance zero there is no derivative, and zero stands for it.
    """
    (matrix,), (slope,) = primals, tangents
    s, V = eigh(matrix)
    roots = jnp.sqrt(jnp.maximum(s, 0))
    sums = roots[:, None] + roots
    rotated = contract("ik,ij,jl->kl", V, (slope + slope.T) / 2, V)
    rotated = jnp.where(sums > 0, rotated / jnp.where(sums > 0, sums, 1), 0)
    return symmetric_root(matrix), contract("ik,kl,jl->ij", V, rotated, V)


def check_covariance(name: str, value: Any, p: int) -> Any:
    """`value`, if it is None, p eigenvalues, or a p x p covariance matrix; raises otherwise."""
    if value is None:
        return None
    value = as_array(name, value)
    if np.shape(value) not in ((p,), (p, p)):
        raise ValueError(
            f"{name} must be None (the identity), eigenvalues of shape ({p},) or a matrix of shape "
            f"({p}, {p}), got shape {np.shape(value)}"
        )
    value = check_finite(name, value, "a covariance")
    if isinstance(value, jax.core.Tracer):
        return value
    if value.ndim == 2:
        check_symmetric(name, value)
    elif (least := np.asarray(value, float).min()) < 0:
        raise ValueError(f"{name} must hold eigenvalues of at least 0, got one of {least:g}")
    return value
