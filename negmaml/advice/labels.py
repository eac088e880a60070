"""Labels of groups: one text for each, so that labels of any type name the same group."""

import datetime
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np

from negmaml._core.checks import short_repr

SHOWN = 3  # labels that a message lists


def label_text(label: Any) -> str | None:
    """Return the text of a label; None if it is missing.

    Whole numbers of any type have one text, since a missing value turns a column of integers into
    floats.

    >>> [label_text(label) for label in (1, 1.0, "1", "01", True, "NA", float("nan"), " ")]
    ['1', '1', '1', '01', 'True', 'NA', None, None]
    """
    if isinstance(label, np.generic) and not isinstance(label, np.datetime64 | np.floating):
        label = label.item()
    if isinstance(label, bytes):
        label = label.decode("utf-8", "backslashreplace")
    if isinstance(label, str):
        return label if label.strip() else None
    if label is None or type(label).__name__ in ("NAType", "NaTType"):  # of pandas, not imported
        return None
    if isinstance(label, datetime.datetime | np.datetime64):
        return _time_text(label)
    if isinstance(label, float | np.floating | Decimal | Fraction):
        if label != label:
            return None
        # str() of a float32 has the digits of the float32 and not of its float64.
        return str(int(label)) if label == label // 1 else str(label)
    if isinstance(label, tuple):
        parts = [label_text(part) for part in label]
        return None if None in parts else repr(tuple(parts))
    if isinstance(label, complex | list | dict | set | np.ndarray):
        raise TypeError(
            f"groups must hold texts or numbers, got {short_repr(label)}; use one label a row"
        )
    return str(label)


def _time_text(time) -> str | None:
    # Python's times may have a zone, which NumPy's have not.
    zone = ""
    if isinstance(time, datetime.datetime):
        if time.tzinfo is not None:
            time, zone = time.astimezone(datetime.UTC).replace(tzinfo=None), "Z"
        # Timestamps of pandas have nanoseconds.
        time = time.to_datetime64() if hasattr(time, "to_datetime64") else np.datetime64(time)
    if np.isnat(time):
        return None
    return str(np.datetime_as_string(time, unit="auto")) + zone


def unique_labels(groups: Any, size: int) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Return the distinct labels, the text of each, and each row's index among them.

    groups: a label for each of `size` rows, of any type.

    Raises ValueError for missing labels, another number of them, and floats so large that
    neighbouring whole numbers are equal.
    """
    labels = _one_dimensional(groups, size)
    if labels.dtype.kind == "f":
        _check_distinguishable(labels)
    if labels.dtype.kind == "O":
        texts = [label_text(label) for label in labels]
        index: dict[Any, int] = {}
        codes = np.array([index.setdefault(text, len(index)) for text in texts])
        distinct: list[Any] = list(index)
    else:
        # Sorting an array of numbers first leaves few texts to make.
        values, codes = np.unique(labels, return_inverse=True)
        distinct = [label_text(value) for value in values]
    if None in distinct:
        missing = np.isin(codes, [i for i, text in enumerate(distinct) if text is None])
        raise ValueError(
            f"groups must name a group for every row, got a missing label in row "
            f"{int(np.argmax(missing))} and {missing.sum() - 1} more; drop such rows first"
        )
    # By number if all labels are whole numbers, whatever their type.
    names = sorted(set(distinct))
    if all(name.removeprefix("-").isdecimal() for name in names):
        names.sort(key=int)
    place = {name: i for i, name in enumerate(names)}
    codes = np.array([place[text] for text in distinct])[codes]
    # The user's own labels, for attributes and results.
    _, first = np.unique(codes, return_index=True)
    return labels[first], names, codes


def _one_dimensional(groups: Any, size: int) -> np.ndarray:
    if isinstance(groups, str | bytes) or not hasattr(groups, "__len__"):
        raise TypeError(f"groups must have a label for each row, got {short_repr(groups)}")
    kinds = {*map(type, groups)} if isinstance(groups, list) else set()
    if len(kinds) > 1 or kinds == {tuple}:
        # NumPy would turn None into a text, and tuples into rows.
        given = np.fromiter(groups, object, len(groups))
    else:
        given = np.asarray(groups)
    if given.shape != (size,):
        raise ValueError(
            f"groups must have a label for each of {size} rows, got shape {given.shape}; with a "
            "data frame pass one of its columns"
        )
    return given


def _check_distinguishable(labels: np.ndarray) -> None:
    """Raise ValueError for floats from which on neighbouring whole numbers are equal."""
    limit = 2.0 ** (np.finfo(labels.dtype).nmant + 1)
    large = np.abs(labels) >= limit
    if np.any(large):
        raise ValueError(
            f"groups must be labels that differ, got the {labels.dtype} {labels[large][0]:.17g}: "
            f"from {limit:.0f} on, neighbouring whole numbers are one float; pass texts or integers"
        )


def listed(names: list[str]) -> str:
    """The first names, and the number of the others.

    >>> listed(["a", "b", "c", "d"])
    "'a', 'b', 'c' and 1 more"
    """
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more
