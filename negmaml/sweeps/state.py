"""Progress of a sweep, also while it runs, and the chunks that its store has lost."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from negmaml._core.display import printable
from negmaml.sweeps.claims import Worker, workers_of
from negmaml.sweeps.held import existing
from negmaml.sweeps.lost import found_in, note
from negmaml.sweeps.storage import check_url

SHOWN = 20  # lost chunks


@dataclass(frozen=True)
class Status:
    """How far a sweep is.

    Attributes:
        cells, blocks: how many there are in the store.
        cells_done, blocks_done: how many of them are complete.
        claimed: blocks that workers have claimed and not yet stored.
        workers: those that share it: process, part, blocks stored, and the time of the last beat.
        lost: the fault of each chunk that is missing or altered, by its file.
        checked: whether every chunk was read.
    """

    cells: int
    cells_done: int
    blocks: int
    blocks_done: int
    claimed: int
    workers: tuple[Worker, ...]
    lost: Mapping[str, str] = field(default_factory=dict)
    checked: bool = False

    def rows(self) -> list[tuple[str, str]]:
        """The status in words."""
        share = self.cells_done / self.cells
        return [
            ("cells done", f"{self.cells_done:,} of {self.cells:,} ({share:.1%})"),
            ("blocks done", f"{self.blocks_done:,} of {self.blocks:,}"),
            ("blocks claimed", f"{self.claimed:,}"),
            ("workers", f"{len(self.workers):,}"),
            ("chunks lost", f"{len(self.lost):,}{'' if self.checked else ', contents not read'}"),
        ]

    def losses(self) -> list[str]:
        """The lost chunks in words, up to a number of them."""
        listed = [f"{key} {fault}" for key, fault in list(self.lost.items())[:SHOWN]]
        more = len(self.lost) - len(listed)
        return [*listed, *([f"and {more:,} more"] if more else [])]

    def __repr__(self) -> str:
        lines = [f"{name:<16}{value}" for name, value in self.rows()]
        for worker in self.workers:
            process, part, blocks, beat = worker.row()
            lines.append(f"  part {part}: {process}, {blocks} blocks, last sign of life {beat}")
        lines += [f"  lost: {text}" for text in self.losses()]
        return "\n".join(map(printable, lines))


def status(store: str | os.PathLike[str], *, check: bool = False) -> Status:
    """Report the progress of the sweep in a store, its lost chunks, and the workers that share it.

    A cell counts as done if it is flagged and the chunks that hold it are there, with the bytes
    that they can have. The same call of `nm.sweep` computes lost cells again.

    Arguments:
        store: a path or URL of a store, which stays as it is.
        check: whether to read every chunk too, and to compare it with its checksum. Chunks that
            differ are noted in a file beside the store, where the next sweep looks.

    A worker that did not show that it lives for 20 seconds is listed as gone: others take its
    blocks over when nothing else is left to do.

    Raises FileNotFoundError if there is no store, and StoreError if it is not one of a sweep.
    """
    if not isinstance(check, bool):
        raise TypeError(f"check must be True or False, got {check!r}")
    url = check_url(store)
    held = existing(url)
    found = found_in(url, held, check)
    if check:
        note(url, found.damaged)
    done = found.done == 1 + len(held.manifest.parts)
    blocks = [bool(done[part].all()) for part in held.layouts[held.manifest.completed].blocks()]
    workers, claimed = workers_of(url)
    return Status(
        math.prod(done.shape), int(done.sum()), len(blocks), sum(blocks), claimed, tuple(workers),
        found.lost, check,
    )  # fmt: skip
