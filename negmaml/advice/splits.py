"""Which groups train and which are held out: cross-validation splits, and those of a bootstrap."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from scipy import sparse

FOLDS = 5


class Splits(NamedTuple):
    """S splits of G groups.

    train: (S, G * D) sparse, how often each draw of each group trains.
    weights: (S, K, G), the weight of each group in each of K means over held-out groups.
    draws: (S,), which draw of their rows the held-out groups use where one is needed.
    fold: (S,), the splits of a fold have the same groups set apart.
    """

    train: "sparse.csr_matrix"
    weights: np.ndarray
    draws: np.ndarray
    fold: np.ndarray


def folds_of(groups: int) -> int:
    """How many parts of the groups report in turn."""
    return min(FOLDS, groups // 2)


def most_training_groups(groups: int) -> int:
    """The largest m that leaves one group to choose on, besides a fold that reports."""
    return groups - -(-groups // folds_of(groups)) - 1


def cross_validation(groups: int, m: int, draws: int, splits: int, random) -> Splits:
    """Splits in which m groups train, a fold reports, and the other groups choose.

    The groups of a fold never train nor choose in the splits of that fold, so that the loss they
    report is that of a choice which they did not take part in. Every group reports. The three
    means are over the groups that choose, those that report, and both.
    """
    folds = folds_of(groups)
    fold = np.arange(splits) % folds
    place = random.permutation(groups) % folds  # the fold of every group
    train, weights = np.empty((splits, m), int), np.zeros((splits, 3, groups))
    for s in range(splits):
        train[s] = random.permutation(np.flatnonzero(place != fold[s]))[:m]
        reports = place == fold[s]
        chooses = ~reports
        chooses[train[s]] = False
        weights[s] = chooses, reports, chooses | reports
    return _splits(train, weights, fold, draws, random)


def bootstrap(groups: int, m: int, draws: int, replicates: int, each: int, random) -> Splits:
    """Replicates of the groups, drawn with replacement, each with a few splits; `fold` counts them.

    m groups train, drawn from the replicate; those of its groups that do not train are held out.
    A group that is drawn twice is never on both sides. Groups that are drawn often train often, so
    their weight when held out is over the probability of that: on average over splits the weight of
    a group is how often it was drawn.
    """
    size = replicates * each
    fold = np.repeat(np.arange(replicates), each)
    times = np.stack([_multiplicities(groups, random) for _ in range(replicates)])[fold]
    at_least = _pick(times > 0, 1, random)[:, 0]  # held out in any case, so that one is
    rows = np.arange(size)
    allowed = times.astype(float)
    allowed[rows, at_least] = 0
    train = _pick(allowed, m, random)
    weights = times / (1 - times / (groups + 1)) ** m
    weights[rows[:, None], train] = 0
    return _splits(train, weights[:, None], fold, draws, random)


def _multiplicities(groups, random):
    while True:
        times = np.bincount(random.integers(groups, size=groups), minlength=groups)
        if (times > 0).sum() >= 2:
            return times


def _pick(weights, size, random):
    """`size` places for each row, with probabilities in proportion to its weights."""
    edges = np.cumsum(weights, 1, dtype=float)
    at = random.random((len(weights), size)) * edges[:, -1:]
    return np.stack([np.searchsorted(e, a, side="right") for e, a in zip(edges, at, strict=True)])


def _splits(train, weights, fold, draws, random) -> Splits:
    size, m = train.shape
    columns = train * draws + random.integers(draws, size=train.shape)
    from scipy import sparse  # imported where used: a sixth of the time of importing this package

    matrix = sparse.csr_matrix(
        (np.ones(size * m), columns.ravel(), np.arange(0, size * m + 1, m)),
        shape=(size, weights.shape[-1] * draws),
    )
    weights = weights / weights.sum(-1, keepdims=True)
    return Splits(matrix, weights, random.integers(draws, size=size), fold)
