"""Progress of a running or finished sweep, and the chunks that its store has lost."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from negmaml._core.calls import explain_calls
from negmaml._core.display import printable
from negmaml.sweeps.description import description_of
from negmaml.sweeps.lost import found_in, note
from negmaml.sweeps.members import WorkerRecord, workers_of
from negmaml.sweeps.selection import selected
from negmaml.sweeps.storage import check_url

SHOWN = 20  # lost chunks that are listed; the rest is counted


@dataclass(frozen=True)
class Status:
    """The progress of a sweep; prints as a table.

    Attributes:
        cells, blocks: number of cells and blocks of the store.
        cells_done, blocks_done: number of complete ones.
        claimed: blocks that workers have claimed and not yet stored.
        workers: the records of workers that share it.
        lost: the fault of each missing or altered chunk, by its file.
        checked: whether every chunk was read.
    """

    cells: int
    cells_done: int
    blocks: int
    blocks_done: int
    claimed: int
    workers: tuple[WorkerRecord, ...]
    lost: Mapping[str, str] = field(default_factory=dict)
    checked: bool = False

    def rows(self) -> list[tuple[str, str]]:
        """The status as (name, text)."""
        share = self.cells_done / self.cells
        return [
            ("cells done", f"{self.cells_done:,} of {self.cells:,} ({share:.1%})"),
            ("blocks done", f"{self.blocks_done:,} of {self.blocks:,}"),
            ("blocks claimed", f"{self.claimed:,}"),
            ("workers", f"{len(self.workers):,}"),
            ("chunks lost", f"{len(self.lost):,}{'' if self.checked else ', contents not read'}"),
        ]

    def record(self) -> dict[str, Any]:
        """The status in plain numbers and texts."""
        now = time.time()
        workers = [
            {"process": w.process, "worker": "/".join(map(str, w.index)), "blocks": w.blocks,
             "seconds_since_heartbeat": max(0.0, now - w.heartbeat)}
            for w in self.workers
        ]  # fmt: skip
        counts = ("cells", "cells_done", "blocks", "blocks_done", "claimed", "checked")
        return {name: getattr(self, name) for name in counts} | {
            "workers": workers,
            "lost": dict(self.lost),
        }

    def losses(self) -> list[str]:
        """A description of each lost chunk, up to `SHOWN`, and the number of the others."""
        listed = [f"{key} {fault}" for key, fault in list(self.lost.items())[:SHOWN]]
        more = len(self.lost) - len(listed)
        return [*listed, *([f"and {more:,} more"] if more else [])]

    def __repr__(self) -> str:
        lines = [f"{name:<16}{value}" for name, value in self.rows()]
        for worker in self.workers:
            process, index, blocks, beat = worker.row()
            lines.append(f"  worker {index}: {process}, {blocks} blocks, last heartbeat {beat}")
        lines += [f"  lost: {text}" for text in self.losses()]
        return "\n".join(map(printable, lines))


@explain_calls
def status(store: str | os.PathLike[str], *, check: bool = False) -> Status:
    """Report the progress of the sweep in a store, its lost chunks, and the workers that share it.

    A cell counts as done if it is flagged and its chunks exist with a possible size. The same call
    of `nm.sweep` computes lost cells again.

    Arguments:
        store: a path or URL of a store; it is only read.
        check: whether to read every chunk and verify its checksum. Altered chunks are listed in a
            file beside the store for the next sweep.

    A worker without a heartbeat for 20 seconds is listed as dead. Other workers take over its
    blocks when they have completed all others.

    Raises FileNotFoundError if there is no store, and StoreError if it is not one of a sweep.

    >>> import jax, negmaml as nm
    >>> from tempfile import TemporaryDirectory
    >>> function = lambda key, x: {"y": x * jax.random.normal(key)}
    >>> with TemporaryDirectory() as folder:
    ...     _ = nm.sweep(function, {"x": [1.0, 2.0]}, [0, 1], f"{folder}/a")
    ...     found = nm.sweeps.status(f"{folder}/a")
    >>> found.cells_done, found.cells, len(found.lost)
    (4, 4, 0)
    """
    if not isinstance(check, bool):
        raise TypeError(f"check must be True or False, got {check!r}")
    url = check_url(store)
    held = description_of(url)
    found = found_in(url, held, check)
    # Writing also clears an old note, if nothing is damaged any more.
    if check:
        note(url, found.damaged)
    levels, grid = held.manifest.num_levels, held.manifest.grid
    done = found.flags.count(levels, selected(grid, grid), found.possible)
    blocks = np.minimum(found.flags.low, found.possible) >= levels
    workers, claimed = workers_of(url)
    return Status(
        grid.cells, done, blocks.size, int(blocks.sum()), claimed, tuple(workers), found.lost, check
    )
