"""Computing the missing blocks of a store: the one compute loop, and the processes that run it.

`run` computes the blocks of a shard and writes them. A sweep that has its store to itself runs it
over all missing blocks, a worker that shares the store over the blocks that it claims, and a worker
of a Dask cluster over one block at a time.

Workers that share a store do not communicate directly. Each opens the store for a moment, or
creates it, and then claims one block after another: first those of its own share, so that it
compiles few programs, then the remaining ones. It exits when all blocks are complete, so one
surviving worker computes the blocks of all that died.
"""

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

import numpy as np

from negmaml._core.settings import result_settings, settings_of
from negmaml.sweeps import cluster
from negmaml.sweeps import lease as leases
from negmaml.sweeps.grid import Block, Region
from negmaml.sweeps.lease import heartbeats, locked
from negmaml.sweeps.members import (
    LostError,
    Membership,
    WorkerIndex,
    find_live_worker,
    monitor_of,
    require_exclusive,
)
from negmaml.sweeps.planning import ValidatedSweep, sorted_by_group
from negmaml.sweeps.runner import Runner
from negmaml.sweeps.selection import Selection, selected
from negmaml.sweeps.session import (
    ExecutionOptions,
    ProgramCache,
    SharedError,
    StorePolicy,
    at_level,
    in_chunks_of,
    last_level,
    open_or_create,
    to_dataset,
)
from negmaml.sweeps.storage import StoreError
from negmaml.sweeps.store import SweepStore, open_store


@runtime_checkable
class Shard(Protocol):
    """The blocks of one level of a store that a process computes.

    level: what the cells get; 0 is everything, higher levels are extensions of vectorized axes.
    regions: the blocks that may come, in order. `blocks` yields those to compute; None is a
    barrier: wait for pending writes. `holds` tells whether a block may still be written, and
    `release` is called after it was.
    """

    level: int
    regions: list[Region]

    def blocks(self) -> Iterator[Block | None]: ...
    def holds(self, region: Region) -> bool: ...
    def release(self, region: Region) -> None: ...


