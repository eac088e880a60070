r"""The theorems of Bernacchia 2021: the test loss far from p = n_v m, to leading order.

Theorems 1 and 2 are one statement about the weight error D = E|omega* - w0|^2, the distance of the
meta-trained weights from the mean task; `negmaml.problem.adapted_loss` turns D into the test loss.
Notation: h_t = h(alpha_t; n_t), N = n_v m, B = I - alpha_t S with S ~ Wishart_p(n_t)/n_t.

Theorem 1, p > N, leading order in N/p:

    D = nu^2 N/p + (1 - N/p) |omega_0 - w0|^2 + sigma^2 N/p (1 + alpha_t^2 p/n_t) / h_t

Theorem 2, p < N, leading order in 1/m:

    D = p/(N h_t^2) { sigma^2 [h_t + alpha_t^2/n_t ((n_v+1) g1 + p g2)]
                      + nu^2/p [(n_v+1) g3 + p g4] }

    g1 = E tr(B^2 S)/p    g2 = E[tr S tr B^2]/p^2    g3 = E tr B^4/p    g4 = E[(tr B^2)^2]/p^2

**Two corrections to printed versions of Theorem 2.** (i) Some show h_t where h_t^2 stands here;
simulation decides for the square (0.0414 against 0.0415 with it and 0.0523 without, at n_t=5,
n_v=25, n_r=10, m=40, p=30, sigma=nu=0.2, alpha_r=0.2, alpha_t=-0.5). (ii) The slope of the
loss at alpha_t = 0 is h_r sigma^2 p/(n_v m); printed without h_r, it is the value at
alpha_r = 0. Tests prove both, by simulation and by automatic differentiation.

Theorem 3 is for inputs and task weights that are not isotropic and need not be Gaussian; see
`general_inputs`. A network in its lazy regime is linear in its parameters, with features
k(x) = grad_omega f(x, omega_0) as inputs. The moments of k then predict the effect of the inner
rate on the network.
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
from negmaml._core.jit import on_host
from negmaml._core.settings import own_settings
from negmaml._core.types import Array, ArrayLike, Float, ScalarLike
from negmaml.problem.adapted_loss import expected_test_loss, shrinkage
from negmaml.problem.covariance import check_covariance
from negmaml.problem.model import MixedLinearRegression, check_problem
from negmaml.problem.wishart import normalized_moment
from negmaml.rules import GradientDescent, InnerRule
from negmaml.theory.isotropic.inputs import check_spectral
from negmaml.theory.options import named_options


@named_options
@own_settings
def overparameterized(
    problem: MixedLinearRegression, train_rate: ArrayLike, adapt_rate: ArrayLike
) -> Float[Array, "..."]:
    r"""Theorem 1: expected test loss when p > n_v m, leading order in n_v m / p.

        L = sigma^2/2 (1 + alpha_r^2 p/n_r)
          + h_r [ nu^2/2 (1 + N/p) + (1 - N/p)/2 |omega_0 - w0|^2
                  + sigma^2 N/(2p) (1 + alpha_t^2 p/n_t)/h_t ]

    with N = n_v m, h_t = (1 - alpha_t)^2 + alpha_t^2 (p+1)/n_t and h_r likewise with alpha_r, n_r.

    Arguments:
        train_rate, adapt_rate: rates of one inner gradient step, any shape and sign.

    Returns an array of shape train_rate.shape + adapt_rate.shape. Raises ValueError unless
    p > n_v m. Source: Bernacchia 2021, Theorem 1.

    >>> import negmaml as nm
    >>> problem = nm.MixedLinearRegression(p=60, m=3, n_t=30, n_v=2, n_r=20, sigma=1.0, nu=0.5)
    >>> loss = nm.theory.overparameterized(problem, [-0.2, 0.0, 0.2], 0.2)
    >>> [f"{x:.3f}" for x in loss]
    ['0.692', '0.703', '0.722']
    """
    _require_regime(problem, overparameterized=True)
    return _test_loss(problem, train_rate, adapt_rate)


@named_options
@own_settings
def underparameterized(
    problem: MixedLinearRegression, train_rate: ArrayLike, adapt_rate: ArrayLike
) -> Float[Array, "..."]:
    r"""Theorem 2, corrected: expected test loss when p < n_v m, leading order in 1/m.

        L = sigma^2/2 (1 + alpha_r^2 p/n_r) + h_r nu^2/2
          + h_r/(2 h_t^2) p/N { sigma^2 [ h_t + alpha_t^2/n_t ((n_v+1) g1 + p g2) ]
                                + nu^2/p [ (n_v+1) g3 + p g4 ] }

    with N = n_v m and, for B = I - alpha_t S, g1 = E tr(B^2 S)/p, g2 = E[tr S tr B^2]/p^2,
    g3 = E tr B^4/p, g4 = E[(tr B^2)^2]/p^2, exact polynomials in alpha_t.

    Some printed versions have h_t where h_t^2 stands, and give the slope at alpha_t = 0 as
    sigma^2 p/N. The square is right, and the slope is h_r sigma^2 p/N: theirs is its value at
    alpha_r = 0.

    Arguments:
        train_rate, adapt_rate: rates of one inner gradient step, any shape and sign.

    Returns an array of shape train_rate.shape + adapt_rate.shape. Raises ValueError unless
    p < n_v m. Source: Bernacchia 2021, Theorem 2.

    >>> import negmaml as nm
    >>> problem = nm.MixedLinearRegression(p=30, m=40, n_t=5, n_v=25, n_r=10, sigma=1.0, nu=0.5)
    >>> loss = nm.theory.underparameterized(problem, [-0.2, 0.0, 0.2], 0.2)
    >>> [f"{x:.3f}" for x in loss]
    ['0.678', '0.672', '0.679']
    """
    _require_regime(problem, overparameterized=False)
    return _test_loss(problem, train_rate, adapt_rate)


def weight_error(problem: MixedLinearRegression, train: InnerRule) -> Float[Array, "*train"]:
    r"""Return E|omega* - w0|^2 by Theorem 1 (p > n_v m) or 2 (p < n_v m), of the rule's shape.

    See the head of this module for both equations. Raises ValueError at p = n_v m and for a
    rule other than one gradient step.
    """
    rate = _one_step_rate("train", train)
    if problem.p > problem.rows:
        return _distance_over(problem, rate)
    if problem.p < problem.rows:
        return _distance_under(problem, rate)
    raise ValueError(
        f"p = n_v m = {problem.p}: the expansions hold far from it on either side and the mean "
        "itself is infinite there; change p, m or n_v"
    )


@named_options
@own_settings
def expansion_parameter(problem: MixedLinearRegression, train: InnerRule) -> Float[Array, "*train"]:
    r"""Return the small parameter of both theorems: the relative fluctuation of the Gram matrix.

    With G the smaller of Phi^T Phi and Phi Phi^T, k x k with mean g I,

        rho = E tr (G - g I)^2 / (k g^2)
            = ([(n_v+1) g3 + p g4] / (n_v h_t^2) - 1) / m                          p < N
            = [(n_v+1) g3/h_t^2 + (m-1) n_v] / p + g4/h_t^2 - 1                    p > N

    with g3, g4, h_t as in Theorem 2; at alpha_t = 0 it is (min(p, N) + 1) / max(p, N). The
    weight error by expansion has a relative error of order rho. rho itself is exact, whatever its
    size; it has the rule's shape. Raises ValueError unless `train` is one gradient step.

    >>> import negmaml as nm
    >>> problem = nm.MixedLinearRegression(p=60, m=3, n_t=30, n_v=2, n_r=20, sigma=1.0, nu=0.5)
    >>> rho = nm.theory.expansion_parameter(problem, nm.GradientDescent(0.0))
    >>> round(float(rho), 4)  # (6 + 1) / 60
    0.1167
    """
    check_problem(problem)
    return _expansion_parameter(problem, _one_step_rate("train", train))


@on_host
def _expansion_parameter(problem: MixedLinearRegression, rate):
    p, n_v, m = problem.p, problem.n_v, problem.m
    _, _, g3, g4 = (_polynomial(c, rate) for c in _g_coefficients(problem.n_t, p))
    h_squared = shrinkage(rate, problem.n_t, p) ** 2
    # The smaller Gram matrix is Phi Phi^T for p > N, and Phi^T Phi otherwise.
    if problem.overparameterized:
        return ((n_v + 1) * g3 / h_squared + (m - 1) * n_v) / p + g4 / h_squared - 1
    return (((n_v + 1) * g3 + p * g4) / (n_v * h_squared) - 1) / m


def _test_loss(problem: MixedLinearRegression, train_rate, adapt_rate):
    train, adapt = (
        GradientDescent(check_array(name, rate, "an inner learning rate"))
        for name, rate in (("train_rate", train_rate), ("adapt_rate", adapt_rate))
    )
    return expected_test_loss(problem, weight_error(problem, train), adapt)


def _one_step_rate(name: str, rule: InnerRule):
    """Return the rate of one plain gradient step; raise for any other rule."""
    # Both theorems expand the products of one step; several steps have other polynomials.
    rate = check_spectral(name, rule).spectral().constant_filter
    if rate is None:
        raise ValueError(
            f"{name} must be GradientDescent with steps=1 for an expansion, got {rule!r}; "
            "use method='proportional' for other rules"
        )
    return jnp.asarray(rate, jnp.result_type(float, rate))


def _require_regime(problem: MixedLinearRegression, overparameterized: bool) -> None:
    check_problem(problem)
    p, rows = problem.p, problem.rows
    if p > rows if overparameterized else p < rows:
        return
    # The other theorem is named, because the call usually only mistakes the regime.
    sign, other = (">", "underparameterized") if overparameterized else ("<", "overparameterized")
    remedy = "neither theorem holds here" if p == rows else f"use theory.{other}"
    raise ValueError(f"this theorem needs p {sign} n_v m, got p={p} and n_v m={rows}; {remedy}")


@on_host
def _distance_over(problem: MixedLinearRegression, rate):
    """Return D of Theorem 1."""
    p, n_t = problem.p, problem.n_t
    # N/p is the share of directions that the rows determine; the rest stay at omega_0.
    ratio = problem.rows / p
    noise = (1 + rate**2 * p / n_t) / shrinkage(rate, n_t, p)
    start = (1 - ratio) * problem.offset_squared
    return ratio * (problem.nu**2 + problem.sigma**2 * noise) + start


@on_host
def _distance_under(problem: MixedLinearRegression, rate):
    """Return D of Theorem 2, with the square of h_t."""
    p, n_t, n_v = problem.p, problem.n_t, problem.n_v
    g1, g2, g3, g4 = (_polynomial(c, rate) for c in _g_coefficients(n_t, p))
    h_t = shrinkage(rate, n_t, p)
    # The braces of Theorem 2: the terms of label noise, then those of the tasks.
    noise = h_t + rate**2 / n_t * ((n_v + 1) * g1 + p * g2)
    tasks = ((n_v + 1) * g3 + p * g4) / p
    return p / (problem.rows * h_t**2) * (problem.sigma**2 * noise + problem.nu**2 * tasks)


def _g_coefficients(n: int, p: int) -> tuple[tuple[float, ...], ...]:
    """Return the coefficients in alpha of g1 to g4, lowest order first, from exact Wishart moments.

    They expand B = I - alpha S under the traces; s(k, ...) = E prod tr S^k / p.
    """

    def s(*exponents: int) -> float:
        return normalized_moment(n, p, exponents)

    # tr B^2 S, tr S tr B^2, tr B^4 and (tr B^2)^2, multiplied out in powers of alpha.
    g1 = (s(1), -2 * s(2), s(3))
    g2 = (s(1), -2 * s(1, 1), s(1, 2))
    g3 = (1.0, -4 * s(1), 6 * s(2), -4 * s(3), s(4))
    g4 = (1.0, -4 * s(1), 2 * s(2) + 4 * s(1, 1), -4 * s(1, 2), s(2, 2))
    return g1, g2, g3, g4


def _polynomial(coefficients: tuple[float, ...], x):
    """Return the polynomial at x by Horner's rule; coefficients are lowest order first."""
    value = 0.0 * x
    for coefficient in reversed(coefficients):
        value = value * x + coefficient
    return value


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
    as `feature_moments` finds them, where p is too large for matrices. Off-diagonal elements of F
    are then neglected. Inputs whose components have independent signs have none, and then only the
    diagonal of Sigma_w matters.

    Arguments:
        covariance: Sigma = E x x^T, shape (p, p), or its eigenvalues.
        weight_covariance: Sigma_w = E w w^T, in the same form.
        train, adapt: rules of one inner gradient step, rates of any shape and sign.
        m, n_t, n_v, n_r, sigma: as in `MixedLinearRegression`.
        fourth_moment: F = E[(x^T Sigma x) x x^T], in the same form; Gaussian inputs when
            omitted, F = Sigma tr(Sigma^2) + 2 Sigma^3.

    Returns an array of shape train shape + adapt shape. Raises ValueError for sizes below 1,
    matrices that are not of one shape, symmetric, finite and (covariances) positive semidefinite,
    other rules, a bad sigma, and unless p > n_v m.
    Source: Bernacchia 2021, Theorem 3.

    >>> import negmaml as nm
    >>> s, task_variances = np.ones(60), np.full(60, 0.25 / 60)  # as with nu = 0.5
    >>> sizes = {"m": 3, "n_t": 30, "n_v": 2, "n_r": 20, "sigma": 1.0}
    >>> train, adapt = nm.GradientDescent(-0.2), nm.GradientDescent(0.2)
    >>> loss = nm.theory.general_inputs(s, task_variances, train, adapt, **sizes)
    >>> round(float(loss), 3)  # that of `overparameterized`
    0.692
    """
    m, n_t, n_v, n_r = (
        check_count(name, n) for name, n in dict(m=m, n_t=n_t, n_v=n_v, n_r=n_r).items()
    )
    train_rate, adapt_rate = (
        _one_step_rate(name, rule) for name, rule in (("train", train), ("adapt", adapt))
    )
    sigma = check_nonnegative("sigma", sigma, "a standard deviation")
    rows = n_v * m
    sigma_x, sigma_w, fourth_moment = _check_moments(
        covariance, weight_covariance, fourth_moment, rows
    )

    square = _matmul(sigma_x, sigma_x)
    cube = _matmul(square, sigma_x)
    power = jnp.sum(sigma_x**2)
    # F - Sigma^3: for Gaussian inputs F = Sigma tr Sigma^2 + 2 Sigma^3.
    excess = power * sigma_x + cube if fourth_moment is None else fourth_moment - cube

    # H(alpha, n) = Sigma - 2 alpha Sigma^2 + alpha^2 (Sigma^3 + excess/n): a quadratic in alpha, so
    # every trace is a small table of data-only numbers times powers of the rates.
    basis_t = jnp.stack([sigma_x, -2 * square, cube + excess / n_t])
    basis_r = jnp.stack([sigma_x, -2 * square, cube + excess / n_r])
    t, r = (_powers(rate) for rate in (train_rate, adapt_rate))
    # tr H_t, tr(Sigma_w H) and tr(H_r H_t) as linear and bilinear forms of (1, rate, rate^2).
    h_t = t @ (jnp.sum(basis_t, 1) if sigma_x.ndim == 1 else jnp.trace(basis_t, axis1=1, axis2=2))
    weights_t = t @ _traces(basis_t, sigma_w[None])[:, 0]
    weights_r = r @ _traces(basis_r, sigma_w[None])[:, 0]
    cross = jnp.tensordot(t @ _traces(basis_t, basis_r), r, ((-1,), (-1,)))
    noise_t, noise_r = (sigma**2 * (1 + x[..., 2] / n * power) for x, n in ((t, n_t), (r, n_r)))

    # L of the docstring: tr(Sigma_w H_r)/2 + noise/2, and the product of both braces.
    trained, adapted = outer((weights_t + noise_t) / h_t**2, weights_r + noise_r)
    return adapted / 2 + rows / 2 * cross * trained


def _powers(rate):
    """Return (1, rate, rate^2) along a new last axis."""
    return jnp.stack([jnp.ones_like(rate), rate, rate**2], -1)


def _matmul(a, b):
    if a.ndim == 1:  # both are diagonals
        return a * b
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _traces(a, b):
    """Return tr(a_i b_j) for stacks of matrices or of diagonals."""
    if a.ndim == 2:
        return jnp.matmul(a, b.T, precision=lax.Precision.HIGHEST)
    return jnp.einsum("ixy,jyx->ij", a, b, precision=lax.Precision.HIGHEST)


def _check_moments(covariance, weight_covariance, fourth_moment, rows: int):
    """Return the three moments as arrays, the last None if omitted; raise ValueError."""
    named = dict(
        covariance=covariance, weight_covariance=weight_covariance, fourth_moment=fourth_moment
    )
    given = {
        name: check_array(name, value, "a matrix or its diagonal")
        for name, value in named.items()
        if value is not None or name != "fourth_moment"
    }
    # All three share the form of the first: matrices or diagonals.
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
