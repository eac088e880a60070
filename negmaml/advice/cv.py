"""Meta-trains and tests many splits exactly, at every training rate and ridge.

The forms of `quadratic_forms` add up over the groups of a split. A split therefore costs one sum, a
rate one small factorization, and a further ridge next to nothing. The loss is an explicit quadratic
in the adaptation rate.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from negmaml.advice.solve import ridge_path
from negmaml.advice.splits import Splits
from negmaml.advice.statistics import QuadraticForms

BATCH_NUMBERS = 2**22  # in the products of a batch of splits, 32 MB


class CVLosses(NamedTuple):
    """Mean squared error on held-out groups, for S splits and K means over groups.

    meta: (S, K, 3, R, L), coefficients of the quadratic c0 - 2 a c1 + a^2 c2 in the adaptation rate
        a, which is twice the loss.
    pooled: (S, K, 3, 1, L), the same for a ridge regression on all rows of the training groups.
    others: half the mean squared error of other methods by name, (S, K, options): ridges, or
        structures of the mixed model.
    """

    meta: np.ndarray
    pooled: np.ndarray
    others: dict[str, np.ndarray]

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> "CVLosses":
        """Apply a function to all arrays, for example a mean over their leading axes."""
        others = {name: function(values) for name, values in self.others.items()}
        return CVLosses(function(self.meta), function(self.pooled), others)


def cv_losses(
    forms: QuadraticForms,
    splits: Splits,
    rates,
    ridges,
    num_unpenalized: int,
    advance: Callable[[int], None] = lambda done: None,
) -> CVLosses:
    """Meta-train on each split and test on its held-out groups.

    Arguments:
        rates: (R,), raw training rates.
        ridges: (L,), added to the normal equations summed over the training rows.
        num_unpenalized: number of leading coefficients without a ridge (the intercept).
        advance: called with the number of splits of each finished batch.
    """
    size, R, L = len(splits.fold), len(rates), len(ridges)
    P = forms.test.shape[-1]
    p = P - forms.targets
    K = splits.weights.shape[1]
    meta, pooled = np.empty((size, K, 3, R, L)), np.empty((size, K, 3, 1, L))
    flat, pooled_flat = forms.train.reshape(-1, 3 * P * P), forms.pooled.reshape(-1, P * P)
    step = max(1, BATCH_NUMBERS // max(3 * K * R * L * P * (P - p), R * P * P))
    for start in range(0, size, step):
        batch = slice(start, start + step)
        train = splits.train[batch]
        # `train` is sparse with m entries a row: the product adds up the forms of m groups.
        Q = (train @ flat).reshape(-1, 3, P, P)
        test = np.tensordot(splits.weights[batch], forms.test, 1)  # (batch, K, 3, P, P)
        v = _solutions(Q, rates, ridges, p, num_unpenalized)
        meta[batch] = _evaluate(test, v.reshape(len(Q), R * L, P, -1)).reshape(-1, K, 3, R, L)
        # Pooling is meta-training at rate 0, where only Q0 counts.
        Q = np.zeros_like(Q)
        Q[:, 0] = (train @ pooled_flat).reshape(-1, P, P)
        v = _solutions(Q, np.zeros(1), ridges, p, num_unpenalized)
        pooled[batch, :, :, 0] = _evaluate(test, v[:, 0])
        advance(len(Q))
    return CVLosses(meta, pooled, {})


def _solutions(Q, rates, ridges, p, num_unpenalized):
    """v = (-omega, 1) at every rate and ridge: (S, R, L, P, q) from Q of shape (S, 3, P, P)."""
    # Equation (2) of `negmaml.advice.statistics`, summed over the groups of the split.
    rates = rates[:, None, None]
    total = Q[:, None, 0] - 2 * rates * Q[:, None, 1] + rates**2 * Q[:, None, 2]
    size, R, P = total.shape[:3]
    system = total.reshape(-1, P, P)
    omega = ridge_path(system[:, :p, :p], system[:, :p, p:], ridges, num_unpenalized)
    return residual_vector(omega).reshape(size, R, len(ridges), P, P - p)


def residual_vector(omega):
    """Return v = (-omega, 1), for which z.v = y - x.omega: (..., p + q, q) from (..., p, q)."""
    q = omega.shape[-1]
    ones = np.broadcast_to(np.eye(q), (*omega.shape[:-2], q, q))
    return np.concatenate([-omega, ones], -2)


def _evaluate(forms, v):
    """v^T M v, averaged over targets: (S, K, 3, N) from M (S, K, 3, P, P) and v (S, N, P, q)."""
    S, N, P, q = v.shape
    # One matrix product over all columns; einsum of three factors would be slower.
    columns = np.moveaxis(v, 1, 2).reshape(S, P, N * q)
    product = (forms.reshape(S, -1, P) @ columns).reshape(S, -1, P, N * q)
    values = np.einsum("skpn,spn->skn", product, columns)
    return values.reshape(*forms.shape[:3], N, q).mean(-1)
