"""Arrays of rows: checked conversion, and sums block by block, without a second copy of the data.

Large single-precision arrays stay in single precision; every sum is in double precision.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from negmaml._core.checks import short_repr

LARGE = 2**27  # numbers, 1 GB in double precision: above, float32 is kept
BLOCK_NUMBERS = 2**24
# Statistics are products of six numbers, which have to stay within float64.
LARGEST, SMALLEST = 1e45, 1e-45
Scales = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def as_floats(name: str, value: Any) -> np.ndarray:
    """Convert to float64, large float32 arrays to float32; raise for text, complex, NaN, infinity.

    The message gives the position of the first such value.
    """
    # A data frame of mixed dtypes converts to objects, so each column is checked by its own name.
    for column in getattr(value, "columns", ()):
        values = np.asarray(value[column])
        if values.dtype.kind not in "biuf":
            as_floats(f"{name} column {column!r}", values)
    raw = np.asarray(value)
    if raw.ndim == 0:
        raise TypeError(f"{name} must be an array or a data frame of rows, got {short_repr(value)}")
    if raw.dtype.kind in "cmM":
        raise TypeError(
            f"{name} must hold real numbers, got {raw.ravel()[:1]} of dtype {raw.dtype}; convert "
            "it first, for example dates to days"
        )
    if raw.dtype == np.float32 and raw.size > LARGE:
        array = raw
    else:
        try:
            # Numbers that are stored as text convert, too; other text raises.
            array = raw.astype(np.float64, copy=False)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{name} must hold numbers, got {_first_text(raw)!r}; encode text first, for "
                "example with negmaml.advice.read_table"
            ) from error
    finite = np.isfinite(array)
    if not finite.all():
        where = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise ValueError(
            f"{name} must be finite, got {array[where]} in row {where[0]} and "
            f"{(~finite).sum() - 1} more; drop such rows or fill them in first"
        )
    return array


def _first_text(raw: np.ndarray) -> Any:
    for item in raw.ravel():
        try:
            float(item)
        except (TypeError, ValueError):
            return item
    return raw


def check_sizes(name: str, a: np.ndarray) -> None:
    """Raise ValueError for numbers whose products overflow, or all vanish."""
    if not a.size:
        return
    size = max(float(a.max()), -float(a.min()))
    if size > LARGEST or 0 < size < SMALLEST:
        where = int(np.argmax(np.abs(a).reshape(len(a), -1).max(1)))
        raise ValueError(
            f"{name} must have its largest number between {SMALLEST:g} and {LARGEST:g}, got "
            f"{size:g} in row {where}; standardise, or use other units"
        )


def column_blocks(a: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Some columns at a time, in double precision."""
    step = max(1, BLOCK_NUMBERS // max(1, len(a)))
    for start in range(0, a.shape[1], step):
        columns = slice(start, start + step)
        yield columns, a[:, columns].astype(np.float64, copy=False)


def row_blocks(a: np.ndarray) -> Iterator[np.ndarray]:
    """Some rows at a time, in double precision."""
    step = max(1, BLOCK_NUMBERS // max(1, a.shape[1]))
    for start in range(0, len(a), step):
        yield a[start : start + step].astype(np.float64, copy=False)


def gram(a: np.ndarray) -> np.ndarray:
    """a^T a in double precision, (columns, columns)."""
    total = np.zeros((a.shape[1], a.shape[1]))
    for rows in row_blocks(a):
        total += rows.T @ rows
    return total


def rate_unit(x: np.ndarray) -> float:
    """Return 1 over the largest eigenvalue of x^T x / rows, and 1 if x is zero."""
    # x^T x and x x^T have the same largest eigenvalue; the smaller of them is cheaper.
    narrow = x if x.shape[1] <= x.shape[0] else x.T
    largest = float(np.linalg.eigvalsh(gram(narrow))[-1]) / len(x)
    return 1.0 / largest if largest > 0 else 1.0


def constant_columns(x: np.ndarray) -> np.ndarray:
    """True for columns that are constant up to rounding, (columns,)."""
    low, high = x.min(0).astype(float), x.max(0).astype(float)
    # Halves, since the difference of two large numbers may overflow.
    return high / 2 - low / 2 <= 0.5e-12 * np.maximum(np.abs(low), np.abs(high))


def standard_scales(x: np.ndarray, y: np.ndarray) -> Scales:
    """Means and standard deviations of features and targets; 1 for that of a constant column."""
    scales: list[np.ndarray] = []
    for a in (x, y):
        mean, deviation = np.zeros(a.shape[1]), np.ones(a.shape[1])
        for columns, values in column_blocks(a):
            # In units of the largest number, whose square may overflow or vanish.
            unit = np.abs(values).max(0)
            unit[(unit < LARGEST) & (unit > SMALLEST) | (unit == 0)] = 1.0
            values = values / unit
            mean[columns] = values.mean(0) * unit
            varies = np.ptp(values, axis=0) > 0
            deviation[columns] = np.where(varies, values.std(0) * unit, 1.0)
        scales += [mean, deviation]
    return scales[0], scales[1], scales[2], scales[3]


def no_scales(scales: Scales) -> Scales:
    """Scales of the same shapes that change nothing."""
    return tuple(np.full(len(s), float(i % 2)) for i, s in enumerate(scales))  # type: ignore[return-value]
