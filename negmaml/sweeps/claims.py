"""Workers that share a store: who there is, and which blocks they have claimed.

Beside the store `x.zarr` lie in `.x.zarr.workers` (at a URL `x.zarr.workers`), each created by one
process alone,

- `worker-W`, which worker W keeps rewriting while it lives;
- `block-B-N`, by which a worker claims block B: whoever created the highest N has it. Who finds the
  holder of a block silent for long takes it over by creating N + 1.

A claim saves work, and is no part of what is stored: two that compute the same block write the same
numbers into the same files. Claims are looked at before `done`, and removed after it is written.
"""

import contextlib
import math
import os
import re
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral

from negmaml._core.display import one_line
from negmaml.sweeps import lock as locks
from negmaml.sweeps.exclusive import beside
from negmaml.sweeps.storage import StoreError

FOLDER = "workers"
WORKER = "worker-"
BLOCK = re.compile(r"block-(.+)-(\d+)")
SLURM = "slurm"
MOST_PARTS = 10**6
MOST_SAID = 500  # characters that a worker says of itself
Part = tuple[int, int]  # the number of a worker, from 1, and how many there are


class LostError(StoreError):
    """Others took this worker for gone."""


def parse_part(part) -> Part:
    """(number, count) of a pair, or of the environment of a SLURM array job for "slurm"."""
    if part == SLURM:
        try:
            task, count = (int(os.environ[f"SLURM_ARRAY_TASK_{n}"]) for n in ("ID", "COUNT"))
        except (KeyError, ValueError) as error:
            raise ValueError(
                "worker='slurm' reads SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT, which an "
                "array job sets (sbatch --array=1-16); elsewhere pass a pair such as (3, 16)"
            ) from error
        return task % count + 1, count
    pair = tuple(part) if isinstance(part, Sequence) and not isinstance(part, str) else ()
    if len(pair) != 2 or not all(isinstance(n, Integral) and not isinstance(n, bool) for n in pair):
        raise TypeError(f"worker must be a pair such as (3, 16), or 'slurm', got {part!r}")
    if not 1 <= pair[0] <= pair[1] <= MOST_PARTS:
        raise ValueError(
            f"worker must be (k, n) with k from 1 to n, at most {MOST_PARTS:,}, got {part!r}"
        )
    return int(pair[0]), int(pair[1])


@dataclass(frozen=True)
class Worker:
    """What a worker says of itself. beat: the time of its last sign of life, by its own clock."""

    name: str
    process: str
    part: Part
    blocks: int
    beat: float

    def text(self) -> str:
        """As it is written."""
        number, count = self.part
        return f"{number}/{count} | {self.blocks} | {self.beat:.3f} | {self.process}"

    def row(self) -> tuple[str, str, str, str]:
        """In words: process, part, blocks stored, last sign of life by the clocks of both."""
        number, count = self.part
        ago = max(0.0, time.time() - self.beat)
        silent = " (gone?)" if ago > locks.BEAT * locks.BEATS_TO_LOSE else ""
        return self.process, f"{number}/{count}", f"{self.blocks:,}", f"{ago:.0f} s ago{silent}"

    @classmethod
    def read(cls, name: str, text: str) -> "Worker | None":
        """From its file; None while that is being written, or for what no worker wrote."""
        with contextlib.suppress(ValueError, OverflowError):
            if len(text) > MOST_SAID:
                return None
            part, blocks, beat, process = text.split(" | ", 3)
            number, count = part.split("/")
            if not math.isfinite(seconds := float(beat)):
                return None
            return cls(name, one_line(process), (int(number), int(count)), int(blocks), seconds)
        return None


