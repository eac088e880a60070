"""The workers that share a store, and the blocks that they have claimed.

Beside the store `x.zarr`, the folder `.x.zarr.workers` (at a URL `x.zarr.workers`) holds the leases

- `worker-W-`, whose file has the heartbeat and the progress of worker W;
- `block-B-`, by which a worker claims block B.

A claim saves work and is not needed for correct results: two workers that compute the same block
write the same numbers to the same files. Workers look at claims before they look at `completed`,
and release a claim after they have written it.
"""

import contextlib
import math
import os
import re
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

from negmaml._core.deprecation import renamed_attribute
from negmaml._core.display import one_line
from negmaml.sweeps import lease as leases
from negmaml.sweeps.lease import HeartbeatMonitor, Lease, this_process
from negmaml.sweeps.storage import StoreError, storage_beside

FOLDER = "workers"
WORKER = "worker-"
BLOCK = re.compile(r"block-(.+)-(\d+)")
SLURM = "slurm"
MAX_WORKERS = 10**6
MAX_RECORD = 500  # characters of a worker's record
WorkerIndex = tuple[int, int]  # (k, n): the k-th of n workers, from 1


class LostError(StoreError):
    """Other workers counted this one as dead."""


def parse_worker(worker) -> WorkerIndex:
    """(k, n) of a pair, or of the environment of a SLURM job for "slurm".

    There, a worker is a process of `srun`, a task of an array job, or a process in such a task.
    """
    if worker == SLURM:
        array, step = _of_slurm("ARRAY_TASK_ID", "ARRAY_TASK_COUNT"), _of_slurm("PROCID", "NTASKS")
        if array is None and step is None:
            raise ValueError(
                "worker='slurm' reads SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT, which an "
                "array job sets (sbatch --array=1-16), or SLURM_PROCID and SLURM_NTASKS of srun; "
                "elsewhere pass a pair such as (3, 16)"
            )
        (task, tasks), (process, processes) = array or (0, 1), step or (0, 1)
        # Task ids may start at 0 or 1, or have gaps: the remainder is always valid.
        return task % tasks * processes + process % processes + 1, tasks * processes
    pair = tuple(worker) if isinstance(worker, Sequence) and not isinstance(worker, str) else ()
    if len(pair) != 2 or not all(isinstance(n, Integral) and not isinstance(n, bool) for n in pair):
        raise TypeError(f"worker must be a pair such as (3, 16), or 'slurm', got {worker!r}")
    if not 1 <= pair[0] <= pair[1] <= MAX_WORKERS:
        raise ValueError(
            f"worker must be (k, n) with k from 1 to n, at most {MAX_WORKERS:,}, got {worker!r}"
        )
    return int(pair[0]), int(pair[1])


def _of_slurm(index: str, count: str) -> tuple[int, int] | None:
    """Return two variables of SLURM, None if they are not two valid numbers."""
    try:
        number, of = (int(os.environ[f"SLURM_{name}"]) for name in (index, count))
    except (KeyError, ValueError):
        return None
    return (number, of) if of > 0 else None


@dataclass(frozen=True)
class WorkerRecord:
    """The record of a worker in its lease file.

    Attributes:
        key: the name of the file.
        process: process and machine.
        index: (k, n), the k-th of n workers.
        blocks: blocks that it has stored.
        heartbeat: the time of its last heartbeat, by its own clock.
    """

    key: str
    process: str
    index: WorkerIndex
    blocks: int
    heartbeat: float

    name = renamed_attribute("WorkerRecord.name", "key")
    part = renamed_attribute("WorkerRecord.part", "index")
    beat = renamed_attribute("WorkerRecord.beat", "heartbeat")

    def text(self) -> str:
        """The record as it is written."""
        number, count = self.index
        return f"{number}/{count} | {self.blocks} | {self.heartbeat:.3f} | {self.process}"

    def row(self) -> tuple[str, str, str, str]:
        """Process, index, blocks stored, and the age of the last heartbeat, as text."""
        number, count = self.index
        ago = max(0.0, time.time() - self.heartbeat)
        dead = " (dead?)" if ago > leases.HEARTBEAT_S * leases.MAX_MISSED else ""
        return self.process, f"{number}/{count}", f"{self.blocks:,}", f"{ago:.0f} s ago{dead}"

    @classmethod
    def parse(cls, key: str, text: str) -> "WorkerRecord | None":
        """The record in a text; None for one that is incomplete or not of a worker."""
        # Anybody may have written the file; a bad record is ignored.
        with contextlib.suppress(ValueError, OverflowError):
            if len(text) > MAX_RECORD:
                return None
            index, blocks, beat, process = text.split(" | ", 3)
            number, count = index.split("/")
            if not math.isfinite(seconds := float(beat)):
                return None
            return cls(key, one_line(process), (int(number), int(count)), int(blocks), seconds)
        return None


