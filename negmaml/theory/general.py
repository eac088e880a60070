r"""Theorem 3: inputs and task weights that are not isotropic and need not be Gaussian.

A network in its lazy regime is linear in its parameters, with features
k(x) = grad_omega f(x, omega_0) as inputs; the moments of k then predict the effect of the
inner rate on the network.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

from negmaml._core.arrays import outer
from negmaml._core.checks import (
    check_array,
    check_count,
    check_nonnegative,
    check_symmetric,
)
from negmaml._core.settings import own_settings
from negmaml._core.types import Array, ArrayLike, Float, ScalarLike
from negmaml.problem.covariance import check_covariance
from negmaml.rules import InnerRule
from negmaml.theory.isotropic.inputs import check_spectral
from negmaml.theory.options import named_options


@named_options
@own_settings
def general_inputs(
    covariance: Float[ArrayLike, "p p"] | Float[ArrayLike, " p"],
    weight_covariance: Float[ArrayLike, "p p"] | Float[ArrayLike, " p"],
    train: InnerRule,
    adapt: InnerRule,
    *,
    m: int,
    n_t: int,
    n_v: int,
    n_r: int,
    sigma: ScalarLike,
    fourth_moment: Float[ArrayLike, "p p"] | Float[ArrayLike, " p"] | None = None,
) -> Float[Array, "..."]:
    r"""Theorem 3: expected test loss when p > n_v m for general inputs, omega_0 = w0 = 0.

        H(alpha, n) = Sigma (I - alpha Sigma)^2 + alpha^2/n (F - Sigma^3)
        L = 1/2 tr(Sigma_w H_r) + sigma^2/2 (1 + alpha_r^2/n_r tr Sigma^2)
          + n_v m/2 tr(H_r H_t)/tr(H_t)^2
            { tr(Sigma_w H_t) + sigma^2 (1 + alpha_t^2/n_t tr Sigma^2) }

    to leading order in n_v m / p. At Sigma = I, Sigma_w = nu^2/p I it is Theorem 1.

    All three matrices may be given by their diagonals along the eigenvectors of Sigma, shape (p,),
    as `feature_moments` finds them, where p is too large for matrices. What is off the diagonal of
    F is then left out: inputs whose components have independent signs have none, and then nothing
    of Sigma_w but its diagonal enters either.

    Arguments:
        covariance: Sigma = E x x^T, shape (p, p), or its eigenvalues.
        weight_covariance: Sigma_w = E w w^T, in the same form.
        train, adapt: rules of one inner gradient step, rates of any shape and sign.
        m, n_t, n_v, n_r, sigma: as in `MixedLinearRegression`.
        fourth_moment: F = E[(x^T Sigma x) x x^T], in the same form; Gaussian inputs when
            left out, F = Sigma tr(Sigma^2) + 2 Sigma^3.

    Returns an array of shape train shape + adapt shape. Raises ValueError for sizes below 1,
    matrices that are not of one shape, symmetric, finite and (covariances) positive semidefinite,
    other rules, a bad sigma, and unless p > n_v m.
    Source: Bernacchia 2021, Theorem 3.
    """
    m, n_t, n_v, n_r = (
        check_count(name, n) for name, n in dict(m=m, n_t=n_t, n_v=n_v, n_r=n_r).items()
    )
    train_rate, adapt_rate = (
        _rate_of(name, rule) for name, rule in (("train", train), ("adapt", adapt))
    )
    sigma = check_nonnegative("sigma", sigma, "a standard deviation")
    rows = n_v * m
    sigma_x, sigma_w, fourth_moment = _checked(covariance, weight_covariance, fourth_moment, rows)

    square = _matmul(sigma_x, sigma_x)
    cube = _matmul(square, sigma_x)
    power = jnp.sum(sigma_x**2)
    excess = power * sigma_x + cube if fourth_moment is None else fourth_moment - cube

    # H(alpha, n) = Sigma - 2 alpha Sigma^2 + alpha^2 (Sigma^3 + excess/n): a quadratic in alpha, so
    # every trace is a small table of data-only numbers times powers of the rates.
    basis_t = jnp.stack([sigma_x, -2 * square, cube + excess / n_t])
    basis_r = jnp.stack([sigma_x, -2 * square, cube + excess / n_r])
    t, r = (_powers(rate) for rate in (train_rate, adapt_rate))
    h_t = t @ (jnp.sum(basis_t, 1) if sigma_x.ndim == 1 else jnp.trace(basis_t, axis1=1, axis2=2))
    weights_t = t @ _traces(basis_t, sigma_w[None])[:, 0]
    weights_r = r @ _traces(basis_r, sigma_w[None])[:, 0]
    cross = jnp.tensordot(t @ _traces(basis_t, basis_r), r, ((-1,), (-1,)))
    noise_t, noise_r = (sigma**2 * (1 + x[..., 2] / n * power) for x, n in ((t, n_t), (r, n_r)))

    trained, adapted = outer((weights_t + noise_t) / h_t**2, weights_r + noise_r)
    return adapted / 2 + rows / 2 * cross * trained


def _rate_of(name: str, rule: InnerRule):
    """The rate of one plain gradient step."""
    rule = check_spectral(name, rule)
    if rule.spectral().constant_filter is None:
        raise ValueError(f"{name} must be GradientDescent with steps=1 for Theorem 3, got {rule!r}")
    return rule.spectral().constant_filter


def _powers(rate):
    """(1, rate, rate^2) along a new last axis."""
    rate = jnp.asarray(rate, jnp.result_type(float, rate))
    return jnp.stack([jnp.ones_like(rate), rate, rate**2], -1)


def _matmul(a, b):
    if a.ndim == 1:  # diagonals
        return a * b
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _traces(a, b):
    """tr(a_i b_j) for stacks of matrices or of diagonals."""
    if a.ndim == 2:
        return jnp.matmul(a, b.T, precision=lax.Precision.HIGHEST)
    return jnp.einsum("ixy,jyx->ij", a, b, precision=lax.Precision.HIGHEST)


def _checked(covariance, weight_covariance, fourth_moment, rows: int):
    """The three as arrays of JAX, the last None where it is left out."""
    named = dict(
        covariance=covariance, weight_covariance=weight_covariance, fourth_moment=fourth_moment
    )
    given = {
        name: check_array(name, value, "a matrix or its diagonal")
        for name, value in named.items()
        if value is not None or name != "fourth_moment"
    }
    p = len(given["covariance"]) if np.ndim(given["covariance"]) else 0
    shape = (p,) if np.ndim(given["covariance"]) == 1 else (p, p)
    for name, matrix in given.items():
        if np.shape(matrix) != shape:
            raise ValueError(
                f"{name} must have shape (p, p) with the p of covariance, or (p,) for diagonals, "
                f"got {np.shape(matrix)} where covariance has {np.shape(given['covariance'])}"
            )
        if name != "fourth_moment":
            check_covariance(name, matrix, p)
        elif len(shape) == 2:
            check_symmetric(name, matrix, semidefinite=False)
    if p <= rows:
        raise ValueError(
            f"Theorem 3 needs p > n_v m, got p={p} and n_v m={rows}; use fewer tasks or points"
        )
    x, w, *fourth = (jnp.asarray(matrix) for matrix in given.values())
    return x, w, fourth[0] if fourth else None
