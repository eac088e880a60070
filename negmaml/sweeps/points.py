"""Random search: points of a grid that are drawn at random."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from numbers import Integral, Real
from typing import Any

import numpy as np

from negmaml._core.calls import explain_calls
from negmaml._core.checks import did_you_mean
from negmaml.sweeps.names import check_axis_name
from negmaml.sweeps.parse import MAX_VALUES

SCALES = ("linear", "log")
FIELDS = ("low", "high", "scale", "integer")
TRIES = 1000  # draws for each requested point, including draws of duplicates


@explain_calls
def random_points(n: int, *, seed: int = 0, **ranges: Any) -> list[dict[str, Any]]:
    """Draw random points for the axis `point` of a grid.

    Arguments:
        n: number of points. The first points are the same for every n, so more can extend a store.
        seed: seed of the draws, independent of the seeds of a sweep.
        ranges: for each name a dict with low and high, of either sign, and optionally
            scale="log" (uniform in the logarithm; low and high of one sign) or integer=True (from
            low to high, both included); a list of values to choose from; or one value for all.

    The value of a name depends only on the seed, the name and the number of the point.

    Raises ValueError or TypeError that names the range, also if there are fewer than n points.

    >>> points = random_points(3, rate={"low": -1, "high": 1}, kind=["a", "b"])
    >>> [sorted(point) for point in points][0], -1 <= points[0]["rate"] <= 1
    (['kind', 'rate'], True)
    >>> points == random_points(5, rate={"low": -1, "high": 1}, kind=["a", "b"])[:3]
    True
    """
    for name, value, least in (("n", n, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise ValueError(
                f"{name} of random points must be an integer >= {least}, got {value!r}"
            )
    if n > MAX_VALUES:
        raise ValueError(f"n of random points must be at most {MAX_VALUES:,}, got {n:,}")
    if not ranges:
        raise ValueError("random points need a range, such as rate={'low': -1, 'high': 1}")
    for name, given in ranges.items():
        check_axis_name(name)
        _check(name, given)
    found: dict[tuple, dict[str, Any]] = {}
    # Draws are numbered and duplicates skipped, so the first points do not depend on n.
    for i in _numbers(int(n), ranges):
        point = {name: _draw(name, given, int(seed), i) for name, given in ranges.items()}
        # Points that round to the same values would be one cell.
        found.setdefault(tuple(map(_single, point.values())), point)
        if len(found) == n:
            break
    return list(found.values())


def _single(value: Any) -> Any:
    """A number rounded to float32; points with equal rounded values would be the same cell."""
    single = isinstance(value, float) and abs(value) < np.finfo(np.float32).max
    return float(np.float32(value)) if single else value


def _numbers(n: int, ranges: Mapping[str, Any]) -> Iterator[int]:
    """0, 1, 2, ...; ValueError after `TRIES` draws for each of the n points."""
    for i in count():
        if i == TRIES * n:
            raise ValueError(
                f"n={n} random points: there are not so many different ones of {dict(ranges)}"
            )
        yield i


def _check(name: str, given: Any) -> None:
    if isinstance(given, Mapping):
        for field in given:
            if field not in FIELDS:
                raise ValueError(
                    f"range of {name!r}: no field {field!r}{did_you_mean(field, FIELDS)}"
                )
        low, high = (_number(given.get(bound)) for bound in ("low", "high"))
        if low is None or high is None:
            raise TypeError(f"range of {name!r} needs numbers low and high, got {dict(given)}")
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"range of {name!r} needs low < high, both finite, got {dict(given)}")
        scale, integer = given.get("scale", "linear"), given.get("integer", False)
        if scale not in SCALES:
            raise ValueError(f"range of {name!r}: scale must be one of {SCALES}, got {scale!r}")
        if scale == "log" and low * high <= 0:
            raise ValueError(
                f"range of {name!r}: scale 'log' needs low and high of one sign, got {given}; use "
                "'linear' for a range with zero in it"
            )
        if not isinstance(integer, bool) or (integer and (low % 1 or high % 1 or scale == "log")):
            raise ValueError(
                f"range of {name!r}: integer must be true or false, and true with whole bounds on "
                f"a linear scale, got {dict(given)}"
            )
    elif isinstance(given, Sequence) and not isinstance(given, str) and not given:
        raise ValueError(f"range of {name!r}: no values to choose from")


def _number(value: Any) -> float | None:
    """A number as a float; None for any other value."""
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else None


def _draw(name: str, given: Any, seed: int, i: int) -> Any:
    """The value of a name at point i."""
    # A hash instead of a generator: the value does not depend on other names or on n.
    text = hashlib.blake2b(f"{seed}|{name}|{i}".encode(), digest_size=8).digest()
    # In [0, 1): the largest hashes would round to 1, beyond the last choice.
    u = min(int.from_bytes(text, "little") / 2**64, 1 - 2**-53)
    if isinstance(given, Mapping):
        low, high = given["low"], given["high"]
        if given.get("integer"):
            return int(low) + math.floor(u * (int(high) - int(low) + 1))
        if given.get("scale") == "log":
            return math.copysign(abs(low) * (high / low) ** u, low)
        return float(low + (high - low) * u)
    if isinstance(given, Sequence | np.ndarray) and not isinstance(given, str):
        return given[math.floor(u * len(given))]
    return given