class Claims:
    """The claims of one worker, and those of the others as it sees them."""

    def __init__(self, url: str, part: Part, watch: locks.Watch):
        self.url, self.part = url, part
        self.watch, self.files = watch, watch.notes
        self.own = f"{WORKER}{uuid.uuid4().hex[:12]}"
        self.blocks, self.held = 0, dict[str, int]()
        self.joined, self.lost = False, threading.Event()

    def text(self) -> str:
        """What this worker says of itself."""
        return Worker(self.own, locks.this_process(), self.part, self.blocks, time.time()).text()

    def join(self) -> None:
        """Be among the workers."""
        self.files.create(self.own, self.text())
        self.joined = True

    def beat(self, count: int) -> bool:
        """Show that it lives; False when others took it for gone."""
        if not self.files.read(self.own):
            self.lost.set()
            return False
        self.files.write(self.own, self.text())
        return True

    def check(self) -> None:
        """Raise if others took this worker for gone."""
        if self.lost.is_set():
            raise LostError(f"others that share {self.url!r} took {self.own} for gone")

    def others(self) -> list[str]:
        """The other workers that are not known to be silent."""
        names = [n for n in self.files.names() if n.startswith(WORKER) and n != self.own]
        return [name for name in names if not self.watch.silent(name)]

    def claim(self, block: str) -> bool:
        """Whether this worker has the block from now on."""
        earlier = self._numbers(block)
        if earlier:
            held = _name(block, earlier[-1])
            holder = self.files.read(held)
            if holder == self.own or not self.watch.silent(holder or held):
                return False
        number = earlier[-1] + 1 if earlier else 0
        if not self.files.create(_name(block, number), self.own):
            return False
        if self._numbers(block)[-1:] != [number]:
            self.files.remove(_name(block, number))
            return False
        for older in earlier:
            self.files.remove(_name(block, older))
        self.held[block] = number
        return True

    def holds(self, block: str) -> bool:
        """Whether the block was not taken over meanwhile."""
        return not self.lost.is_set() and self._numbers(block)[-1:] == [self.held[block]]

    def release(self, block: str, done: bool = True) -> None:
        """Give a block back, after it is stored or instead."""
        self.blocks += done
        self.files.remove(_name(block, self.held.pop(block)))

    def leave(self) -> None:
        """Be no worker any more, and give back what is held."""
        for block in list(self.held):
            self.release(block, done=False)
        self.files.remove(self.own)
        self.files.clear()

    def bury(self) -> None:
        """Remove what workers left that are gone; for who is alone."""
        for name in self.files.names():
            if name != self.own:
                self.files.remove(name)

    def _numbers(self, block: str) -> list[int]:
        found = (BLOCK.fullmatch(name) for name in self.files.names())
        return sorted(int(match[2]) for match in found if match and match[1] == block)


def _name(block: str, number: int) -> str:
    return f"block-{block}-{number}"


@contextmanager
def sharing(url: str, part: Part, watch: locks.Watch) -> Iterator[Claims]:
    """The claims of this process, which shows that it lives as long as the block runs."""
    claims = Claims(url, part, watch)

    def beat(count: int) -> bool:
        return not claims.joined or claims.beat(count)

    with locks.beating(beat):
        yield claims


def workers_of(url: str) -> tuple[list[Worker], int]:
    """The workers that share a store, and how many blocks are claimed."""
    files = beside(url, FOLDER)
    names = files.names()
    found = [Worker.read(n, files.read(n)) for n in names if n.startswith(WORKER)]
    blocks = {match[1] for match in map(BLOCK.fullmatch, names) if match}
    return sorted((w for w in found if w), key=lambda worker: worker.part), len(blocks)


def watch_of(url: str) -> locks.Watch:
    """To look at the workers that share a store."""
    return locks.Watch(beside(url, FOLDER))


def living(watch: locks.Watch) -> str:
    """The name of a worker that lives, or "" after all were silent for long."""
    while left := [name for name in watch.notes.names() if name.startswith(WORKER)]:
        if moved := [name for name in left if watch.moved(name)]:
            return moved[0]
        if all([watch.silent(name) for name in left]):
            break
        time.sleep(locks.BEAT / 5)
    return ""


def check_alone(url: str) -> bool:
    """Raise if workers share the store; returns whether some did that are gone."""
    watch = watch_of(url)
    files = watch.notes
    if name := living(watch):
        raise StoreError(
            f"store {url!r} is shared by workers ({_in_words(name, files.read(name))}); wait for "
            "them, or join them with worker="
        )
    remains = files.names()
    for name in remains:
        files.remove(name)
    files.clear()
    return bool(remains)


def _in_words(name: str, text: str) -> str:
    """A worker in words."""
    worker = Worker.read(name, text)
    return f"{worker.process}, part {worker.part[0]}/{worker.part[1]}" if worker else one_line(name)
