"""Blocks on many machines: a Dask client sends them, workers compute and write them.

Each worker compiles its own programs once and writes its own blocks to the store. A block of a
worker that dies goes to another; writing a block twice writes the same chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax

from negmaml._core.extras import require
from negmaml.sweeps.contract import Output
from negmaml.sweeps.grid import Grid, Region
from negmaml.sweeps.plan import index_of
from negmaml.sweeps.run import Runner
from negmaml.sweeps.store import Store, open_store

RETRIES = 10  # of a block whose workers die
_open: dict[str, tuple[Runner, Store]] = {}  # of this worker, for the sweep of each name


@dataclass(frozen=True)
class Job:
    """What a worker needs to know of a sweep."""

    name: str
    function: Any
    grid: Grid
    outputs: tuple[Output, ...]
    root: int
    block: tuple[int, ...]
    memory: int | None
    x64: bool
    store: str
    part: int


def connect(client):
    """(a Dask client, and the same to close if it was made here from an address)."""
    if not isinstance(client, str):
        return client, None
    distributed = require("distributed", "cluster")
    try:
        made = distributed.Client(client, timeout=5)
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"no scheduler answers at {client!r} ({error}); start one with `dask scheduler`, or "
            "leave it out to compute here"
        ) from error
    return made, made


def compute_block(job: Job, region: Region) -> int:
    """Compute and store what a region lacks, on a worker; returns the number of cells."""
    with jax.enable_x64(job.x64):
        if job.name not in _open:
            store = open_store(job.store)
            if store is None:
                raise FileNotFoundError(
                    f"a worker cannot see the store {job.store!r}; it must be on a file system "
                    "that all machines share, or at a URL"
                )
            runner = Runner(job.function, job.grid, job.outputs, job.root, job.block, job.memory)
            _open.clear()  # programs of an earlier sweep
            _open[job.name] = runner, store
        runner, store = _open[job.name]
        wanted = store.done(region) == job.part
        if wanted.any():
            runner.expect([region])
            store.write(region, job.part, wanted, runner.compute(index_of(region, wanted)))
        return int(wanted.sum())


def spread(client, job: Job, regions: list[Region]) -> Iterator[int]:
    """Send every region to the workers; yields the cells of each as it is stored."""
    distributed = require("distributed", "cluster")
    if not client.scheduler_info()["workers"]:
        client.wait_for_workers(1, timeout=60)
    futures = [
        client.submit(compute_block, job, region, key=f"{job.name}-{i}", retries=RETRIES)
        for i, region in enumerate(regions)
    ]
    try:
        for future in distributed.as_completed(futures):
            yield future.result()
            future.release()
    finally:
        client.cancel([future for future in futures if not future.done()])
