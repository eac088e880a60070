"""Parsing of a user's grid and seeds into a `SweepGrid`."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice, product
from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.checks import did_you_mean, short_repr
from negmaml.sweeps import progressions
from negmaml.sweeps.grid import Axis, SweepGrid
from negmaml.sweeps.names import POINT, check_axis_name, check_distinct, check_grid_names
from negmaml.sweeps.values import MORE_BITS, as_value, canonical, check_labels, indistinct

MAX_SEEDS = 10**9
MAX_LISTED = 10**7  # seeds that are no arithmetic progression: a store lists each of them
MAX_VALUES = 10**7  # values of an axis
MAX_CELLS = 10**9  # each has flags in memory and in the store


def parse_grid(
    grid: Mapping | Sequence[Mapping],
    seeds: int | Iterable[int],
    accepted: Sequence[str] | None = None,
    required: Sequence[str] = (),
    static: Sequence[str] | None = None,
    vectorized: Sequence[str] = (),
    common: Sequence[str] = (),
) -> SweepGrid:
    """Check a user's grid and seeds and return them as a `SweepGrid`.

    Arguments:
        accepted: names the function takes; None for any.
        required: names without a default.
        static: names that set shapes; None means integers, truth values and strings.

    Raises ValueError or TypeError naming the axis, and the nearest valid name.
    """
    # A list of grids becomes one zipped axis `point`; vectorized axes must agree in all of them.
    several = not isinstance(grid, Mapping)
    if several and (isinstance(grid, str) or not isinstance(grid, Iterable)):
        raise TypeError(f"grid must be a dict of axes or a list of such dicts, got {grid!r}")
    parts = [_axes(one, accepted, required) for one in (grid if several else [grid])]
    if not parts:
        raise ValueError("grid must hold at least one dict of axes, got an empty list")
    vectorized_axes, cell_axes = [], []
    for axes in parts:
        vectorized_axes.append([a for a in axes if set(a.names) & set(vectorized)])
        cell_axes.append([a for a in axes if not set(a.names) & set(vectorized)])
    for axis in vectorized_axes[0]:
        if len(axis.names) > 1:
            taken = ", ".join(sorted(set(axis.names) & set(vectorized)))
            raise ValueError(
                f"grid: {axis.dim!r} zips {taken}, a vectorized axis; make it an axis of its own"
            )
    axes = _union(cell_axes, vectorized_axes) if several else cell_axes[0]
    names = [name for axis in (*axes, *vectorized_axes[0]) for name in axis.names]
    for argument, given in (
        ("static", static or ()),
        ("vectorized", vectorized),
        ("common_random_numbers", common),
    ):
        for name in given:
            if name not in (known := names if accepted is None else accepted):
                raise ValueError(f"{argument}: no axis {name!r}{did_you_mean(name, known)}")
    if both := sorted(set(static or ()) & set(vectorized)):
        raise ValueError(
            f"static and vectorized both name {both[0]!r}; an axis can only be one of them"
        )
    # Decided before values become floats, because integers mark a static axis.
    kinds = frozenset(n for a in axes for n in a.names if _is_static(a.column(n), n, static))
    found = SweepGrid(
        tuple(_canonical(axis, kinds) for axis in axes),
        tuple(_canonical(axis, frozenset()) for axis in vectorized_axes[0]),
        parse_seeds(seeds),
        kinds,
        frozenset(common),
    )
    if found.cells > MAX_CELLS:
        sizes = " x ".join(f"{dim} {n:,}" for dim, n in zip(found.dims, found.shape, strict=True))
        raise ValueError(
            f"grid and seeds must make at most {MAX_CELLS:,} cells, got {sizes}; sweep parts of "
            "them, each into a store of its own"
        )
    return found


def parse_seeds(seeds: int | Iterable[int]) -> range | tuple[int, ...]:
    """A count n stands for 0 .. n - 1; otherwise distinct integers in [0, 2^32)."""
    given: Any = seeds.tolist() if isinstance(seeds, np.ndarray | jax.Array) else seeds
    # True is an Integral, but surely a mistake.
    if isinstance(given, Integral) and not isinstance(given, bool):
        if given < 1:
            raise ValueError(f"seeds must be at least 1, or a list of seeds, got {given!r}")
        return range(_few(int(given), MAX_SEEDS))
    listed = isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping)
    most = MAX_SEEDS if isinstance(given, range) else MAX_LISTED
    # Before a list is made: its integers may not fit into memory.
    if hasattr(given, "__len__"):
        _few(_length(given), most)
    if isinstance(given, range):
        values = tuple(given[i] for i in (0, -1) if given)  # they bound all others
    else:
        # One more than allowed is enough to see that an endless iterator is too long.
        values = tuple(islice(given, most + 1)) if listed else ()
    whole = values and all(isinstance(s, Integral) and not isinstance(s, bool) for s in values)
    if not whole or not all(0 <= s < 2**32 for s in values):
        raise ValueError(
            f"seeds must be a count or integers from 0 to 2^32 - 1, got {short_repr(given)}"
        )
    if isinstance(given, range):
        return given
    _few(len(values), most)
    check_distinct("seeds", values)
    return progressions.compact(tuple(map(int, values)))


def _length(values) -> int:
    """The number of values; a range can have more than `len` supports."""
    try:
        return len(values)
    except OverflowError:
        return sys.maxsize


def _few(seeds: int, most: int) -> int:
    """The number of seeds; ValueError if there are more than `most`."""
    if seeds > most:
        unless = f" ({MAX_SEEDS:,} in a range)" if most < MAX_SEEDS else ""
        raise ValueError(
            f"seeds must be at most {most:,}{unless}, got {seeds:,} or more; sweep fewer, or let "
            "the function return the mean of several draws of its key"
        )
    return seeds


def _axes(grid, accepted, required) -> list[Axis]:
    """The axes of one dict."""
    if not isinstance(grid, Mapping):
        raise TypeError(f"grid must be a dict of axes or a list of such dicts, got {grid!r}")
    axes = [_axis(key, values) for key, values in grid.items()]
    names = [name for axis in axes for name in axis.names]
    for name in names:
        if accepted is not None and name not in accepted:
            raise ValueError(
                f"grid: unknown axis {name!r}{did_you_mean(name, accepted)}; the function takes "
                + (", ".join(accepted) or f"no axes: write it as function(key, {name}), key first")
            )
    check_grid_names(axes)
    if missing := [name for name in required if name not in names]:
        raise ValueError(
            f"grid: {', '.join(missing)} missing, and the function has no default; "
            "add an axis or a constant"
        )
    return axes


def _axis(key, values) -> Axis:
    if key == POINT:
        return _points(values)
    names = key if isinstance(key, tuple) else (key,)
    for name in names or [key]:
        check_axis_name(name)
    dim = "_".join(names)
    if not _is_listed(values):
        if isinstance(key, tuple):
            raise TypeError(f"grid: zipped axes {dim} need a list of tuples, got {values!r}")
        return Axis(None, names, ((as_value(dim, values),),))
    if _length(values) > MAX_VALUES:
        raise ValueError(
            f"grid: axis {dim!r} must have at most {MAX_VALUES:,} values, got {_length(values):,}"
        )
    if len(values) == 0:
        raise ValueError(f"grid: axis {dim!r} is empty; give it a value or leave it out")
    rows = list(values) if isinstance(key, tuple) else [(v,) for v in values]
    for row in rows:
        if not isinstance(row, Sequence | np.ndarray) or len(row) != len(names):
            raise ValueError(f"grid: {dim} zips {len(names)} axes, got the row {row!r}")
    rows = [tuple(as_value(dim, value) for value in row) for row in rows]
    check_distinct(f"axis {dim!r}", rows)
    return Axis(dim, names, tuple(rows))


def _is_listed(values) -> bool:
    """True if these are values along an axis, not a constant."""
    listed = isinstance(values, Sequence) and not isinstance(values, str | bytes | bytearray)
    return listed or len(getattr(values, "shape", ())) > 0


def _points(points) -> Axis:
    """A list of dicts of the same names as one axis, `point`."""
    listed = list(points) if isinstance(points, Sequence) and not isinstance(points, str) else []
    if not listed or not all(isinstance(point, Mapping) and point for point in listed):
        raise TypeError(
            f"grid: {POINT!r} must be a list of dicts, such as [{{'rate': 0.1, 'size': 2}}, ...], "
            f"got {short_repr(points)}"
        )
    for name in (name for point in listed for name in point):
        check_axis_name(name)
    # Sorted, since the order in which a dict was written must not change the axis.
    names = tuple(sorted(listed[0]))
    for i, point in enumerate(listed):
        if tuple(sorted(point)) != names:
            raise ValueError(
                f"grid: every point needs the same names, {', '.join(names)}; point {i} has "
                + ", ".join(sorted(point))
            )
    rows = [tuple(as_value(name, point[name]) for name in names) for point in listed]
    # A zipped axis, so that all checks of its rows apply here as well.
    return replace(_axis(names, rows), dim=POINT)


def _is_static(values, name: str, static: Sequence[str] | None) -> bool:
    if static is not None:
        return name in static
    # Integers usually set sizes; floats never do.
    return not all(isinstance(v, Real) for v in values) or all(
        isinstance(v, Integral) for v in values
    )


def _canonical(axis: Axis, static: frozenset[str]) -> Axis:
    """The axis with numbers as floats, so that 1 and 1.0, 0.0 and -0.0 are the same cell."""
    rows = [
        tuple(
            canonical(name, value, name in static)
            for name, value in zip(axis.names, row, strict=True)
        )
        for row in axis.values
    ]
    check_distinct(f"axis {axis.dim!r}", rows)
    found = Axis(axis.dim, axis.names, tuple(rows))
    for name in static & set(axis.names):
        check_labels(name, found.column(name))
    if clash := indistinct(found, static, jnp.result_type(float) == jnp.float64):
        raise ValueError(f"grid: {clash}; leave one out, {MORE_BITS}")
    return found


def _union(cell_axes: list[list[Axis]], vectorized_axes: list[list[Axis]]) -> list[Axis]:
    """A list of grids as one zipped axis, `point`; a point that two grids share appears once."""
    names = tuple(sorted(name for axis in cell_axes[0] for name in axis.names))
    rows: dict[tuple, None] = {}
    for axes, whole in zip(cell_axes, vectorized_axes, strict=True):
        if tuple(sorted(n for axis in axes for n in axis.names)) != names:
            raise ValueError(f"grid: every grid of a list needs the same axes, {', '.join(names)}")
        if whole != vectorized_axes[0]:
            raise ValueError("grid: the grids of a list must agree on the axes that are vectorized")
        order = [name for axis in axes for name in axis.names]
        for parts in product(*(axis.values for axis in axes)):
            row = dict(zip(order, (v for part in parts for v in part), strict=True))
            # A dict removes points that two grids share, and keeps the order.
            rows[tuple(row[name] for name in names)] = None
    return [Axis(POINT, names, tuple(rows))]


def name_tuple(argument: str, given) -> tuple[str, ...]:
    """The names as a tuple; a string is an error, not a list of letters."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"{argument} must be a list of names, such as [{given!r}], got {given!r}")
    names = tuple(given)
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise TypeError(f"{argument} must be a list of names, got {wrong[0]!r} in it")
    check_distinct(argument, names)
    return names
