r"""Each group as three quadratic forms, the sufficient statistics of meta-training and testing.

Write a row as z = (x, y) and a model as v = (-omega, 1), so that its residual is z.v. One gradient
step of rate a on the n support rows Z_s leaves on the query rows Z_q the residual

    (Z_q - a X_q S) v,      S = X_s^T Z_s / n                                    (1)

Its square, summed over query rows, is a quadratic in v and in the rate. Apart from S it depends
only on the Gram matrix M = Z_q^T Z_q of the query rows:

    v^T (Q0 - 2 a Q1 + a^2 Q2) v,
    Q0 = M,     Q1 = (M_zx S + S^T M_xz) / 2,     Q2 = S^T M_xx S.               (2)

In training the forms of the groups add up: their upper left block is the matrix of the normal
equations at any rate, the last columns are the right-hand side. In testing they are the loss.
Several targets are several columns of v.
"""

from typing import NamedTuple

import numpy as np

from negmaml.advice.data import GroupedRows

MAX_DRAWS = 20
MAX_NUMBERS = 2.5e7  # kept for training, 200 MB


class QuadraticForms(NamedTuple):
    """Forms of G groups and D draws of their rows; P = p + q.

    targets: q.
    train: (G, D, 3, P, P), the forms (2), sums over n_v query rows.
    test: (G, 3, P, P), means over the rows not adapted on, and over draws.
    pooled: (G, D, P, P), the Gram matrix of all n_t + n_v training rows.
    adapt: (G, D, P, P), the Gram matrix of the n_r rows to adapt on.
    rest: (G, D, P, P), the mean Gram matrix of the other rows.
    """

    targets: int
    train: np.ndarray
    test: np.ndarray
    pooled: np.ndarray
    adapt: np.ndarray
    rest: np.ndarray


def num_draws(groups: int, columns: int) -> int:
    """Number of draws of every group's rows that fits the memory."""
    # Six matrices a draw: three of `train`, and one each of `pooled`, `adapt` and `rest`.
    return int(np.clip(MAX_NUMBERS // (6 * groups * columns**2), 1, MAX_DRAWS))


def quadratic_forms(data: GroupedRows, n_t: int, n_v: int, n_r: int, random) -> QuadraticForms:
    """Compute the forms of every group for several random orders of its rows."""
    p, columns = data.x.shape[1], data.z.shape[1]
    total = data.grams()
    # With several draws, results depend less on which rows of a group are its support.
    per_draw = []
    for _ in range(num_draws(data.groups, columns)):
        rows = _random_rows(data, max(n_t + n_v, n_r), random)
        z = data.z[rows].astype(np.float64, copy=False)  # (G, rows, p + q)
        support, query = z[:, :n_t], z[:, n_t : n_t + n_v]
        adapt = _gram(z[:, :n_r])
        # Subtracting from the total avoids a pass over the rest of the rows for every draw.
        rest = (total - adapt) / (data.counts - n_r)[:, None, None]
        per_draw.append((
            _forms(_gram(query), np.swapaxes(support[..., :p], 1, 2) @ support / n_t),
            _forms(rest, adapt[:, :p] / n_r),
            _gram(z[:, : n_t + n_v]),
            adapt,
            rest,
        ))  # fmt: skip
    train, test, pooled, adapt, rest = map(_stacked, zip(*per_draw, strict=True))
    test = test[:, 0] if test.shape[1] == 1 else test.mean(1)
    return QuadraticForms(columns - p, train, test, pooled, adapt, rest)


def _random_rows(data: GroupedRows, size: int, random) -> np.ndarray:
    """Indices of `size` rows of every group, in random order: (G, size)."""
    owner = np.repeat(np.arange(data.groups), data.counts)
    # One sort by group, and by random numbers within a group, permutes all groups at once.
    order = np.lexsort((random.random(len(owner)), owner))
    return order[data.starts[:, None] + np.arange(size)]


def _stacked(draws):
    # A single draw is that of large data, of which a copy may not fit the memory.
    return draws[0][:, None] if len(draws) == 1 else np.stack(draws, 1)


def _gram(rows):
    return np.swapaxes(rows, 1, 2) @ rows


def _forms(M, S):
    """Q0, Q1, Q2 of equation (2): (G, 3, P, P) from M (G, P, P) and S (G, p, P)."""
    p = S.shape[1]
    cross = M[:, :, :p] @ S
    last = np.swapaxes(S, 1, 2) @ M[:, :p, :p] @ S
    return np.stack([M, (cross + np.swapaxes(cross, 1, 2)) / 2, last], 1)