def run(runner: Runner, store: SweepStore, shard: Shard) -> Iterator[int]:
    """Compute the blocks of a shard and write them; yield the number of cells of each.

    A block is written while the next one is computed, and an accelerator starts the one after it,
    so an interrupt loses at most three blocks.
    """
    runner.expect(shard.regions)

    def write(region: Region, wanted: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        # Checked again just before writing: another worker may have taken the block over.
        if shard.holds(region):
            store.write(region, shard.level, wanted, values)
        shard.release(region)

    # One thread, so that at most one block waits in memory while the next is computed.
    with ThreadPoolExecutor(1) as writer:
        pending: list[tuple[int, Future]] = []
        for block, values in runner.compute(shard.blocks()):
            yield from _written(pending)
            pending = []
            if block is not None:
                region, wanted = block
                pending = [(int(wanted.sum()), writer.submit(write, region, wanted, values))]
        yield from _written(pending)


def _written(pending: Sequence[tuple[int, Future]]) -> Iterator[int]:
    """Wait for writes and raise their errors; yield the cells of each."""
    for cells, future in pending:
        future.result()
        yield cells


class ListedShard:
    """A fixed list of blocks that no other process computes.

    wanted: which cells of a block are computed; asked once for each block, just before.
    """

    def __init__(
        self, level: int, listed: Sequence[Region], wanted: Callable[[Region], np.ndarray]
    ):
        self.level, self.regions, self.wanted = level, list(listed), wanted

    def blocks(self) -> Iterator[Block]:
        """Every block."""
        for region in self.regions:
            yield region, self.wanted(region)

    def holds(self, region: Region) -> bool:
        """True: the process holds the whole store."""
        return True

    def release(self, region: Region) -> None:
        """Nothing to release."""


class ClaimedShard:
    """The blocks that this worker claims, until those of all workers are complete.

    missing: which cells of a block are missing, read from the store.
    """

    def __init__(
        self,
        level: int,
        listed: Sequence[Region],
        store: SweepStore,
        membership: Membership,
        missing: Callable[[Region], np.ndarray],
    ):
        self.level, self.regions = level, in_order(listed, membership.index)
        self.block, self.membership, self.missing = store.manifest.block, membership, missing

    def _name(self, region: Region) -> str:
        """The name of a block at a level, like that of a chunk."""
        corner = [part.start // size for part, size in zip(region, self.block, strict=True)]
        return ".".join(map(str, [self.level, *corner]))

    def blocks(self) -> Iterator[Block | None]:
        """Claim blocks and yield them, until all of them are complete."""
        todo, membership = list(self.regions), self.membership
        while todo:
            left, waiting = [], True
            for region in todo:
                if not self.missing(region).any():
                    continue
                left.append(region)
                if membership.claim(self._name(region)):
                    # Another worker may have completed the block just before it was claimed.
                    wanted = self.missing(region)
                    if wanted.any():
                        waiting = False
                        yield region, wanted
                    else:
                        membership.release(self._name(region), stored=False)
            # A barrier, since pending writes still change the flags that `missing` reads.
            yield None
            membership.check()
            # Others hold all blocks that are left. The wait ends with their flags or their silence.
            if left and waiting:
                time.sleep(leases.HEARTBEAT_S / 5)
            todo = left

    def holds(self, region: Region) -> bool:
        """True if no other worker has taken the block over."""
        return self.membership.holds(self._name(region))

    def release(self, region: Region) -> None:
        """Release the claim of a block that was stored."""
        self.membership.release(self._name(region))


def in_order(blocks: Sequence[Region], index: WorkerIndex) -> list[Region]:
    """The share of a worker, and then the shares of the others, beginning with the next worker.

    The shares of others are in reverse, because their workers come to the end last.
    """
    number, count = index
    # Contiguous shares: blocks are sorted by group, so each worker compiles few programs.
    cuts = [len(blocks) * k // count for k in range(count + 1)]
    shares = [list(blocks[start:stop]) for start, stop in pairwise(cuts)]
    own, *others = shares[number - 1 :] + shares[: number - 1]
    return own + [region for share in others for region in reversed(share)]


def corner_of(region: Region) -> tuple[int, ...]:
    """The first position of a block along each dim, which identifies it."""
    return tuple(part.start for part in region)


def run_exclusive(sweep: ValidatedSweep, url: str, options: ExecutionOptions, policy: StorePolicy):
    """Compute what the store at `url` is missing of a sweep, with the store to itself.

    Returns its dataset.
    """
    with locked(url) as lock:
        # Workers hold no lock while they compute, so they are looked for under this one.
        crashed = require_exclusive(url) or lock.previous_owner_crashed
        asked = sweep = in_chunks_of(url, sweep)
        started, grid = time.perf_counter(), sweep.grid
        programs = ProgramCache(sweep, policy.code_version)
        sweep, store, runner = open_or_create(sweep, url, crashed, options, policy, programs)
        before, last = float(store.attributes.get("wall_seconds", 0.0)), last_level(store, grid)
        requested = selected(store.manifest.grid, grid)
        complete = store.flags().count(last + 1, requested)
        options.report(complete, grid.cells)
        computed = False
        try:
            # In rising order, because a cell gets a level only if it has all levels below.
            for level in range(last + 1):
                for cells in _run_level(sweep, store, level, requested, options, runner, programs):
                    lock.check()
                    computed = True
                    # Cells become complete with the first level, which gives new cells
                    # everything, or with the last one.
                    complete += cells if level in (0, last) else 0
                    options.report(complete, grid.cells)
                runner = None  # it was made for a new store, which has one level
        finally:
            if computed:
                # The error of a full disk is raised by the block. After losing the lock, nothing
                # may be written any more.
                with contextlib.suppress(OSError, StoreError):
                    lock.check()
                    store.describe({"wall_seconds": before + time.perf_counter() - started})
        return to_dataset(store, asked, requested)


def _run_level(
    sweep: ValidatedSweep, store: SweepStore, level: int, requested: Selection,
    options: ExecutionOptions, runner: Runner | None, programs: ProgramCache,
) -> Iterator[int]:  # fmt: skip
    """Compute a level of the cells that miss it, here or on a Dask cluster; yield their numbers."""
    flags = store.flags()
    missing = [region for region, _ in flags.regions_at(level, requested)]
    if not missing:
        return

    def wanted(region: Region) -> np.ndarray:
        return flags.wanted(region, level, requested)

    listed = sorted_by_group(store.manifest.grid, missing)
    own = at_level(sweep, store, level)
    if options.client is None:
        runner = runner or own.runner(store.manifest.block, options.memory, options.devices)
        runner.compiler.check = programs.check
        yield from run(runner, store, ListedShard(level, listed, wanted))
    else:
        name = f"negmaml-{uuid.uuid4().hex[:8]}"
        job = Job(name, own, store.manifest.block, options.memory, result_settings(), store.url,
                  level)  # fmt: skip
        blocks = [(region, wanted(region)) for region in listed]
        yield from cluster.submit(options.client, name, store.url, run_block, job, blocks)


@dataclass(frozen=True)
class Job:
    """A level of a sweep for the workers of a Dask cluster; it can be pickled.

    settings: settings of JAX that change results. url: the store.
    """

    name: str
    sweep: ValidatedSweep
    block: tuple[int, ...]
    memory: int | None
    settings: Mapping[str, str]
    url: str
    level: int


_open: dict[str, tuple[Runner, SweepStore]] = {}  # in a Dask worker: those of the current job


def run_block(job: Job, region: Region, missing: np.ndarray) -> int:
    """Compute and store one block in a Dask worker; return the number of its cells.

    Each worker compiles its own programs once. A block of a worker that dies is computed again by
    another one, which writes the same chunks.
    """
    with settings_of(job.settings):
        if job.name not in _open:
            store = open_store(job.url)
            if store is None:
                raise FileNotFoundError(
                    f"a worker cannot see the store {job.url!r}; it must be on a file system that "
                    "all machines share, or at a URL"
                )
            _open.clear()  # programs of an earlier sweep
            _open[job.name] = job.sweep.runner(job.block, job.memory, None), store
        runner, store = _open[job.name]
        # The block may have been stored by a worker that died before it returned.
        wanted = missing & (store.completed(region) == job.level)
        if wanted.any():
            list(run(runner, store, ListedShard(job.level, [region], lambda _: wanted)))
        return int(missing.sum())


def run_shared(
    sweep: ValidatedSweep, url: str, worker: WorkerIndex, options: ExecutionOptions,
    policy: StorePolicy,
):  # fmt: skip
    """Compute what the store at `url` is missing of a sweep, together with other workers.

    Returns its dataset once all requested cells are complete.
    """
    programs = ProgramCache(sweep, policy.code_version)
    programs(sweep.grid.groups())  # traced now, so that no other worker waits for it
    monitor = monitor_of(url)
    while True:
        try:
            membership = Membership(url, worker, monitor)
            return _run_member(sweep, url, membership, options, policy, programs)
        except LostError:  # this process showed no heartbeat for long, for example while suspended
            continue
        except SharedError:  # the workers that share the store may be dead
            if find_live_worker(monitor):
                raise


def _run_member(
    sweep: ValidatedSweep, url: str, membership: Membership, options: ExecutionOptions,
    policy: StorePolicy, programs: ProgramCache,
):  # fmt: skip
    """Join the workers, compute claimed blocks until all are complete, and leave."""
    started = time.perf_counter()
    with locked(url, opening=True) as lock:
        asked = sweep = in_chunks_of(url, sweep)
        grid = sweep.grid
        exclusive = not membership.others()
        crashed = lock.previous_owner_crashed and exclusive
        sweep, store, runner = open_or_create(
            sweep, url, crashed, options, policy, programs, exclusive, check=False
        )
        # Before the lock is released, so that others that open the store see this worker.
        membership.register()
    with heartbeats(membership.beat):
        try:
            requested = selected(store.manifest.grid, grid)
            last = last_level(store, grid)
            complete = store.flags().count(last + 1, requested)
            options.report(complete, requested.size)
            for level in range(last + 1):
                counted = list(store.flags().regions_at(level, requested))
                listed = sorted_by_group(store.manifest.grid, [region for region, _ in counted])
                missing = {corner_of(region): count for region, count in counted}

                def still_missing(region: Region, level=level, missing=missing) -> np.ndarray:
                    nonlocal complete
                    wanted = requested.within(region) & (store.completed(region) == level)
                    if not wanted.any() and level in (0, last):
                        # Counted once, when it is first seen to be complete.
                        complete += missing.pop(corner_of(region), 0)
                        options.report(complete, requested.size)
                    return wanted

                if listed:
                    own = at_level(sweep, store, level)
                    block = store.manifest.block
                    runner = runner or own.runner(block, options.memory, options.devices)
                    runner.compiler.check = programs.check
                    shard = ClaimedShard(level, listed, store, membership, still_missing)
                    for _ in run(runner, store, shard):
                        membership.check()
                runner = None  # it was made for this level
        finally:
            _leave(url, membership, time.perf_counter() - started)
    return to_dataset(store, asked, requested)


def _leave(url: str, membership: Membership, seconds: float) -> None:
    """Leave the workers and record the time; the last one removes the files of dead workers."""
    with contextlib.suppress(OSError, StoreError):
        # A worker that was counted as dead must not write any more.
        membership.check()
        with locked(url, opening=True):
            exclusive = not membership.others()
            store = open_store(url, tidy=exclusive, listed=False)
            if exclusive:
                membership.remove_stale()
            if store is not None:
                before = float(store.attributes.get("wall_seconds", 0.0))
                store.describe({"wall_seconds": before + seconds})
            membership.unregister()
    membership.unregister()  # also if the time could not be recorded: nobody has to wait for it
