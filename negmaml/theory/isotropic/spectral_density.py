r"""Quadrature of the mean spectrum of one task's S = X^T X / n at finite size.

On x(theta) = (1 - sqrt c)^2 + 4 sqrt(c) cos^2(theta/2), c = p/n, 0 <= theta <= pi, the
Marchenko-Pastur law is smooth in theta, and the trapezoidal rule in theta converges geometrically:

    int mu(dx) f(x) = 2/pi int_0^pi sin^2(theta)/x f(x) dtheta + (1 - n/p)_+ f(0)

Real matrices of finite size add 1/p times (Bai and Silverstein 2010, theorem 9.10)

    f(x(0))/4 + f(x(pi))/4 - 1/(2 pi) int_0^pi f(x(theta)) dtheta,

after which the error is of order 1/p^2 for every smooth filter (fourth moment at n = 5, p = 30:
539.84 exactly, 533.8 with this term, 469 without it). For the smallest sizes the ten-node Gauss
rule of the exact moments (`negmaml.problem.wishart`) is more accurate. For larger sizes its ten
nodes resolve filters that vary within the spectrum less well.
"""

from typing import Any, NamedTuple

import numpy as np

from negmaml._core.arrays import namespace
from negmaml._core.checks import check_choice
from negmaml.problem.wishart import wishart_quadrature

INTERVALS = 64  # of theta
MEASURES = ("auto", "exact", "marchenko-pastur")
# The smaller of n and p up to which "auto" takes the exact moments. Up to 3 their ten nodes resolve
# the measure itself. Entire filters are integrated to many digits, so that up to 16 they gain more
# from the tail beyond the edge of the Marchenko-Pastur law. Errors of the law (exact moments) where
# m is large and the weight error a ratio of exact means: 1.6% (0.4%) at n_t = p = 16, rate 0.7, and
# 5.9% (1.4%) at 8; 19% (1.4%) for three steps at 0.5 and 16; 1.4% (0.2%) for flow at time -0.3. A
# proximal filter of strength 0.1 has its pole beside the spectrum: 1.5% (24%).
EXACT_UP_TO, EXACT_UP_TO_ENTIRE = 3, 16


class Spectrum(NamedTuple):
    """Quadrature of the mean spectrum of S, one entry for each node.

    nodes: (k,), the last of them zero.
    weights: (k,), which sum to one; the last is the atom at zero.
    """

    nodes: Any
    weights: Any


def spectrum(n: int, p: int, measure: str, dtype, entire: bool = False) -> Spectrum | None:
    """Return the quadrature of S for sizes n, p; None to use `marchenko_pastur` of these sizes.

    `measure` is "exact" (Gauss rule of the exact moments), "marchenko-pastur" (with its 1/p term),
    or "auto": exact up to min(n, p) = 3, or up to 16 for filters that are `entire`, else
    Marchenko-Pastur. Raises ValueError for another.
    """
    check_choice("measure", measure, MEASURES)
    small = min(n, p) <= (EXACT_UP_TO_ENTIRE if entire else EXACT_UP_TO)
    if measure == "marchenko-pastur" or (measure == "auto" and not small):
        return None
    nodes, weights = wishart_quadrature(n, p)
    if p > n:  # `wishart_quadrature` has the atom first, `Spectrum` last
        nodes, weights = np.roll(nodes, -1), np.roll(weights, -1)
    else:
        nodes, weights = np.append(nodes, 0.0), np.append(weights, 0.0)
    return Spectrum(nodes.astype(dtype), weights.astype(dtype))


def _without_negative(weights):
    """Return weights of at least zero with the same mass and mean.

    Near its edges the density is smaller than its negative 1/p term. The deficit is moved to the
    edge node, where the term adds 1/(4 p), more than the whole deficit. As much as the mean asks
    for (x is linear in cos theta) is moved to the middle node. With weights of at least zero the
    integral of a positive function is positive, also beside the pole of a filter.
    """
    xp, last = namespace(weights), weights.size - 1
    share = np.cos(np.pi * np.arange(last + 1) / last).astype(weights.dtype)
    short = xp.minimum(weights, 0)
    above, below = xp.sum(short * np.maximum(share, 0)), xp.sum(short * np.maximum(-share, 0))
    place = np.eye(last + 1, dtype=weights.dtype)
    moved = above * place[0] + below * place[last]
    return weights - short + moved + (xp.sum(short) - above - below) * place[last // 2]


def marchenko_pastur(n, p, dtype, intervals: int = INTERVALS) -> Spectrum:
    """Return the quadrature at the head of this module; n and p may be traced and real."""
    theta = np.pi * np.arange(intervals + 1) / intervals
    ends = np.zeros(intervals + 1)
    ends[[0, -1]] = 0.5
    trapezoid = (1 - ends) / intervals
    # sin^2(theta) = 4 sin^2 cos^2 of theta/2; the floor lets numerator and x vanish together at
    # the hard edge (c = 1, theta = pi), where their ratio is 1.
    sine2 = np.sin(theta / 2) ** 2
    cosine2 = np.maximum(np.cos(theta / 2), 1e-9) ** 2
    xp = namespace(n, p)
    n, p = xp.asarray(n, dtype), xp.asarray(p, dtype)
    root = xp.sqrt(p / n)
    x = (1 - root) ** 2 + 4 * root * cosine2.astype(dtype)
    bulk, edges = (8 * trapezoid * sine2 * cosine2).astype(dtype), (ends - trapezoid).astype(dtype)
    weights = _without_negative(bulk / x + edges / (2 * p))
    # The rest of the mass is at zero: the atom and, for c near one, the part of the pole of 1/x
    # that the rule does not resolve. A rest that differs from the atom by rounding is the atom.
    rest, atom = 1 - xp.sum(weights), xp.maximum(1 - n / p, 0)
    rest = xp.where(xp.abs(rest - atom) < xp.finfo(x.dtype).eps ** 0.75, atom, rest)
    zero = xp.zeros_like(rest)
    return Spectrum(xp.append(x, zero), xp.append(weights, rest))
