"""The completion counts of a store, held per block: the levels of its cells, and where they differ.

All cells of a block mostly have one level. Two numbers for each block are held, the lowest and
highest level of its cells; a block with several levels is read again when its cells matter. So the
memory does not grow with the number of cells.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from negmaml.sweeps.chunks import decode, empty_chunk, fault
from negmaml.sweeps.grid import Region
from negmaml.sweeps.layout import Layout
from negmaml.sweeps.selection import Selection
from negmaml.sweeps.storage import Storage, in_batches

At = tuple[int, ...]


class BlockFlags:
    """The completion counts of all blocks, as they are in the files.

    present: the blocks that have a file. low, high: the lowest and highest level of the cells of
    each block, over the blocks.
    """

    def __init__(self, files: Storage, layout: Layout, present: Sequence[At]):
        self.files, self.layout = files, layout
        self.low, self.high = (np.zeros(layout.chunks, np.uint8) for _ in range(2))
        # Most blocks have the same file, which is then verified and decoded only once.
        known = lru_cache(1024)(self._bounds)

        def bounds(at: At) -> tuple[int, int]:
            data = files.read(layout.key(at), layout.most_bytes(at))
            shape = tuple(part.stop - part.start for part in layout.region(at))
            return (0, 0) if data is None else known(data, shape)

        if present:
            at = tuple(np.array(present).T)
            self.low[at], self.high[at] = np.array(in_batches(bounds, present), np.uint8).T

    def _bounds(self, data: bytes, shape: At) -> tuple[int, int]:
        cells = _decoded(self.layout, data)[tuple(map(slice, shape))]
        return int(cells.min()), int(cells.max())

    def cells(self, at: At) -> np.ndarray:
        """The levels of the cells of a block."""
        if self.low[at] == self.high[at]:
            shape = [part.stop - part.start for part in self.layout.region(at)]
            return np.full(shape, self.low[at], np.uint8)
        return read_flags(self.files, self.layout, at)

    def regions_at(self, level: int, selection: Selection) -> Iterator[tuple[Region, int]]:
        """The blocks with selected cells that have a level, and the number of these cells."""
        counts = selection.counts(self.layout.chunk)
        some = (self.low <= level) & (level <= self.high) & (counts > 0)
        uniform = self.low == self.high
        for at in map(tuple, np.argwhere(some).tolist()):
            region = self.layout.region(at)
            count = counts[at] if uniform[at] else self.wanted(region, level, selection).sum()
            if count:
                yield region, int(count)

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
        found = int(counts[whole].sum())
        for at in map(tuple, np.argwhere(~whole & (high >= least) & (counts > 0)).tolist()):
            cells = self.cells(at) >= least
            found += int((cells & selection.within(self.layout.region(at))).sum())
        return found


def read_flags(files: Storage, layout: Layout, at: Sequence[int]) -> np.ndarray:
    """The completion counts of a block; zeros if its file is missing or damaged."""
    data = files.read(layout.key(at), layout.most_bytes(at))
    region = layout.region(at)
    inside = tuple(slice(part.stop - part.start) for part in region)
    return (empty_chunk(layout) if data is None else _decoded(layout, data))[inside]


def _decoded(layout: Layout, data: bytes) -> np.ndarray:
    # Every chunk of completion counts has the same size, so any position will do.
    origin = (0,) * len(layout.shape)
    return empty_chunk(layout) if fault(layout, origin, data) else decode(layout, data)


def flags_of(files: Storage, layout: Layout) -> BlockFlags:
    """The completion counts in a store."""
    found = map(layout.position, files.sizes(layout.name))
    return BlockFlags(files, layout, [at for at in found if at is not None])
