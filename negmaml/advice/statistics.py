r"""Every group as three quadratic forms: all that meta-training and testing need of its rows.

Write a row as z = (x, y) and a model as v = (-omega, 1), so that its residual is z.v. One gradient
step of rate a on the support rows Z_s (n of them) leaves on the query rows Z_q the residual

    (Z_q - a X_q S) v,      S = X_s^T Z_s / n

and its square summed over query rows is a quadratic in v and in the rate, with the Gram matrix
M = Z_q^T Z_q of the query rows as the only other ingredient:

    v^T (Q0 - 2 a Q1 + a^2 Q2) v,
    Q0 = M,     Q1 = (M_zx S + S^T M_xz) / 2,     Q2 = S^T M_xx S.

In training the forms of the groups add up: their upper left block is the matrix of the normal
equations at any rate, the last columns its right-hand side. In testing they are the loss. Several
targets are several columns of v.
"""

from typing import NamedTuple

import numpy as np

from negmaml.advice.data import Grouped

MOST_DRAWS, FEWEST_DRAWS = 20, 1
BUDGET = 2.5e7  # numbers kept for training, 200 MB


class Quadratics(NamedTuple):
    """Forms of G groups and D draws of their rows; P = p + q.

    targets: q.
    train: (G, D, 3, P, P), sums over n_v query rows.
    test: (G, 3, P, P), means over the rows not adapted on, and over draws.
    pooled: (G, D, P, P), the Gram matrix of all n_t + n_v training rows.
    adapt, rest: (G, D, P, P), the Gram matrix of the n_r rows to adapt on, and the mean one of the
        others.
    """

    targets: int
    train: np.ndarray
    test: np.ndarray
    pooled: np.ndarray
    adapt: np.ndarray
    rest: np.ndarray


def draws_of(groups: int, columns: int) -> int:
    """How many draws of every group's rows fit the memory."""
    return int(np.clip(BUDGET // (6 * groups * columns**2), FEWEST_DRAWS, MOST_DRAWS))


def quadratics(data: Grouped, n_t: int, n_v: int, n_r: int, random) -> Quadratics:
    """The forms of every group for several random orders of its rows."""
    z, p = data.z, data.x.shape[1]
    draws = draws_of(data.groups, z.shape[1])
    total = np.stack([rows.T @ rows for rows in np.split(z, data.starts[1:])])
    parts: list[list[np.ndarray]] = [[], [], [], [], []]
    for _ in range(draws):
        rows = _first_rows(data, max(n_t + n_v, n_r), random)
        support, query = z[rows[:, :n_t]], z[rows[:, n_t : n_t + n_v]]
        few = z[rows[:, :n_r]]
        few_gram = _gram(few)
        rest = (total - few_gram) / (data.counts - n_r)[:, None, None]
        both = _gram(z[rows[:, : n_t + n_v]])
        one = (
            _forms(_gram(query), np.swapaxes(support[..., :p], 1, 2) @ support / n_t),
            _forms(rest, few_gram[:, :p] / n_r),
            both,
            few_gram,
            rest,
        )
        for part, value in zip(parts, one, strict=True):
            part.append(value)
    train, test, pooled, adapt, rest = (np.stack(part, 1) for part in parts)
    return Quadratics(z.shape[1] - p, train, test.mean(1), pooled, adapt, rest)


def _first_rows(data: Grouped, size: int, random) -> np.ndarray:
    """The places of `size` rows of every group, in random order: (G, size)."""
    owner = np.repeat(np.arange(data.groups), data.counts)
    order = np.lexsort((random.random(len(owner)), owner))
    return order[data.starts[:, None] + np.arange(size)]


def _gram(rows):
    return np.swapaxes(rows, 1, 2) @ rows


def _forms(M, S):
    """Q0, Q1, Q2 of the head of this module: (G, 3, P, P) from (G, P, P) and (G, p, P)."""
    p = S.shape[1]
    cross = M[:, :, :p] @ S
    last = np.swapaxes(S, 1, 2) @ M[:, :p, :p] @ S
    return np.stack([M, (cross + np.swapaxes(cross, 1, 2)) / 2, last], 1)
