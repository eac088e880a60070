"""The completion counts of a store, held per block: the levels of its cells, and where they differ.

All cells of a block mostly have one level. Two numbers for each block are held, the lowest and
highest level of its cells, and the compressed file of a block with several levels. So the memory
does not grow with the number of cells.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial

import numpy as np

from negmaml.sweeps.chunks import decode, empty_chunk, fault
from negmaml.sweeps.grid import Region
from negmaml.sweeps.layout import Layout
from negmaml.sweeps.selection import Selection
from negmaml.sweeps.storage import Storage, in_batches

At = tuple[int, ...]


class BlockFlags:
    """The completion counts of all blocks, as they were in the files when this was made.

    present: the blocks that have a file. low, high: the lowest and highest level of the cells of
    each block, over the blocks. mixed: the files of the blocks with several levels.
    """

    def __init__(self, files: Storage, layout: Layout, present: Sequence[At]):
        self.layout = layout
        self.low, self.high = (np.zeros(layout.chunks, np.uint8) for _ in range(2))
        self.mixed: dict[At, bytes] = {}
        # Most blocks have the same file, which is then decoded, counted and held only once.
        self._decoded = lru_cache(64)(partial(_decoded, layout))
        self._number = lru_cache(1024)(self._count_levels)
        same: dict[bytes, bytes] = {}

        @lru_cache(1024)
        def bounds(data: bytes, shape: At) -> tuple[int, int]:
            cells = self._decoded(data)[tuple(map(slice, shape))]
            return int(cells.min()), int(cells.max())

        def found(at: At) -> tuple[int, int]:
            data = files.read(layout.key(at), layout.most_bytes(at))
            low, high = (0, 0) if data is None else bounds(data, self._shape(at))
            if data is not None and low < high:
                self.mixed[at] = same.setdefault(data, data)
            return low, high

        if present:
            at = tuple(np.array(present).T)
            self.low[at], self.high[at] = np.array(in_batches(found, present), np.uint8).T

    def _shape(self, at: At) -> At:
        return tuple(part.stop - part.start for part in self.layout.region(at))

    def cells(self, at: At) -> np.ndarray:
        """The levels of the cells of a block; not to be written to."""
        if at not in self.mixed:
            return np.full(self._shape(at), self.low[at], np.uint8)
        return self._decoded(self.mixed[at])[tuple(map(slice, self._shape(at)))]

    def _count_levels(self, data: bytes, shape: At, least: int, most: int) -> int:
        cells = self._decoded(data)[tuple(map(slice, shape))]
        return int(((least <= cells) & (cells <= most)).sum())

    def _selected(self, at: At, least: int, most: int, selection: Selection) -> int:
        """The number of selected cells of a mixed block whose levels lie within two bounds."""
        if selection.whole:
            return self._number(self.mixed[at], self._shape(at), least, most)
        cells = self.cells(at)
        within = selection.within(self.layout.region(at))
        return int(((least <= cells) & (cells <= most) & within).sum())

    def regions_at(self, level: int, selection: Selection) -> Iterator[tuple[Region, int]]:
        """The blocks with selected cells that have a level, and the number of these cells."""
        counts = selection.counts(self.layout.chunk)
        some = (self.low <= level) & (level <= self.high) & (counts > 0)
        for at in map(tuple, np.argwhere(some).tolist()):
            mixed = at in self.mixed
            count = self._selected(at, level, level, selection) if mixed else int(counts[at])
            if count:
                yield self.layout.region(at), count

    def wanted(self, region: Region, level: int, selection: Selection) -> np.ndarray:
        """A mask of the selected cells of a block that have a level."""
        parts = zip(region, self.layout.chunk, strict=True)
        at = tuple(part.start // size for part, size in parts)
        return selection.within(region) & (self.cells(at) == level)

    def count(self, least: int, selection: Selection, most: np.ndarray | None = None) -> int:
        """The number of selected cells of at least a level; `most` bounds the levels per block."""
        counts = selection.counts(self.layout.chunk)
        high = self.high if most is None else np.minimum(self.high, most)
        whole = (self.low >= least) & (high >= least)
        mixed = np.argwhere(~whole & (high >= least) & (counts > 0)).tolist()
        partly = sum(self._selected(tuple(at), least, 255, selection) for at in mixed)
        return int(counts[whole].sum()) + partly


def read_flags(files: Storage, layout: Layout, at: Sequence[int]) -> np.ndarray:
    """The completion counts of a block; zeros if its file is missing or damaged."""
    data = files.read(layout.key(at), layout.most_bytes(at))
    region = layout.region(at)
    inside = tuple(slice(part.stop - part.start) for part in region)
    return (empty_chunk(layout) if data is None else _decoded(layout, data))[inside]


def _decoded(layout: Layout, data: bytes) -> np.ndarray:
    # All chunks of completion counts have the same size, so any position will do.
    origin = (0,) * len(layout.shape)
    return empty_chunk(layout) if fault(layout, origin, data) else decode(layout, data)


def flags_of(files: Storage, layout: Layout) -> BlockFlags:
    """The completion counts in a store."""
    found = map(layout.position, files.sizes(layout.name))
    return BlockFlags(files, layout, [at for at in found if at is not None])
