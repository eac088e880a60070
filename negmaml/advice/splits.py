"""Splits of the groups into training and held-out groups: cross-validation and bootstrap."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from scipy import sparse

FOLDS = 5


class Splits(NamedTuple):
    """S splits of G groups.

    train: (S, G * D) sparse, how often each draw of each group trains.
    weights: (S, K, G), the weight of each group in each of K means over held-out groups.
    draws: (S,), the draw of rows of held-out groups, where a single draw is used.
    fold: (S,); splits with the same fold have the same reporting groups.
    """

    train: "sparse.csr_matrix"
    weights: np.ndarray
    draws: np.ndarray
    fold: np.ndarray


def num_folds(groups: int) -> int:
    """Number of folds of the groups."""
    # Fewer folds if groups are few, so that at least two groups report in each.
    return min(FOLDS, groups // 2)


def max_training_groups(groups: int) -> int:
    """The largest m that leaves one group to choose rates on, besides the fold that reports."""
    return groups - -(-groups // num_folds(groups)) - 1


def cross_validation(groups: int, m: int, draws: int, splits: int, random) -> Splits:
    """Splits in which m groups train, a fold reports the loss, and the other groups choose rates.

    In the splits of a fold, its groups neither train nor choose, so the loss they report is
    unbiased by the choice. Every group reports in one fold. The three means are over the groups
    that choose, those that report, and both.
    """
    folds = num_folds(groups)
    fold = np.arange(splits) % folds
    # A permutation modulo the folds: their sizes differ by one at most.
    fold_of_group = random.permutation(groups) % folds
    train, weights = np.empty((splits, m), int), np.zeros((splits, 3, groups))
    for s in range(splits):
        train[s] = random.permutation(np.flatnonzero(fold_of_group != fold[s]))[:m]
        reports = fold_of_group == fold[s]
        chooses = ~reports
        chooses[train[s]] = False
        weights[s] = chooses, reports, chooses | reports
    return _splits(train, weights, fold, draws, random)


def bootstrap(groups: int, m: int, draws: int, replicates: int, each: int, random) -> Splits:
    """Bootstrap replicates of the groups, each split `each` times; `fold` numbers the replicates.

    m groups train, drawn from the replicate; its groups that do not train are held out. A group
    that was drawn twice is never on both sides. Groups that were drawn often also train often, so
    the weight of a held-out group is divided by its probability of being held out. Averaged over
    splits, its weight is then the number of times it was drawn.
    """
    size = replicates * each
    fold = np.repeat(np.arange(replicates), each)
    times = np.stack([_multiplicities(groups, random) for _ in range(replicates)])[fold]
    # One group of each split is kept out of training, so that at least one is held out.
    kept_out = _weighted_choice(times > 0, 1, random)[:, 0]
    rows = np.arange(size)
    allowed = times.astype(float)
    allowed[rows, kept_out] = 0
    train = _weighted_choice(allowed, m, random)
    weights = times / (1 - times / (groups + 1)) ** m
    weights[rows[:, None], train] = 0
    return _splits(train, weights[:, None], fold, draws, random)


def _multiplicities(groups, random):
    """Return how often each group is drawn; repeated until at least two are."""
    while True:
        times = np.bincount(random.integers(groups, size=groups), minlength=groups)
        if (times > 0).sum() >= 2:
            return times


def _weighted_choice(weights, size, random):
    """Draw `size` indices for each row, with probabilities in proportion to the row's weights."""
    edges = np.cumsum(weights, 1, dtype=float)
    at = random.random((len(weights), size)) * edges[:, -1:]
    # The right side skips indices of weight zero, whose edges coincide with the one before.
    return np.stack([np.searchsorted(e, a, side="right") for e, a in zip(edges, at, strict=True)])


def _splits(train, weights, fold, draws, random) -> Splits:
    size, m = train.shape
    # A column is a group with one draw of its rows, as `QuadraticForms.train` is flattened.
    columns = train * draws + random.integers(draws, size=train.shape)
    from scipy import sparse  # imported here: a sixth of the time of importing this package

    matrix = sparse.csr_matrix(
        (np.ones(size * m), columns.ravel(), np.arange(0, size * m + 1, m)),
        shape=(size, weights.shape[-1] * draws),
    )
    weights = weights / weights.sum(-1, keepdims=True)
    return Splits(matrix, weights, random.integers(draws, size=size), fold)
