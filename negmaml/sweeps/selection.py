"""The cells of a store that a call asks for: positions along each dim, in all combinations."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from math import prod

import numpy as np

from negmaml.sweeps.grid import Region, SweepGrid
from negmaml.sweeps.progressions import positions


@dataclass(frozen=True)
class Selection:
    """Cells of a grid of a shape; `positions` has their positions along each dim.

    It holds at most a flag for each position of a dim, and none for each cell.
    """

    shape: tuple[int, ...]
    positions: tuple[range | np.ndarray, ...]

    @property
    def size(self) -> int:
        """Number of cells."""
        return prod(map(len, self.positions))

    @cached_property
    def _masks(self) -> list[np.ndarray | None]:
        """For each dim: which positions are selected; None if all of them are."""
        found: list[np.ndarray | None] = []
        for size, at in zip(self.shape, self.positions, strict=True):
            if len(at) == size:  # positions are distinct
                found.append(None)
                continue
            mask = np.zeros(size, bool)
            mask[at if isinstance(at, np.ndarray) else np.asarray(at)] = True
            found.append(mask)
        return found

    @property
    def whole(self) -> bool:
        """True for all cells of the grid."""
        return self.size == prod(self.shape)

    def within(self, region: Region) -> np.ndarray:
        """A mask of the selected cells of a region."""
        parts = [
            np.ones(part.stop - part.start, bool) if mask is None else mask[part]
            for mask, part in zip(self._masks, region, strict=True)
        ]
        return reduce(np.logical_and.outer, parts)

    def counts(self, block: Sequence[int]) -> np.ndarray:
        """The number of selected cells in each block."""
        parts = []
        for mask, n, size in zip(self._masks, self.shape, block, strict=True):
            starts = np.arange(0, n, size)
            if mask is None:
                parts.append(np.minimum(starts + size, n) - starts)
            else:
                parts.append(np.add.reduceat(mask, starts, dtype=np.int64))
        return reduce(np.multiply.outer, parts)


def selected(stored: SweepGrid, requested: SweepGrid) -> Selection:
    """The requested cells in the grid of a store, which has all of them."""
    by_names = {axis.names: axis for axis in requested.axes}
    found = [positions(a.values, by_names[a.names].values) for a in stored.axes if a.dim]
    return Selection(stored.shape, (*found, positions(stored.seeds, requested.seeds)))
