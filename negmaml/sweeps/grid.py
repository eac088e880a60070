"""The grid: named axes, the role of each, and the address of every cell.

A cell is one point of the grid at one seed. Axes come in three kinds:

- static: sets shapes or branches (integers, strings); every combination is compiled once;
- number: traced and vmapped;
- vectorized: passed to the function as one array, because it shares work along that axis.

A plain axis is `name: values`; zipped axes are `("p", "m"): [(20, 2), (60, 3)]`; a single value
is a constant without a dimension. A list of grids becomes one zipped axis, `point`.

The random numbers of a cell belong to its address: the sum modulo 2^64 of a hash of each
`name = value`. It does not depend on positions, orders, blocks or devices. Vectorized axes and
axes with common random numbers do not enter it, so cells along them share their random numbers.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from typing import Any

import numpy as np

Region = tuple[slice, ...]  # a block of cells, over the dims of the grid
Block = tuple[Region, np.ndarray]  # a region, and which of its cells are to be computed


@dataclass(frozen=True)
class Axis:
    """One axis, or several zipped axes: `values` has a tuple over `names` for each position.

    `dim` is its dimension in the result; None for a constant.
    """

    dim: str | None
    names: tuple[str, ...]
    values: tuple[tuple, ...]

    def __len__(self) -> int:
        return len(self.values)

    def column(self, name: str) -> list:
        """The values of one name along the axis."""
        i = self.names.index(name)
        return [value[i] for value in self.values]


@dataclass(frozen=True)
class SweepGrid:
    """The validated grid of a sweep.

    axes: axes over cells; vectorized: axes that the function takes whole. seeds: a range if they
    are an arithmetic progression. static, common: the names that set shapes, and those along which
    random numbers are shared.
    """

    axes: tuple[Axis, ...]
    vectorized: tuple[Axis, ...]
    seeds: range | tuple[int, ...]
    static: frozenset[str]
    common: frozenset[str]

    @property
    def dims(self) -> tuple[str, ...]:
        """Dimensions of the cells; the last is the seed."""
        return (*(axis.dim for axis in self.axes if axis.dim), "seed")

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of `dims`."""
        return (*(len(axis) for axis in self.axes if axis.dim), len(self.seeds))

    @property
    def cells(self) -> int:
        """Number of cells: points times seeds."""
        return math.prod(self.shape)

    def vectorized_values(self) -> dict[str, Any]:
        """The arguments for vectorized axes: arrays, or floats for constants."""
        return {
            axis.names[0]: np.array(axis.column(axis.names[0])) if axis.dim else axis.values[0][0]
            for axis in self.vectorized
        }

    def groups(self) -> list[dict[str, Any]]:
        """Every combination of static values; each is one compiled program."""
        parts = []
        for axis in self.axes:
            names = [name for name in axis.names if name in self.static]
            # Distinct rows of an axis, not values of a name: zipped names occur only in their
            # pairs.
            rows, _ = self._static_rows[axis.names]
            parts.append([dict(zip(names, row, strict=True)) for row in rows])
        return [{k: v for part in chosen for k, v in part.items()} for chosen in product(*parts)]

    @cached_property
    def _static_rows(self) -> dict[tuple[str, ...], tuple[list[tuple], np.ndarray]]:
        """For each axis: its distinct static rows, and the number of the row at each position."""
        found = {}
        for axis in self.axes:
            names = [name for name in axis.names if name in self.static]
            columns = [axis.column(name) for name in names]
            rows = list(zip(*columns, strict=True)) if names else [()] * len(axis)
            number = {row: i for i, row in enumerate(dict.fromkeys(rows))}
            found[axis.names] = list(number), np.array([number[row] for row in rows])
        return found

    def group_cells(self, block: Sequence[int]) -> int:
        """The most cells of one group that a block of this shape can hold."""
        cells = 1
        chunks = dict(zip(self.dims, block, strict=True))
        for axis in self.axes:
            # A bound over all positions of the block: it may lie where one static row repeats most.
            most = int(np.bincount(self._static_rows[axis.names][1]).max())
            cells *= min(most, chunks.get(axis.dim, 1) if axis.dim else 1)
        return cells * chunks["seed"]

    def region_groups(self, region: Region) -> list[int]:
        """The positions in `groups()` of the groups that have cells in a region."""
        parts = dict(zip(self.dims, region, strict=True))
        found = [0]
        for axis in self.axes:
            rows, row_of = self._static_rows[axis.names]
            # A region is a box, so its groups are all combinations of the rows on each of its axes.
            part = parts[axis.dim] if axis.dim else slice(0, 1)
            key = axis.names, part.start, part.stop
            if key not in self._rows_within:
                self._rows_within[key] = np.unique(row_of[part]).tolist()
            found = [group * len(rows) + row for group in found for row in self._rows_within[key]]
        return found

    @cached_property
    def _rows_within(self) -> dict[tuple, list[int]]:
        """The static rows in each part of an axis that was asked for: blocks share few parts."""
        return {}

    @cached_property
    def tables(self) -> list["AxisTable"]:
        """The table of every axis over the cells."""
        found, stride = [], 1
        # Groups are numbered like `groups()`: the last axis varies fastest.
        for axis in reversed(self.axes):
            rows, row_of = self._static_rows[axis.names]
            numbers = {n: np.array(axis.column(n)) for n in axis.names if n not in self.static}
            found.append(AxisTable(axis.dim, stride * row_of, _hashes(axis, self.common), numbers))
            stride *= len(rows)
        return found[::-1]

    def groups_of(self, region: Region) -> np.ndarray:
        """The number in `groups()` of every cell of a region."""
        parts = dict(zip(self.dims, region, strict=True))
        found = np.zeros([part.stop - part.start for part in region], int)
        for table in self.tables:
            if table.dim:
                shape = [-1 if dim == table.dim else 1 for dim in self.dims]
                found += table.groups[parts[table.dim]].reshape(shape)
            else:
                found += table.groups
        return found


@dataclass(frozen=True)
class AxisTable:
    """The contributions of each position of an axis to its cells.

    groups: summands of the number of a group. addresses: summands of the address. numbers: the
    values of traced names.
    """

    dim: str | None
    groups: np.ndarray
    addresses: np.ndarray
    numbers: dict[str, np.ndarray]


# Every block asks for these, and an axis can have millions of values.
@lru_cache(256)
def _hashes(axis: Axis, common: frozenset[str]) -> np.ndarray:
    """The contribution of an axis to the address at each position."""
    names = [name for name in axis.names if name not in common]
    # Sums commute, so the order of axes does not matter.
    sums = [
        sum(_hash(name, value[axis.names.index(name)]) for name in names) % 2**64
        for value in axis.values
    ]
    return np.array(sums, np.uint64)


def _hash(name: str, value) -> int:
    # Python's own hash differs between processes; addresses must not.
    # repr tells all floats apart; traced numbers are floats here, so 1 and 1.0 have one address.
    digest = hashlib.blake2b(f"{name}={value!r}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
