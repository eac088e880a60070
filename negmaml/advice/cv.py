"""Meta-training and testing of many splits: every training rate and ridge, exactly.

The forms of `quadratics` add up over the groups of a split, so a split costs one sum, a rate one
small factorisation, and a further ridge little or nothing; the adaptation rate is the variable of a
quadratic.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from negmaml.advice.solve import ridge_path
from negmaml.advice.splits import Splits
from negmaml.advice.statistics import Quadratics

NUMBERS = 2**22  # of the products of a batch of splits, 32 MB


class Losses(NamedTuple):
    """Half the mean squared error on held-out groups, for S splits and K means over groups.

    meta: (S, K, 3, R, L), coefficients of the quadratic c0 - 2 a c1 + a^2 c2 in the adaptation rate
        a; twice the loss.
    pooled: (S, K, 3, 1, L), the same for a ridge regression on all rows of the training groups.
    """

    meta: np.ndarray
    pooled: np.ndarray


def losses(
    forms: Quadratics,
    splits: Splits,
    rates,
    ridges,
    free: int,
    advance: Callable[[int], None] = lambda done: None,
) -> Losses:
    """Train on each split, test on its held-out groups.

    Arguments:
        rates: (R,), in units of the rows.
        ridges: (L,), of the normal equations summed over the training rows.
        free: how many leading coefficients are not shrunk.
        advance: called with the number of splits that are done.
    """
    size, R, L = len(splits.fold), len(rates), len(ridges)
    P = forms.test.shape[-1]
    p = P - forms.targets
    K = splits.weights.shape[1]
    meta, pooled = np.empty((size, K, 3, R, L)), np.empty((size, K, 3, 1, L))
    flat, single = forms.train.reshape(-1, 3 * P * P), forms.pooled.reshape(-1, P * P)
    step = max(1, NUMBERS // max(3 * K * R * L * P * (P - p), R * P * P))
    for start in range(0, size, step):
        piece = slice(start, start + step)
        some = len(splits.fold[piece])
        Q = (splits.train[piece] @ flat).reshape(some, 3, P, P)
        test = np.tensordot(splits.weights[piece], forms.test, 1)  # (some, K, 3, P, P)
        v = _models(Q, rates, ridges, p, free)
        meta[piece] = _values(test, v.reshape(some, R * L, P, -1)).reshape(some, K, 3, R, L)
        alone = (splits.train[piece] @ single).reshape(some, 1, P, P)
        v = _models(np.pad(alone, ((0, 0), (0, 2), (0, 0), (0, 0))), np.zeros(1), ridges, p, free)
        pooled[piece, :, :, 0] = _values(test, v[:, 0])
        advance(some)
    return Losses(meta, pooled)


def _models(Q, rates, ridges, p, free):
    """v = (-omega, 1) at every rate and ridge: (S, R, L, P, q) from Q of shape (S, 3, P, P)."""
    rates = rates[:, None, None]
    total = Q[:, None, 0] - 2 * rates * Q[:, None, 1] + rates**2 * Q[:, None, 2]
    size, R, P = total.shape[:3]
    system = total.reshape(-1, P, P)
    omega = ridge_path(system[:, :p, :p], system[:, :p, p:], ridges, free)
    return as_residual(omega).reshape(size, R, len(ridges), P, P - p)


def as_residual(omega):
    """v with z.v = y - x.omega: (..., p + q, q) from (..., p, q)."""
    q = omega.shape[-1]
    ones = np.broadcast_to(np.eye(q), (*omega.shape[:-2], q, q))
    return np.concatenate([-omega, ones], -2)


def _values(forms, v):
    """v^T M v, averaged over targets: (S, K, 3, N) from M (S, K, 3, P, P) and v (S, N, P, q)."""
    S, N, P, q = v.shape
    columns = np.moveaxis(v, 1, 2).reshape(S, P, N * q)
    product = (forms.reshape(S, -1, P) @ columns).reshape(S, -1, P, N * q)
    values = np.einsum("skpn,spn->skn", product, columns)
    return values.reshape(*forms.shape[:3], N, q).mean(-1)
