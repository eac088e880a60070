r"""Filtered input covariances: E b(S) Sigma b(S) and its noise term, for any covariance Sigma.

S = X^T X / n with n rows x ~ N(0, Sigma). The mean is diagonal along the eigenvectors of Sigma.

**Polynomial rules, exactly.** E W^i Sigma W^j, W = n S, is a polynomial in Sigma whose coefficients
are products of traces t_k = tr Sigma^k. Integration by parts on the first factor X of a product
W M Pi, where M is a word in W and Sigma and Pi a product of traces of such words,

    E[W M Pi] = n Sigma E[M Pi]
              + sum over the W in M = P W Q:        Sigma E[P^T W Q Pi] + Sigma E[Q tr(W P) Pi]
              + sum over the W in traces tr(W C):   Sigma E[(C + C^T) W M Pi without that trace],

takes one W away at a time. At Sigma = I it is the recursion of `negmaml.problem.wishart`.

**Other rules, by sampled S.** Every call uses the same few thousand S, enough for 2^16 eigenvalues,
with one gradient step as a control variate, whose mean is exact. At p = 60, n = 20, s_k = 1/k the
standard error of tr E b Sigma b is 0.01% for a flow of time 0.7 and 0.06% for a proximal strength
of 0.5. That of a single v_k^T b Sigma b v_k is up to 0.1% and 0.6%.
"""

from collections import defaultdict
from functools import lru_cache, partial
from math import factorial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from negmaml._core.arrays import contract
from negmaml._core.factorisations import eigh
from negmaml._core.keys import fixed_key
from negmaml.rules import InnerRule

EXACT_DEGREE = 6  # of b; the recursion takes a second there
SAMPLED_EIGENVALUES, LEAST_SAMPLES = 2**16, 64


def filtered_covariance(rule: InnerRule, s, n: int):
    r"""Return (v_k^T E[b(S) Sigma b(S)] v_k, E tr(Sigma q(S)^2 S)) for eigenvalues s and n rows.

    Returns arrays of the rule's shape + (p,) and of the rule's shape. Exact for polynomials of
    degree up to 6, which several gradient steps are; else an estimate, see the head of this module.
    """
    degree = rule.spectral().degree
    if degree is not None and degree <= EXACT_DEGREE:
        return _exact(_taylor(rule.spectral().label_filter, degree, s.dtype), s, n)
    return _sampled(rule, s, n)


def _taylor(q, count: int, dtype):
    """Return the coefficients of a polynomial q of degree below `count`, rule shape + (count,)."""
    # A polynomial is its own Taylor series, so its derivatives at zero serve any rule.
    coefficients = []
    for k in range(count):
        coefficients.append(q(jnp.zeros((), dtype)) / factorial(k))
        q = partial(_slope, q)
    return jnp.stack(coefficients, -1)


def _slope(q, x):
    return jax.jvp(q, (x,), (jnp.ones_like(x),))[1]


def _exact(q, s, n: int):
    """Return `filtered_covariance` for a polynomial q with coefficients (..., degree)."""
    # Powers of s are taken in units of the largest, which neither overflow nor underflow.
    unit = lax.stop_gradient(jnp.max(s))
    unit = jnp.where(unit > 0, unit, 1)
    s, degree = s / unit, q.shape[-1]
    q = q * unit ** jnp.arange(1, degree + 1)
    # b(x) = 1 - x q(x).
    b = jnp.concatenate([jnp.ones_like(q[..., :1]), -q], -1)
    cov, noise, exponents = _tables(degree, n)
    powers = s ** jnp.arange(1, 2 * degree + 2)[:, None]
    traces = jnp.prod(jnp.sum(powers, 1) ** exponents, 1)
    # Sums over i and j of b_i b_j E S^i Sigma S^j, by powers of Sigma, and then on eigenvalues.
    of_power = contract("...i,...j,ijtk,t->...k", b, b, cov, traces)
    h = unit * contract("...k,kp->...p", of_power, powers)
    return h, contract("...i,...j,ijt,t->...", q, q, noise, traces)


@lru_cache(maxsize=64)
def _tables(degree: int, n: int):
    """Return tables of E S^i Sigma S^j and E tr(Sigma S^(i+j+1)), and their products of traces.

    Indices: i, j, product, and for the first table the power of Sigma from one. A product of traces
    is a row of exponents of tr Sigma, tr Sigma^2, ...
    """
    cov = {
        (i, j): _mean((0,) * i + (1,) + (0,) * j, (), n)
        for i in range(degree + 1)
        for j in range(degree + 1)
    }
    noise = {
        (i, j): _mean((0,), (_cycle((0,) * (i + j) + (1,)),), n)
        for i in range(degree)
        for j in range(degree)
    }
    # All products of traces that occur, so that both tables share one axis.
    products = sorted({product for word in (*cov.values(), *noise.values()) for _, product in word})
    exponents = np.array([[t.count(k + 1) for k in range(2 * degree + 1)] for t in products])
    cov_table = np.zeros((degree + 1, degree + 1, len(products), 2 * degree + 1))
    noise_table = np.zeros((degree, degree, len(products)))
    for (i, j), word in cov.items():
        for (power, product), count in word.items():
            # Exact integers up to here, divided with a single rounding.
            cov_table[i, j, products.index(product), power - 1] = count / n ** (i + j)
    for (i, j), word in noise.items():
        for (_, product), count in word.items():
            noise_table[i, j, products.index(product)] = count / n ** (i + j + 1)
    return cov_table, noise_table, exponents


