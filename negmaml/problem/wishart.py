r"""Exact moments of real Wishart matrices, and the quadrature they define.

W = X^T X with X an n x p matrix of independent standard normals; S = W / n.

Moments. Integration by parts, E[x f(x)] = E[f'(x)] for a standard normal x, applied to the
first factor X of tr W^k = tr X^T X W^{k-1} and to every other trace, gives for k >= 1 and any
product Pi = prod_j tr W^{b_j}

    E[tr W^k Pi] = (n + k - 1) E[tr W^{k-1} Pi]
                 + sum_{l=0}^{k-2} E[tr W^{l+1} tr W^{k-2-l} Pi]
                 + sum_j 2 b_j E[tr W^{k-1+b_j} Pi / tr W^{b_j}],        tr W^0 = p,

whose total exponent falls by one each time. All terms are integers, so the result is exact.

Quadrature. The mean spectral measure mu of S has the moments E[tr S^k]/p. Its Gauss rule
integrates polynomials exactly and smooth filters to many digits, at the finite n and p where
the Marchenko-Pastur limit is still far off.
"""

from collections.abc import Iterable
from fractions import Fraction
from functools import lru_cache
from numbers import Integral

import numpy as np

from negmaml._core.checks import check_count, short_repr


def wishart_moment(n: int, p: int, exponents: tuple[int, ...]) -> int:
    r"""E prod_j tr W^{k_j} for W = X^T X, X of n standard normal rows in p dimensions.

    Arguments:
        n, p: sizes, at least 1.
        exponents: the k_j, integers of at least 0 (tr W^0 = p).

    Returns an exact Python int. Raises TypeError or ValueError for other arguments.

    >>> wishart_moment(5, 30, (4,))  # E tr S^4 / p = 539.84 with S = W / n
    10122000
    """
    return _moment(check_count("n", n), check_count("p", p), _check_exponents(exponents))


def _check_exponents(exponents) -> tuple[int, ...]:
    """Return the exponents as sorted integers."""
    listed = isinstance(exponents, Iterable) and not isinstance(exponents, str)
    given = tuple(exponents) if listed else ()
    if not listed or any(isinstance(k, bool) or not isinstance(k, Integral) for k in given):
        raise TypeError(
            f"exponents must be integers of at least 0, such as (2, 1), got {short_repr(exponents)}"
        )
    if any(k < 0 for k in given):
        raise ValueError(f"exponents must be integers of at least 0, got {short_repr(exponents)}")
    return tuple(sorted(map(int, given)))


@lru_cache(maxsize=200_000)
def _moment(n: int, p: int, powers: tuple[int, ...]) -> int:
    """Evaluate the recursion of this module, on sorted exponents to share equal products."""
    # Sorted, so if the last exponent is zero all are, and tr W^0 = p.
    if not powers or powers[-1] == 0:
        return p ** len(powers)
    k, rest = powers[-1], powers[:-1]

    def moment(*more: int, others: tuple[int, ...] = rest) -> int:
        return _moment(n, p, tuple(sorted(others + more)))

    total = (n + k - 1) * moment(k - 1)
    total += sum(moment(l + 1, k - 2 - l) for l in range(k - 1))
    for j, b in enumerate(rest):
        if b:
            total += 2 * b * moment(k - 1 + b, others=rest[:j] + rest[j + 1 :])
    return total


def normalized_moment(n: int, p: int, exponents: tuple[int, ...]) -> float:
    """Return E prod_j (tr S^{k_j} / p), the moment of S = W / n, correctly rounded to a float."""
    n, p, powers = check_count("n", n), check_count("p", p), _check_exponents(exponents)
    return float(Fraction(_moment(n, p, powers), n ** sum(powers) * p ** len(powers)))


def wishart_quadrature(n: int, p: int, order: int = 10) -> tuple[np.ndarray, np.ndarray]:
    r"""Gauss quadrature of the mean spectral measure of S = X^T X / n at finite n and p.

        sum_i weights_i f(nodes_i) = E tr f(S) / p      for polynomials f of degree < 2 order

    and to many digits for other smooth f. When p > n the measure has an atom of mass 1 - n/p
    at zero, returned as the first node; the rest is the Gauss rule of the continuous part.

    Arguments:
        n, p: sizes, at least 1.
        order: nodes of the Gauss rule, at least 1; its moments cost about 0.1 s at 10, 3 s at 16.

    Returns float64 arrays (nodes, weights) of length order, or order + 1 with an atom. Raises
    TypeError or ValueError for sizes below 1.

    >>> nodes, weights = wishart_quadrature(20, 5)
    >>> round(float(weights @ nodes), 6), round(float(weights @ nodes**2), 6)  # 1 and 1 + 6/20
    (1.0, 1.3)
    """
    return _quadrature(check_count("n", n), check_count("p", p), check_count("order", order))


@lru_cache(maxsize=256)
def _quadrature(n: int, p: int, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the Gauss rule of rational moments, less the atom."""
    moments = [Fraction(wishart_moment(n, p, (k,)), n**k * p) for k in range(2 * order)]
    # With fewer rows than dimensions S has p - n eigenvalues of zero.
    atom = max(Fraction(0), 1 - Fraction(n, p))
    # An atom at zero adds to the moment of order zero only.
    nodes, weights = _gauss([moments[0] - atom, *moments[1:]])
    if atom:
        nodes, weights = np.append(0.0, nodes), np.append(float(atom), weights)
    for array in (nodes, weights):  # all callers share the cached arrays
        array.setflags(write=False)
    return nodes, weights


def _gauss(moments: list[Fraction]) -> tuple[np.ndarray, np.ndarray]:
    """Return Gauss nodes and weights from the first 2n moments (Golub and Welsch 1969).

    The map from moments to the three-term recurrence of the orthogonal polynomials loses about a
    digit for each moment, hence rational arithmetic (Chebyshev's algorithm, Gautschi 2004, section
    2.1.7). The eigenvalue problem that follows is symmetric and well conditioned.
    """
    order = len(moments) // 2
    previous, current = [Fraction(0)] * (2 * order), list(moments)
    alpha, beta = [current[1] / current[0]], [current[0]]
    # previous, current: mixed moments of the orthogonal polynomials of degree k - 2 and k - 1.
    for k in range(1, order):
        following = [Fraction(0)] * (2 * order)
        for l in range(k, 2 * order - k):
            following[l] = current[l + 1] - alpha[-1] * current[l] - beta[-1] * previous[l]
        alpha.append(following[k + 1] / following[k] - current[k] / current[k - 1])
        beta.append(following[k] / current[k - 1])
        previous, current = current, following
    off_diagonal = np.sqrt([float(b) for b in beta[1:]])
    jacobi = np.diag([float(a) for a in alpha]) + np.diag(off_diagonal, -1)
    nodes, vectors = np.linalg.eigh(jacobi)  # reads the lower triangle
    # Weights are the squared first components of the eigenvectors, times the total mass.
    return nodes, float(beta[0]) * vectors[0] ** 2
