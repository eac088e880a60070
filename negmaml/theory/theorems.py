r"""Theorems 1 and 2: the test loss far from p = n_v m, to leading order.

Both theorems are one statement about the distance D = E|omega* - w0|^2 of the meta-trained
weights from the mean task; `negmaml.problem.adapted_loss` turns D into the test loss. Notation:
h_t = h(alpha_t; n_t), N = n_v m, B = I - alpha_t S with S ~ Wishart_p(n_t)/n_t.

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
"""

import jax.numpy as jnp

from negmaml._core.checks import check_array
from negmaml._core.jit import on_host
from negmaml._core.settings import own_settings
from negmaml._core.types import Array, ArrayLike, Float
from negmaml.problem.adapted_loss import expected_test_loss, shrinkage
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

    Arguments: rates of one inner gradient step, any shape and sign.

    Returns an array of shape train_rate.shape + adapt_rate.shape. Raises ValueError unless
    p > n_v m. Source: Bernacchia 2021, Theorem 1.
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
    sigma^2 p/N; the square is right, and the slope is h_r sigma^2 p/N (theirs is its value at
    alpha_r = 0).

    Arguments: rates of one inner gradient step, any shape and sign.

    Returns an array of shape train_rate.shape + adapt_rate.shape. Raises ValueError unless
    p < n_v m. Source: Bernacchia 2021, Theorem 2.
    """
    _require_regime(problem, overparameterized=False)
    return _test_loss(problem, train_rate, adapt_rate)


def weight_error(problem: MixedLinearRegression, train: InnerRule) -> Float[Array, "*train"]:
    r"""E|omega* - w0|^2 by Theorem 1 (p > n_v m) or 2 (p < n_v m), of the rule's shape.

    See the head of this module for both equations. Raises ValueError at p = n_v m and for a
    rule other than one gradient step.
    """
    rate = _one_step_rate(train)
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
    r"""The small number both theorems expand in: the relative fluctuation of the Gram matrix.

    With G the smaller of Phi^T Phi and Phi Phi^T, k x k with mean g I,

        rho = E tr (G - g I)^2 / (k g^2)
            = ([(n_v+1) g3 + p g4] / (n_v h_t^2) - 1) / m                          p < N
            = [(n_v+1) g3/h_t^2 + (m-1) n_v] / p + g4/h_t^2 - 1                    p > N

    with g3, g4, h_t as in Theorem 2; at alpha_t = 0 it is (min(p, N) + 1) / max(p, N). The
    distance E|omega* - w0|^2 by expansion is off by a relative error of order rho. Exact,
    whatever its size; of the rule's shape. Raises ValueError unless `train` is one gradient step.
    """
    check_problem(problem)
    return _expansion_parameter(problem, _one_step_rate(train))


@on_host
def _expansion_parameter(problem: MixedLinearRegression, rate):
    p, n_v, m = problem.p, problem.n_v, problem.m
    _, _, g3, g4 = (_polynomial(c, rate) for c in _g_coefficients(problem.n_t, p))
    h_squared = shrinkage(rate, problem.n_t, p) ** 2
    if problem.overparameterized:
        return ((n_v + 1) * g3 / h_squared + (m - 1) * n_v) / p + g4 / h_squared - 1
    return (((n_v + 1) * g3 + p * g4) / (n_v * h_squared) - 1) / m


def _test_loss(problem: MixedLinearRegression, train_rate, adapt_rate):
    train, adapt = (
        GradientDescent(check_array(name, rate, "an inner learning rate"))
        for name, rate in (("train_rate", train_rate), ("adapt_rate", adapt_rate))
    )
    return expected_test_loss(problem, weight_error(problem, train), adapt)


def _one_step_rate(train: InnerRule):
    train = check_spectral("train", train)
    if train.spectral().constant_filter is None:
        raise ValueError(
            f"train must be GradientDescent with steps=1 for an expansion, got {train!r}; "
            "use method='proportional' for other rules"
        )
    return jnp.asarray(train.spectral().constant_filter)


def _require_regime(problem: MixedLinearRegression, overparameterized: bool) -> None:
    check_problem(problem)
    p, rows = problem.p, problem.rows
    if p > rows if overparameterized else p < rows:
        return
    sign, other = (">", "underparameterized") if overparameterized else ("<", "overparameterized")
    remedy = "neither theorem holds here" if p == rows else f"use theory.{other}"
    raise ValueError(f"this theorem needs p {sign} n_v m, got p={p} and n_v m={rows}; {remedy}")


@on_host
def _distance_over(problem: MixedLinearRegression, rate):
    """Theorem 1's D."""
    p, n_t = problem.p, problem.n_t
    ratio = problem.rows / p
    noise = (1 + rate**2 * p / n_t) / shrinkage(rate, n_t, p)
    start = (1 - ratio) * problem.offset_squared
    return ratio * (problem.nu**2 + problem.sigma**2 * noise) + start


@on_host
def _distance_under(problem: MixedLinearRegression, rate):
    """Theorem 2's D, with the square of h_t."""
    p, n_t, n_v = problem.p, problem.n_t, problem.n_v
    g1, g2, g3, g4 = (_polynomial(c, rate) for c in _g_coefficients(n_t, p))
    h_t = shrinkage(rate, n_t, p)
    noise = h_t + rate**2 / n_t * ((n_v + 1) * g1 + p * g2)
    tasks = ((n_v + 1) * g3 + p * g4) / p
    return p / (problem.rows * h_t**2) * (problem.sigma**2 * noise + problem.nu**2 * tasks)


def _g_coefficients(n: int, p: int) -> tuple[tuple[float, ...], ...]:
    """Coefficients in alpha of g1..g4, lowest order first, from exact Wishart moments.

    Expand B = I - alpha S under the traces; s(k, ...) = E prod tr S^k / p.
    """

    def s(*exponents: int) -> float:
        return normalized_moment(n, p, exponents)

    g1 = (s(1), -2 * s(2), s(3))
    g2 = (s(1), -2 * s(1, 1), s(1, 2))
    g3 = (1.0, -4 * s(1), 6 * s(2), -4 * s(3), s(4))
    g4 = (1.0, -4 * s(1), 2 * s(2) + 4 * s(1, 1), -4 * s(1, 2), s(2, 2))
    return g1, g2, g3, g4


def _polynomial(coefficients: tuple[float, ...], x):
    """Horner's rule, lowest order first."""
    value = 0.0 * x
    for coefficient in reversed(coefficients):
        value = value * x + coefficient
    return value