@lru_cache(maxsize=200_000)
def _mean(word: tuple[int, ...], traces: tuple[tuple[int, ...], ...], n: int) -> dict:
    """Return E of a word times traces as {(power of Sigma, traces of powers of Sigma): integer}.

    (a_0, ..., a_r) is the word Sigma^a_0 W Sigma^a_1 ... W Sigma^a_r, so its transpose is the
    reversed tuple, and A W B is A + B; a trace tr(W C) is the tuple of C.
    """
    power, M = word[0], word[1:]
    total: dict = defaultdict(int)
    if not M:
        # No W is left in the word. The first trace is evaluated as a word, whose power of Sigma
        # then stands in a trace.
        if not traces:
            return {(power, ()): 1}
        for (k, product), count in _mean((0, *traces[0]), traces[1:], n).items():
            total[power, tuple(sorted((*product, k)))] += count
        return dict(total)
    # The three sums of the equation at the head of this module.
    terms = [(n, M, traces)]
    for k in range(1, len(M)):
        P, Q = M[:k], M[k:]
        terms += [(1, P[::-1] + Q, traces), (1, Q, (*traces, _cycle(P)))]
    for t, cycle in enumerate(traces):
        for k in range(len(cycle)):
            C, others = cycle[k:] + cycle[:k], traces[:t] + traces[t + 1 :]
            terms += [(1, C + M, others), (1, C[::-1] + M, others)]
    for factor, rest, remaining in terms:
        for (k, product), count in _mean(rest, tuple(sorted(remaining)), n).items():
            total[power + 1 + k, product] += factor * count
    return dict(total)


def _cycle(C: tuple[int, ...]) -> tuple[int, ...]:
    """Return one canonical form of the words C with the same tr(W C)."""
    turns = [C[k:] + C[:k] for k in range(len(C))]
    return min(min(turn, turn[::-1]) for turn in turns)


def _sampled(rule: InnerRule, s, n: int):
    """Return `filtered_covariance` from samples of S, with one gradient step as control variate."""
    p = len(s)
    # The same key in every call: results do not fluctuate from call to call.
    samples = max(LEAST_SAMPLES, SAMPLED_EIGENVALUES // min(n, p))
    normals = jax.random.normal(fixed_key(), (samples, n, p), s.dtype)
    x, Q = lax.map(partial(_decompose, n), normals * jnp.sqrt(s), batch_size=16)
    label_filter = rule.spectral().label_filter
    # The step whose 1 - rate x is closest to b on the sampled eigenvalues.
    rate = jnp.sum(label_filter(x) * x**2, (-2, -1)) / jnp.sum(x**2)
    rate = lax.stop_gradient(rate)[..., None]

    def pair(sample):
        x, Q = sample
        return _of_sample(label_filter(x), Q, s), _of_sample(
            jnp.broadcast_to(rate, (*rate.shape[:-1], *x.shape)), Q, s
        )

    found, controls = lax.map(pair, (x, Q))
    return jax.tree.map(_controlled, found, controls, _exact(rate, s, n))


def _controlled(found, control, mean):
    """Return the mean over samples (first axis), less its regression on a control of known mean."""
    error = control - mean
    # The slope of a regression leaves the smallest variance, and the mean of `error` is zero.
    variance = jnp.mean((control - control.mean(0)) ** 2, 0)
    slope = jnp.mean((found - found.mean(0)) * error, 0) / jnp.where(variance > 0, variance, 1)
    return jnp.mean(found - slope * error, 0)


def _decompose(n: int, X):
    """Return the eigenvalues x of S = X^T X / n, or of X X^T / n if fewer, and Q with S = Q Q^T.

    Then q(S) S = Q q(x) Q^T and q(S) S q(S) = Q q(x)^2 Q^T.
    """
    # Both products have the same nonzero eigenvalues, and the smaller matrix is cheaper.
    if n <= X.shape[1]:
        x, V = eigh(contract("ap,bp->ab", X, X) / n)
        return jnp.maximum(x, 0), contract("ap,ak->pk", X, V) / n**0.5
    x, V = eigh(contract("ap,aq->pq", X, X) / n)
    x = jnp.maximum(x, 0)
    return x, V * jnp.sqrt(x)


def _of_sample(q, Q, s):
    """Return diag(b Sigma b) and tr(Sigma q S q) for filters q (..., k) on one sample."""
    b = jnp.eye(len(s), dtype=s.dtype) - contract("pk,...k,rk->...pr", Q, q, Q)
    return contract("...pr,r->...p", b**2, s), contract("p,pk,...k->...", s, Q**2, q**2)
