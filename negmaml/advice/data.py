"""The user's grouped rows: checked, cleaned, sorted by group; what was left out is said."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from negmaml._core.checks import check_count, shown

UNITS = ("scaled", "raw")  # of a rate
LARGEST = 10  # default rows of a part of a group: enough to see curvature, few enough to have


@dataclass(frozen=True)
class Grouped:
    """Rows of the same group lie together: group i has rows starts[i] to starts[i] + counts[i].

    Attributes:
        x: features, (rows, p); the first column is the constant 1 if `intercept`.
        y: targets, (rows, q).
        starts, counts: (groups,).
        labels: the user's labels, (groups,).
        names: of the features, without the constant.
        scales: (mean, spread) of features and of targets, removed before anything else.
        kept: which of the user's columns are in x.
        notes: what was left out or changed, in words.
    """

    x: np.ndarray
    y: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    intercept: bool
    scales: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
    kept: np.ndarray
    notes: tuple[str, ...]

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return len(self.counts)

    @property
    def z(self) -> np.ndarray:
        """Features and targets side by side, (rows, p + q)."""
        return np.hstack([self.x, self.y])

    @property
    def unit(self) -> float:
        """1 over the largest eigenvalue of x^T x / rows: the unit of a rate."""
        return unit_of(self.x)


def unit_of(x: np.ndarray) -> float:
    """1 over the largest eigenvalue of x^T x / rows, 1 if x is zero."""
    small = x if x.shape[1] <= x.shape[0] else x.T
    largest = float(np.linalg.eigvalsh(small.T @ small)[-1]) / len(x)
    return 1.0 / largest if largest > 0 else 1.0


def numbers(name: str, value: Any) -> np.ndarray:
    """`value` as a float64 array; text, NaN and infinity raise and say where they are."""
    columns = list(getattr(value, "columns", ()))
    for column in columns:
        values = np.asarray(value[column])
        if values.dtype.kind not in "biuf":
            numbers(f"{name} column {column!r}", values)
    raw = np.asarray(value)
    if raw.ndim == 0:
        raise TypeError(f"{name} must be an array or a data frame of rows, got {shown(value)}")
    try:
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


def grouped(x, y, groups, *, intercept: bool = True, standardise: bool = False) -> Grouped:
    """Check and sort the rows of all groups.

    Raises TypeError or ValueError for what cannot be used: see `advise`.
    """
    names = tuple(map(str, getattr(x, "columns", ())))
    x, y = numbers("x", x), numbers("y", y)
    if x.ndim != 2 or y.ndim not in (1, 2) or not x.size:
        raise ValueError(
            f"x must have shape (rows, features) and y (rows,) or (rows, targets), got {x.shape} "
            f"and {y.shape}; reshape a single feature with x[:, None]"
        )
    y = y.reshape(len(y), -1)
    labels = np.asarray(groups)
    if labels.ndim != 1 or not len(x) == len(y) == len(labels):
        raise ValueError(
            f"x, y and groups must have the same number of rows, got {len(x)}, {len(y)} and shape "
            f"{labels.shape}"
        )
    spread = y.max(0) - y.min(0)
    if not np.all(spread > 1e-12 * np.abs(y).max(0)):
        raise ValueError(
            f"y must vary, got the constant {y[0, int(np.argmin(spread))]:g}; nothing can be "
            "learned"
        )
    labels, codes = unique_labels(labels)
    order = np.argsort(codes, kind="stable")
    x, kept, names, notes = _features(x, names, intercept)
    x, y, scales = _scaled(x, y, standardise)
    if intercept:
        x = np.hstack([np.ones((len(x), 1)), x])
    counts = np.bincount(codes, minlength=len(labels))
    return Grouped(
        x[order], y[order], np.cumsum(counts) - counts, counts, labels, names, intercept, scales,
        kept, notes,
    )  # fmt: skip


def unique_labels(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct labels and each row's place among them; missing labels raise."""
    missing = np.array([item is None or item != item for item in labels.tolist()])
    if missing.any():
        raise ValueError(
            f"groups must name a group for every row, got a missing label in row "
            f"{int(np.argmax(missing))} and {missing.sum() - 1} more; drop such rows first"
        )
    if labels.dtype.kind == "O":
        labels = labels.astype(str)
    distinct, codes = np.unique(labels, return_inverse=True)
    return distinct, codes


def _features(x, names, intercept):
    """Columns that vary, since the intercept stands for the others, and notes on what was found."""
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
            f"more features ({x.shape[1]}) than rows ({len(x)}): only a ridge, or the minimum "
            "norm, makes the solution unique"
        )
    elif 1 < x.shape[1] <= 500:
        centred = (x - x.mean(0)) / np.where(constant[kept], 1.0, x.std(0))
        rank = np.linalg.matrix_rank(centred.T @ centred, tol=1e-9 * len(x), hermitian=True)
        if rank < x.shape[1] - (0 if intercept else int(constant.sum())):
            notes.append(
                f"collinear features: {x.shape[1]} columns of rank {rank}; the solution of least "
                "norm is taken"
            )
    return x, kept, names, tuple(notes)


def _scaled(x, y, standardise):
    """Rows in units of their spread around their mean if asked for, else as they are."""
    if not standardise:
        p, q = x.shape[1], y.shape[1]
        return x, y, (np.zeros(p), np.ones(p), np.zeros(q), np.ones(q))
    spread = np.where(np.ptp(x, axis=0) > 0, x.std(0), 1.0)
    scales = (x.mean(0), spread, y.mean(0), y.std(0))
    return (x - scales[0]) / scales[1], (y - scales[2]) / scales[3], scales


def default_sizes(counts, *, n_t=None, n_v=None, n_r=None) -> tuple[int, int, int]:
    """n_t, n_v and n_r for groups of such sizes, where they are not given.

    Half the lower quartile of the group sizes each, at most 10: three quarters of the groups have
    room for n_t + n_v rows, and for n_r rows to adapt on and as many to measure on.
    """
    half = int(np.clip(np.quantile(counts, 0.25) // 2, 1, LARGEST))
    n_t, n_v = (
        half if n is None else check_count(name, n) for name, n in (("n_t", n_t), ("n_v", n_v))
    )
    return n_t, n_v, n_t if n_r is None else check_count("n_r", n_r)


def large_enough(data: Grouped, n_t: int, n_v: int, n_r: int) -> tuple[Grouped, tuple[str, ...]]:
    """The groups with room for n_t + n_v rows and for more than n_r, and a word on the others."""
    needed = max(n_t + n_v, n_r + 1)
    enough = data.counts >= needed
    if enough.sum() < 4:
        raise ValueError(
            f"groups must be at least 4 of {needed} rows each (n_t + n_v = {n_t + n_v}, and more "
            f"than n_r = {n_r} to adapt on and measure), got {enough.sum()} of {data.groups}; "
            f"their median has {int(np.median(data.counts))} rows: lower n_t, n_v or n_r, or "
            "group more coarsely"
        )
    if enough.all():
        return data, ()
    rows = np.repeat(enough, data.counts)
    counts = data.counts[enough]
    fields = data.__dict__ | {
        "x": data.x[rows], "y": data.y[rows], "counts": counts,
        "starts": np.cumsum(counts) - counts, "labels": data.labels[enough],
    }  # fmt: skip
    lost = int(data.counts[~enough].sum())
    note = (
        f"groups with fewer than {needed} rows left out: {int((~enough).sum())} of {data.groups} "
        f"({lost} of {len(data.x)} rows)"
    )
    return Grouped(**fields), (note,)
