"""How far a sweep is, for who asks while it runs."""

import math
import os
from dataclasses import dataclass

import numpy as np

from negmaml._core.display import printable
from negmaml._core.extras import require
from negmaml.sweeps.claims import Worker, workers_of
from negmaml.sweeps.files import address, check_url
from negmaml.sweeps.planning import regions
from negmaml.sweeps.store import manifest_of


@dataclass(frozen=True)
class Status:
    """How far a sweep is.

    Attributes:
        cells, blocks: how many there are in the store.
        cells_done, blocks_done: how many of them are complete.
        claimed: blocks that workers have claimed and not yet stored.
        workers: those that share it: process, part, blocks stored, and the time of the last beat.
    """

    cells: int
    cells_done: int
    blocks: int
    blocks_done: int
    claimed: int
    workers: tuple[Worker, ...]

    def rows(self) -> list[tuple[str, str]]:
        """The status in words."""
        share = self.cells_done / self.cells
        return [
            ("cells done", f"{self.cells_done:,} of {self.cells:,} ({share:.1%})"),
            ("blocks done", f"{self.blocks_done:,} of {self.blocks:,}"),
            ("blocks claimed", f"{self.claimed:,}"),
            ("workers", f"{len(self.workers):,}"),
        ]

    def __repr__(self) -> str:
        lines = [f"{name:<16}{value}" for name, value in self.rows()]
        for worker in self.workers:
            process, part, blocks, beat = worker.row()
            lines.append(f"  part {part}: {process}, {blocks} blocks, last sign of life {beat}")
        return "\n".join(map(printable, lines))


def status(store: str | os.PathLike[str]) -> Status:
    """How far the sweep in a store is, and which workers share it; reads only.

    A worker that did not show that it lives for 20 seconds is listed as gone: others take its
    blocks over when nothing else is left to do.

    Raises FileNotFoundError if there is no store, and StoreError if it is not one of a sweep.
    """
    url = check_url(store)
    manifest = manifest_of(url)
    zarr = require("zarr", "sweep")
    group = zarr.open_group(address(url), mode="r", zarr_format=3, use_consolidated=True)
    done = np.asarray(group["done"][...]) == 1 + len(manifest.parts)
    blocks = [bool(done[region].all()) for region in regions(manifest.grid, manifest.block)]
    workers, claimed = workers_of(url)
    return Status(
        math.prod(done.shape), int(done.sum()), len(blocks), sum(blocks), claimed, tuple(workers)
    )