class Membership:
    """This process as one of the workers that share a store, with the blocks it has claimed."""

    def __init__(self, url: str, index: WorkerIndex, monitor: HeartbeatMonitor):
        self.url, self.index = url, index
        self.monitor, self.storage = monitor, monitor.storage
        self.blocks, self.claims = 0, dict[str, Lease]()
        # A random name: a restarted process is another worker than the one that died.
        self.lease = Lease(monitor, f"{WORKER}{uuid.uuid4().hex[:12]}-", "")
        # The record names the key of the lease, which exists only now.
        self.lease.text = self.text()

    @property
    def lost(self) -> threading.Event:
        """Set once other workers have counted this one as dead."""
        return self.lease.lost

    def text(self) -> str:
        """The record of this worker now."""
        key, now = self.lease.key, time.time()
        return WorkerRecord(key, this_process(), self.index, self.blocks, now).text()

    def register(self) -> None:
        """Become one of the workers."""
        self.lease.acquire()

    def beat(self, count: int) -> bool:
        """Renew the heartbeat; False if other workers counted this one as dead."""
        return self.lease.renew(self.text())

    def check(self) -> None:
        """Raise LostError if other workers counted this one as dead."""
        if self.lost.is_set():
            raise LostError(f"others that share {self.url!r} counted {self.lease.key} as dead")

    def others(self) -> list[str]:
        """The other workers, without those known to be dead."""
        # Silent workers count as dead; new ones count as alive until they were watched.
        names = [n for n in self.storage.names() if n.startswith(WORKER) and n != self.lease.key]
        return [name for name in names if not self.monitor.silent(name)]

    def claim(self, block: str) -> bool:
        """Try to claim a block; return whether it was free, or its holder dead."""
        # The claim names its worker, so that one heartbeat serves all claims of a worker.
        lease = Lease(self.monitor, f"block-{block}-", self.lease.key)
        if not lease.acquire():
            return False
        self.claims[block] = lease
        return True

    def holds(self, block: str) -> bool:
        """True if no other worker has taken the block over."""
        return not self.lost.is_set() and self.claims[block].held()

    def release(self, block: str, stored: bool = True) -> None:
        """Release the claim of a block, and count it if it was stored."""
        self.blocks += stored
        self.claims.pop(block).release()

    def unregister(self) -> None:
        """Release all claims and leave the workers."""
        # Claims first: without the worker's file, others would watch each claim until it counts as
        # silent.
        for block in list(self.claims):
            self.release(block, stored=False)
        self.lease.release()
        self.storage.remove_if_empty()

    def remove_stale(self) -> None:
        """Delete the files of dead workers. Call only if no other worker lives."""
        for name in self.storage.names():
            if name != self.lease.key:
                self.storage.discard(name)


def workers_of(url: str) -> tuple[list[WorkerRecord], int]:
    """The workers that share a store, and the number of claimed blocks."""
    storage = storage_beside(url, FOLDER)
    names = storage.names()
    found = [WorkerRecord.parse(n, storage.read_text(n)) for n in names if n.startswith(WORKER)]
    # A set, since a takeover leaves two files of one block for a moment.
    blocks = {match[1] for match in map(BLOCK.fullmatch, names) if match}
    return sorted((w for w in found if w), key=lambda worker: worker.index), len(blocks)


def monitor_of(url: str) -> HeartbeatMonitor:
    """A monitor of the workers that share a store."""
    return HeartbeatMonitor(storage_beside(url, FOLDER))


def find_live_worker(monitor: HeartbeatMonitor) -> str:
    """Return the key of a worker that lives, or "" once all have been silent for long enough."""
    # Listed again in each round, because workers may leave while they are watched.
    while left := [name for name in monitor.storage.names() if name.startswith(WORKER)]:
        if changed := [name for name in left if monitor.changed(name)]:
            return changed[0]
        if all([monitor.silent(name) for name in left]):  # a list: every worker has to be read
            break
        time.sleep(leases.HEARTBEAT_S / 5)
    return ""


def require_exclusive(url: str) -> bool:
    """Raise StoreError if workers share the store; return whether dead ones had left files.

    Deletes these files.
    """
    monitor = monitor_of(url)
    storage = monitor.storage
    if key := find_live_worker(monitor):
        record = WorkerRecord.parse(key, storage.read_text(key))
        text = f"{record.process}, worker {'/'.join(map(str, record.index))}" if record else ""
        raise StoreError(
            f"store {url!r} is shared by workers ({text or one_line(key)}); wait for them, or "
            "join them with worker= (--worker of the command)"
        )
    # All workers are dead: claims and records are litter.
    left = storage.names()
    for name in left:
        storage.discard(name)
    storage.remove_if_empty()
    return bool(left)
