"""Distinct integers along an axis, held as a `range` where they are an arithmetic progression.

A range takes no memory for its values, and answers in constant time whether it holds a value and
where. The functions here accept ranges and tuples, so that callers do not tell them apart.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

Values = range | tuple


def compact(values: Sequence[int]) -> range | tuple[int, ...]:
    """Distinct integers as a range if they are an arithmetic progression, else as a tuple."""
    if isinstance(values, range) or not values:
        return values if isinstance(values, range) else ()
    step = values[1] - values[0] if len(values) > 1 else 1
    if not step:  # the same value twice, which others report
        return tuple(values)
    found = range(values[0], values[0] + step * len(values), step)
    # The last value first: it rules out almost every list that is no progression.
    return found if values[-1] == found[-1] and tuple(found) == tuple(values) else tuple(values)


def includes(old: Values, new: Values) -> bool:
    """True if two ranges show without listing values that `old` has all values of `new`."""
    if not (isinstance(old, range) and isinstance(new, range)):
        return False
    return new[0] in old and new[-1] in old and (len(new) == 1 or new.step % old.step == 0)


def missing_from(old: Values, new: Values) -> Values:
    """The values of `new` that are not in `old`, in order."""
    if includes(old, new):
        return ()
    if new[: len(old)] == old:
        return new[len(old) :]
    held = old if isinstance(old, range) else set(old)
    return tuple(value for value in new if value not in held)


def joined(old: Values, new: Values) -> Any:
    """The values of `old`, and then those of `new` that are not in it."""
    # Appended and never sorted: the positions of stored cells must not change.
    added = missing_from(old, new)
    if not added:
        return old
    if isinstance(old, range):
        # Extended without listing it, if the new values continue it.
        longer = range(old.start, old.start + old.step * (len(old) + len(added)), old.step)
        if added == (longer[len(old) :] if isinstance(added, range) else tuple(longer[len(old) :])):
            return longer
    return (*old, *added)


def positions(held: Values, asked: Values) -> range | np.ndarray:
    """The position in `held` of each value of `asked`, -1 for a missing one."""
    if held == asked:
        return range(len(held))
    if includes(held, asked):
        first = held.index(asked[0])
        step = held.index(asked[1]) - first if len(asked) > 1 else 1
        return range(first, first + step * len(asked), step)
    if isinstance(held, range):
        return np.array([held.index(value) if value in held else -1 for value in asked])
    at = {value: i for i, value in enumerate(held)}
    return np.array([at.get(value, -1) for value in asked])


def take(values: Sequence[int], at: np.ndarray) -> np.ndarray:
    """The integers at some positions."""
    if isinstance(values, range):
        return values.start + values.step * np.asarray(at, np.int64)
    return np.array(values)[at]


def to_json(values: Sequence[int]) -> Any:
    """Integers as JSON: a table of start, stop and step, or a list."""
    if isinstance(values, range):
        return {"start": values.start, "stop": values.stop, "step": values.step}
    return list(values)


def from_json(held: Any) -> range | tuple:
    """The integers in JSON; ValueError or TypeError for an invalid range."""
    if not isinstance(held, dict):
        values = tuple(held)
        return compact(values) if all(type(n) is int for n in values) else values
    bounds = held["start"], held["stop"], held["step"]
    # range() also takes what converts to an integer.
    if held.keys() != {"start", "stop", "step"} or not all(type(n) is int for n in bounds):
        raise ValueError(f"{str(held)[:100]} is no range")
    return range(*bounds)
