"""Validates, cleans and sorts grouped rows; dropped rows and columns are reported in `notes`."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from negmaml._core.checks import check_count, short_repr
from negmaml.advice.labels import unique_labels

UNITS = ("scaled", "raw")  # of a rate
MAX_DEFAULT_SIZE = 10  # rows: enough to estimate curvature, few enough that most groups have them
MIN_GROUPS = 4
Scales = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class GroupedRows:
    """Rows sorted by group: group i has rows starts[i] to starts[i] + counts[i].

    Attributes:
        x: features, (rows, p); the first column is the constant 1 if `intercept`.
        y: targets, (rows, q).
        starts, counts: (groups,).
        labels: the user's labels, (groups,).
        names: names of the features, without the constant.
        scales: (mean, deviation) of features and of targets, removed first; 0 and 1 otherwise.
        kept: indices of the user's columns that are in x.
        notes: sentences on the rows and columns that were dropped or changed.
    """

    x: np.ndarray
    y: np.ndarray
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
    def z(self) -> np.ndarray:
        """Features and targets side by side, (rows, p + q)."""
        return np.hstack([self.x, self.y])

    @property
    def rate_unit(self) -> float:
        """1 over the largest eigenvalue of x^T x / rows, the unit of a scaled rate."""
        return rate_unit(self.x)

    def grams(self) -> np.ndarray:
        """z^T z of every group, (groups, p + q, p + q)."""
        return np.stack([rows.T @ rows for rows in np.split(self.z, self.starts[1:])])


def rate_unit(x: np.ndarray) -> float:
    """Return 1 over the largest eigenvalue of x^T x / rows, and 1 if x is zero."""
    # x^T x and x x^T have the same largest eigenvalue; the smaller of them is cheaper.
    narrow = x if x.shape[1] <= x.shape[0] else x.T
    largest = float(np.linalg.eigvalsh(narrow.T @ narrow)[-1]) / len(x)
    return 1.0 / largest if largest > 0 else 1.0


def as_float64(name: str, value: Any) -> np.ndarray:
    """Convert to a float64 array; raise with the position of text, NaN or infinity."""
    # A data frame of mixed dtypes converts to objects, so each column is checked by its own name.
    for column in getattr(value, "columns", ()):
        values = np.asarray(value[column])
        if values.dtype.kind not in "biuf":
            as_float64(f"{name} column {column!r}", values)
    raw = np.asarray(value)
    if raw.ndim == 0:
        raise TypeError(f"{name} must be an array or a data frame of rows, got {short_repr(value)}")
    try:
        # Numbers that are stored as text convert, too; other text raises.
        array = raw.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} must hold numbers, got {_first_text(raw)!r}; encode text first, for example "
            "as a 0/1 column for each value (the command `negmaml advise` does)"
        ) from error
    bad = ~np.isfinite(array)
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{name} must be finite, got {array[where]} in row {where[0]} and {bad.sum() - 1} "
            "more; drop such rows or fill them in first"
        )
    return array


def _first_text(raw: np.ndarray) -> Any:
    for item in raw.ravel():
        try:
            float(item)
        except (TypeError, ValueError):
            return item
    return raw


def group_rows(x, y, groups, *, intercept: bool = True, standardise: bool = False) -> GroupedRows:
    """Validate the rows and sort them by group.

    Raises TypeError or ValueError for data that cannot be used: see `advise`.
    """
    names = tuple(map(str, getattr(x, "columns", ())))
    x, y = as_float64("x", x), as_float64("y", y)
    if x.ndim != 2 or y.ndim not in (1, 2) or not x.size:
        raise ValueError(
            f"x must have shape (rows, features) and y (rows,) or (rows, targets), got {x.shape} "
            f"and {y.shape}; reshape a single feature with x[:, None]"
        )
    y = y.reshape(len(y), -1)
    if len(x) != len(y):
        raise ValueError(f"x and y must have the same number of rows, got {len(x)} and {len(y)}")
    labels, _, codes = unique_labels(groups, len(x))
    width = np.ptp(y, axis=0)
    if not np.all(width > 1e-12 * np.abs(y).max(0)):  # a constant up to rounding
        raise ValueError(
            f"y must vary, got the constant {y[0, int(np.argmin(width))]:g}; nothing can be learned"
        )
    order = np.argsort(codes, kind="stable")  # rows of a group keep their order
    x, kept, names, notes = _usable_features(x, names, intercept)
    scales = standard_scales(x, y, standardise)
    x, y = (x - scales[0]) / scales[1], (y - scales[2]) / scales[3]
    # After standardising, which would turn the constant into zero.
    if intercept:
        x = np.hstack([np.ones((len(x), 1)), x])
    counts = np.bincount(codes, minlength=len(labels))
    return GroupedRows(
        x[order], y[order], np.cumsum(counts) - counts, counts, labels, names, intercept, scales,
        kept, notes,
    )  # fmt: skip


def _usable_features(x, names, intercept):
    """Drop constant columns if there is an intercept, which stands for them; collect notes."""
    names = names or tuple(f"x{i}" for i in range(x.shape[1]))
    constant = np.ptp(x, axis=0) <= 1e-12 * np.abs(x).max(0)
    kept = np.flatnonzero(~constant if intercept else np.ones(x.shape[1], bool))
    notes = []
    if intercept and constant.any():
        dropped = ", ".join(names[i] for i in np.flatnonzero(constant))
        notes.append(f"constant features left out: {dropped}")
    x, names = x[:, kept], tuple(names[i] for i in kept)
    if not intercept and not np.any(x):
        raise ValueError("x must not be all zero without an intercept; pass intercept=True")
    if x.shape[1] > len(x):
        notes.append(
            f"more features ({x.shape[1]}) than rows ({len(x)}): the solution is unique only with "
            "a ridge, or as the one of least norm"
        )
    elif 1 < x.shape[1] <= 500:  # beyond, the rank would cost more than the advice
        # In units of the deviations, so that the tolerance does not depend on the user's units.
        centred = (x - x.mean(0)) / np.where(constant[kept], 1.0, x.std(0))
        rank = np.linalg.matrix_rank(centred.T @ centred, tol=1e-9 * len(x), hermitian=True)
        # Centring turns constant columns to zero, so they cannot count.
        if rank < x.shape[1] - (0 if intercept else int(constant.sum())):
            notes.append(
                f"collinear features: {x.shape[1]} columns of rank {rank}; the solution of least "
                "norm is taken"
            )
    return x, kept, names, tuple(notes)


def standard_scales(x, y, standardise: bool) -> Scales:
    """Means and standard deviations of features and targets; 0 and 1 unless `standardise`."""
    scales = []
    for a in (x, y):
        varies = standardise & (np.ptp(a, axis=0) > 0)  # a constant column keeps its scale
        scales += [a.mean(0) * standardise, np.where(varies, a.std(0), 1.0)]
    return tuple(scales)


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
    if enough.sum() < MIN_GROUPS:
        raise ValueError(
            f"groups must be at least {MIN_GROUPS} of {needed} rows each (n_t + n_v = {n_t + n_v}, "
            f"and more than n_r = {n_r} to adapt on and measure), got {enough.sum()} of "
            f"{data.groups}; their median has {int(np.median(data.counts))} rows: lower n_t, n_v "
            "or n_r, or group more coarsely"
        )
    if enough.all():
        return data
    rows, counts = np.repeat(enough, data.counts), data.counts[enough]
    note = (
        f"groups with fewer than {needed} rows left out: {int((~enough).sum())} of {data.groups} "
        f"({int(data.counts[~enough].sum())} of {len(data.x)} rows)"
    )
    return replace(
        data, x=data.x[rows], y=data.y[rows], counts=counts, starts=np.cumsum(counts) - counts,
        labels=data.labels[enough], notes=(*data.notes, note),
    )  # fmt: skip
