r"""From data to the meta-system: the meta-loss is 1/(2N) |Phi omega - r|^2.

Adapting with filters b, q and predicting on validation data leaves the residual

    X_v theta - y_v = X_v b(S) omega - (y_v - X_v q(S) X_t^T y_t / n_t),      S = X_t^T X_t / n_t.

Since q(S) X_t^T = X_t^T q(K) with the n_t x n_t kernel matrix K = X_t X_t^T / n_t, one matrix

    C = X_v q(S) X_t^T / n_t = X_v X_t^T q(K) / n_t                        (n_v x n_t)

gives both sides for every rule:

    Phi = X_v - C X_t,      r = y_v - C y_t.

For one gradient step C = alpha X_v X_t^T / n_t, so both are linear in alpha. A rule that acts
through P S (a preconditioner) has q(P S) P X_t^T = P X_t^T q(K) with K = X_t P X_t^T / n_t: X_t
becomes X_t P in one factor of each product, and nothing else changes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from negmaml._core.arrays import contract, outer
from negmaml._core.checks import short_repr
from negmaml._core.factorisations import eigh
from negmaml._core.settings import own_settings
from negmaml._core.types import Array, Float
from negmaml.linear.data import Data
from negmaml.rules import InnerRule, check_filters


class OneStepSystem(NamedTuple):
    """Phi = A - alpha B, r = a - alpha c, rows of all tasks stacked: A, B (N, p), a, c (N,)."""

    A: jax.Array
    B: jax.Array
    a: jax.Array
    c: jax.Array


@own_settings
def meta_system(
    data: Data, rule: InnerRule
) -> tuple[Float[Array, "*rule N p"], Float[Array, "*rule N"]]:
    r"""Return (Phi, r) of the meta-loss 1/(2N) |Phi omega - r|^2 after adapting with `rule`.

        Phi_i = X_v b(S_i)      r_i = y_v - X_v q(S_i) X_t^T y_t / n_t

    Arguments:
        data: tasks, as from `sample`.
        rule: any rule; a batch of parameters shares the data.

    Returns Phi of shape rule shape + (m n_v, p) and r of shape rule shape + (m n_v,), tasks
    stacked in order. Source: Bernacchia 2021 for one gradient step; the derivation
    for the others is at the head of this module.

    >>> import negmaml as nm
    >>> problem = nm.MixedLinearRegression(p=6, m=3, n_t=4, n_v=2, n_r=5, sigma=1.0, nu=0.5)
    >>> data = nm.linear.sample(jax.random.key(0), problem)
    >>> Phi, r = nm.linear.meta_system(data, nm.GradientDescent(-0.2))
    >>> Phi.shape, r.shape  # n_v m = 6 rows
    ((6, 6), (6,))
    """
    rule = check_filters("rule", rule)
    if not isinstance(data, Data):
        raise TypeError(
            f"data must be negmaml.linear.Data(X_t, y_t, X_v, y_v), as from sample, got "
            f"{short_repr(data)}"
        )
    if rule.spectral().constant_filter is not None:
        # One gradient step is linear in the rate, so no decomposition is needed.
        parts = one_step_system(data, rule.spectral().preconditioner)
        rate, _ = outer(rule.spectral().constant_filter, parts.A)
        return parts.A - rate * parts.B, parts.a - rate[..., 0] * parts.c
    C = _response(data, rule)
    # The two equations with C at the head of this module.
    Phi = data.X_v - contract("...ivt,itp->...ivp", C, data.X_t)
    r = data.y_v - contract("...ivt,it->...iv", C, data.y_t)
    shape = rule.batch_shape
    return Phi.reshape(*shape, -1, Phi.shape[-1]), r.reshape(*shape, -1)


def one_step_system(data: Data, preconditioner=None) -> OneStepSystem:
    """The two coefficients of Phi and r in the rate of one gradient step.

    The data may have leading axes for several runs.
    """
    # X_v X_t^T first: n_v x n_t numbers a task, where second moments would be p x p.
    P = (
        contract("...vp,...tp->...vt", data.X_v, precondition(data.X_t, preconditioner))
        / data.y_t.shape[-1]
    )
    B = contract("...vt,...tp->...vp", P, data.X_t)
    c = contract("...vt,...t->...v", P, data.y_t)
    *runs, _, _, p = B.shape
    A, B = (x.reshape(*runs, -1, p) for x in (data.X_v, B))
    return OneStepSystem(A, B, *(x.reshape(*runs, -1) for x in (data.y_v, c)))


def _response(data: Data, rule: InnerRule):
    """C of this module, rule shape + (m, n_v, n_t), by an eigendecomposition shared by all rates.

    It decomposes S or K, whichever is smaller. No derivative passes through it, since inputs do
    not depend on parameters.
    """
    X_t, n_t, p = data.X_t, data.X_t.shape[1], data.X_t.shape[2]
    filters = rule.spectral()
    preconditioned = filters.preconditioner is not None
    if n_t <= p or preconditioned:
        # Decompose K (n_t x n_t), which is the smaller matrix or carries the preconditioner.
        ahead = precondition(X_t, filters.preconditioner)
        x, V = jax.vmap(eigh)(contract("isp,itp->ist", ahead, X_t) / n_t)
        left, right = contract("ivp,itp,itk->ivk", data.X_v, ahead, V), V
    else:
        # Decompose S (p x p) instead; q(S) X_t^T = V q(x) V^T X_t^T.
        x, V = jax.vmap(eigh)(contract("itp,itq->ipq", X_t, X_t) / n_t)
        left, right = contract("ivp,ipk->ivk", data.X_v, V), contract("itp,ipk->itk", X_t, V)
    # S is positive semidefinite, so a negative eigenvalue is rounding. P S need not be.
    filtered = filters.label_filter(x if preconditioned else jnp.maximum(x, 0)) / n_t
    return contract("ivk,...ik,itk->...ivt", left, filtered, right)


def precondition(X, P):
    """X P, or X without a preconditioner P."""
    if P is None:
        return X
    P = jnp.asarray(P, X.dtype)
    if P.shape not in ((), X.shape[-1:], X.shape[-1:] * 2):
        raise ValueError(
            f"preconditioner must be (p,) or (p, p) on the linear model, with p = {X.shape[-1]}, "
            f"got shape {P.shape}"
        )
    return contract("...p,pq->...q", X, P) if P.ndim == 2 else X * P
