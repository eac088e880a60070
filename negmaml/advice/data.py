"""Validates, cleans and sorts grouped rows; dropped rows and columns are reported in `notes`."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from negmaml._core.checks import check_count
from negmaml.advice.labels import unique_labels
from negmaml.advice.rowblocks import (
    LARGE,
    Scales,
    as_floats,
    check_sizes,
    column_blocks,
    constant_columns,
    gram,
    no_scales,
    rate_unit,
    row_blocks,
    standard_scales,
)

UNITS = ("scaled", "raw")  # of a rate
MAX_DEFAULT_SIZE = 10  # rows: enough to estimate curvature, few enough that most groups have them
MIN_GROUPS = 4
MAX_NUMBERS = 3.5e8  # in the data, twice, and in the statistics of all groups, 2.8 GB
MIN_STATISTICS = 5e7


@dataclass(frozen=True)
class GroupedRows:
    """Rows sorted by group: group i has rows starts[i] to starts[i] + counts[i].

    Attributes:
        z: features and targets side by side, (rows, p + q); the first feature is the constant 1 if
            `intercept`.
        targets: q.
        starts, counts: (groups,).
        labels: the user's labels, (groups,).
        names: names of the features, without the constant.
        scales: (mean, deviation) of features and of targets, removed first; 0 and 1 otherwise.
        kept: indices of the user's columns that are in x.
        notes: sentences on the rows and columns that were dropped or changed.
    """

    z: np.ndarray
    targets: int
    starts: np.ndarray
    counts: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    intercept: bool
    scales: Scales
    kept: np.ndarray
    notes: tuple[str, ...]

    @property
    def groups(self) -> int:
        """Number of groups."""
        return len(self.counts)

    @property
    def x(self) -> np.ndarray:
        """Features, (rows, p)."""
        return self.z[:, : -self.targets]

    @property
    def y(self) -> np.ndarray:
        """Targets, (rows, q)."""
        return self.z[:, -self.targets :]

    @cached_property
    def rate_unit(self) -> float:
        """1 over the largest eigenvalue of x^T x / rows, the unit of a scaled rate."""
        return rate_unit(self.x)

    @property
    def second_moments(self) -> np.ndarray:
        """x^T x / rows, (p, p)."""
        return gram(self.x) / len(self.x)

    @property
    def mean_square(self) -> float:
        """Mean square of a feature, without the constant."""
        penalized = self.x[:, int(self.intercept) :]
        return sum(float(np.sum(rows**2)) for rows in row_blocks(penalized)) / penalized.size

    def grams(self) -> np.ndarray:
        """z^T z of every group, (groups, p + q, p + q)."""
        return np.stack([gram(rows) for rows in np.split(self.z, self.starts[1:])])


def group_rows(x, y, groups, *, intercept: bool = True, standardise: bool = False) -> GroupedRows:
    """Validate the rows and sort them by group.

    Raises TypeError or ValueError for data that cannot be used: see `advise`.
    """
    _check_order(x=x, y=y, groups=groups)
    names = tuple(map(str, getattr(x, "columns", ())))
    x, y = as_floats("x", x), as_floats("y", y)
    if x.ndim != 2 or y.ndim not in (1, 2) or not x.size:
        raise ValueError(
            f"x must have shape (rows, features) and y (rows,) or (rows, targets), got {x.shape} "
            f"and {y.shape}; reshape a single feature with x[:, None]"
        )
    y = y.reshape(len(y), -1)
    if len(x) != len(y):
        raise ValueError(f"x and y must have the same number of rows, got {len(x)} and {len(y)}")
    labels, _, codes = unique_labels(groups, len(x))
    if np.any(constant := constant_columns(y)):
        value = y[0, int(np.argmax(constant))]
        raise ValueError(f"y must vary, got the constant {value:g}; nothing can be learned")
    if not standardise:
        check_sizes("x", x)
        check_sizes("y", y)
    scales = standard_scales(x, y)
    kept, names, notes = _usable_features(x, names, intercept, scales)
    scales = (scales[0][kept], scales[1][kept], *scales[2:])
    if not standardise:
        scales = no_scales(scales)
    order = np.argsort(codes, kind="stable")  # rows of a group keep their order
    counts = np.bincount(codes, minlength=len(labels))
    return GroupedRows(
        _side_by_side(x, y, order, kept, scales, intercept), y.shape[1],
        np.cumsum(counts) - counts, counts, labels, names, intercept, scales, kept, notes,
    )  # fmt: skip


def _check_order(**given) -> None:
    """Raise ValueError for frames of pandas whose rows have the same labels in another order."""
    # Other differences of indices are usual, since rows are taken by their position.
    indices = {name: value.index for name, value in given.items() if hasattr(value, "iloc")}
    for name, index in list(indices.items())[1:]:
        first = next(iter(indices))
        other = indices[first]
        if index.equals(other) or len(index) != len(other):
            continue
        if index.isin(other).all() and other.isin(index).all():
            raise ValueError(
                f"{first} and {name} must have their rows in the same order, got an index with the "
                f"same labels in another order; write {name}.loc[{first}.index], or pass arrays"
            )


def _side_by_side(x, y, order, kept, scales, intercept: bool) -> np.ndarray:
    """Scaled features and targets with rows in this order, in the precision of x."""
    first = int(intercept)
    # By columns if x is: each column is then copied in one piece.
    by_columns = x.flags.f_contiguous and not x.flags.c_contiguous
    shape = (len(x), first + len(kept) + y.shape[1])
    z = np.empty(shape, x.dtype, order="F" if by_columns else "C")
    # After standardising, which would turn the constant into zero.
    z[:, :first] = 1.0
    for columns, values in column_blocks(x):
        chosen = np.flatnonzero((kept >= columns.start) & (kept < columns.stop))
        values = values[:, kept[chosen] - columns.start]
        scaled = (values - scales[0][chosen]) / scales[1][chosen]
        z[:, first + chosen] = scaled[order]
    z[:, first + len(kept) :] = ((y - scales[2]) / scales[3])[order]
    return z


def _usable_features(x, names, intercept, scales: Scales):
    """Drop constant columns if there is an intercept, which stands for them; collect notes."""
    names = names or tuple(f"x{i}" for i in range(x.shape[1]))
    constant = constant_columns(x)
    kept = np.flatnonzero(~constant if intercept else np.ones(x.shape[1], bool))
    notes = []
    if intercept and constant.any():
        dropped = ", ".join(names[i] for i in np.flatnonzero(constant))
        notes.append(f"constant features left out: {dropped}")
    if not intercept and not np.any(x):
        raise ValueError("x must not be all zero without an intercept; pass intercept=True")
    if len(kept) > len(x):
        notes.append(
            f"more features ({len(kept)}) than rows ({len(x)}): the solution is unique only with "
            "a ridge, or as the one of least norm"
        )
    elif 1 < len(kept) <= 500:  # beyond, the rank would cost more than the advice
        # In units of the deviations, so that the tolerance does not depend on the user's units.
        mean, deviation, *_ = scales
        centred = sum(
            c.T @ c for c in ((rows[:, kept] - mean[kept]) / deviation[kept]
                              for rows in row_blocks(x))
        )  # fmt: skip
        rank = np.linalg.matrix_rank(centred, tol=1e-9 * len(x), hermitian=True)
        # Centring turns constant columns to zero, so they cannot count.
        if rank < len(kept) - (0 if intercept else int(constant.sum())):
            notes.append(
                f"collinear features: {len(kept)} columns of rank {rank}; the solution of least "
                "norm is taken"
            )
    return kept, tuple(names[i] for i in kept), tuple(notes)


def default_sizes(counts, *, n_t=None, n_v=None, n_r=None) -> tuple[int, int, int]:
    """Return n_t, n_v and n_r, with defaults for those that are None.

    A default is half the lower quartile of the group sizes, at most 10. Then three quarters of the
    groups have room for n_t + n_v rows, and for n_r rows to adapt on and as many to test on.
    """
    half = int(np.clip(np.quantile(counts, 0.25) // 2, 1, MAX_DEFAULT_SIZE))
    n_t, n_v = (
        half if n is None else check_count(name, n) for name, n in (("n_t", n_t), ("n_v", n_v))
    )
    return n_t, n_v, n_t if n_r is None else check_count("n_r", n_r)


def drop_small_groups(data: GroupedRows, n_t: int, n_v: int, n_r: int) -> GroupedRows:
    """Keep groups with at least n_t + n_v rows and more than n_r; note how many were dropped."""
    needed = max(n_t + n_v, n_r + 1)
    enough = data.counts >= needed
    if data.groups < MIN_GROUPS:
        raise ValueError(
            f"groups must have at least {MIN_GROUPS} labels, to train and to test on different "
            f"groups, got {data.groups}; add groups, or pass the column of a finer grouping"
        )
    if enough.sum() < MIN_GROUPS:
        raise ValueError(
            f"groups must be at least {MIN_GROUPS} of {needed} rows each (n_t + n_v = {n_t + n_v}, "
            f"and more than n_r = {n_r} to adapt on and measure), got {enough.sum()} of "
            f"{data.groups}; their median has {int(np.median(data.counts))} rows: lower n_t, n_v "
            "or n_r, or group more coarsely"
        )
    if enough.all():
        return data
    note = (
        f"groups with fewer than {needed} rows left out: {int((~enough).sum())} of {data.groups} "
        f"({int(data.counts[~enough].sum())} of {len(data.z)} rows)"
    )
    return _only_groups(data, enough, note)


def limit_groups(data: GroupedRows, random: np.random.Generator) -> GroupedRows:
    """Keep as many groups, drawn at random, as have room for their statistics in memory."""
    # Nine matrices a group at least: see `statistics.QuadraticForms`.
    each = 9 * data.z.shape[1] ** 2
    stored = 2 * data.z.size * data.z.itemsize / 8
    most = max(MIN_GROUPS, int(max(MIN_STATISTICS, MAX_NUMBERS - stored) // each))
    if data.groups <= most:
        return data
    keep = np.zeros(data.groups, bool)
    keep[random.permutation(data.groups)[:most]] = True
    note = (
        f"{most} of {data.groups} groups drawn at random: statistics of all with "
        f"{data.z.shape[1]} columns need {8e-9 * each * data.groups:.0f} GB; use fewer features "
        "for more groups"
    )
    return _only_groups(data, keep, note)


def _only_groups(data: GroupedRows, keep: np.ndarray, note: str) -> GroupedRows:
    rows, counts = np.repeat(keep, data.counts), data.counts[keep]
    size = int(counts.sum())
    if data.z.size <= LARGE:
        z = data.z[rows]
    else:
        # Moved to the front of the same array, since another copy may not fit the memory.
        z = data.z[:size]
        for column in range(data.z.shape[1]):
            z[:, column] = data.z[rows, column]
    return replace(
        data, z=z, counts=counts, starts=np.cumsum(counts) - counts, labels=data.labels[keep],
        notes=(*data.notes, note),
    )  # fmt: skip
