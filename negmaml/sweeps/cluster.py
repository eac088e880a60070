"""Blocks on many machines: a Dask client sends them, workers compute and write them.

Each worker compiles its own programs once and writes its own blocks to the store. A block of a
worker that dies goes to another; writing a block twice writes the same chunk.
"""

import contextlib
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from negmaml._core.extras import require
from negmaml._core.settings import settings_of
from negmaml.sweeps.functions import Output, SweepFunction
from negmaml.sweeps.grid import Grid, Region
from negmaml.sweeps.planning import index_of
from negmaml.sweeps.run import Runner
from negmaml.sweeps.store import Store, open_store

WORKERS_WITHIN = 60  # seconds
RETRIES = 10  # of a block whose workers die
_open: dict[str, tuple[Runner, Store]] = {}  # of this worker, for the sweep of each name


@dataclass(frozen=True)
class Job:
    """What a worker needs to know of a sweep."""

    name: str
    function: SweepFunction
    grid: Grid
    outputs: tuple[Output, ...]
    root_seed: int
    block: tuple[int, ...]
    memory: int | None
    settings: Mapping[str, str]
    store: str
    part: int


@contextmanager
def connected(client) -> Iterator[Any]:
    """A Dask client: the one given, or one of the scheduler at an address; None for None."""
    if not isinstance(client, str):
        yield client
        return
    distributed = require("distributed", "cluster")
    try:
        made = distributed.Client(client, timeout=5)
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"no scheduler answers at {client!r} ({error}); start one with `dask scheduler`, or "
            "leave it out to compute here"
        ) from error
    with made:
        yield made


def compute_block(job: Job, region: Region, lacking: np.ndarray) -> int:
    """On a worker: compute and store a part of the cells that lack it; returns their number."""
    with settings_of(job.settings):
        if job.name not in _open:
            store = open_store(job.store)
            if store is None:
                raise FileNotFoundError(
                    f"a worker cannot see the store {job.store!r}; it must be on a file system "
                    "that all machines share, or at a URL"
                )
            runner = Runner(
                job.function, job.grid, job.outputs, job.root_seed, job.block, job.memory
            )
            _open.clear()  # programs of an earlier sweep
            _open[job.name] = runner, store
        runner, store = _open[job.name]
        wanted = lacking & (
            store.completed(region) == job.part
        )  # it may have been stored, and lost
        if wanted.any():
            runner.expect([region])
            store.write(region, job.part, wanted, runner.compute(index_of(region, wanted)))
        return int(lacking.sum())


def spread(client, job: Job, blocks: list[tuple[Region, np.ndarray]]) -> Iterator[int]:
    """Send blocks, and which of their cells lack the part, to the workers; yields cells stored."""
    distributed = require("distributed", "cluster")
    if not client.scheduler_info()["workers"]:
        try:
            client.wait_for_workers(1, timeout=WORKERS_WITHIN)
        except TimeoutError as error:
            raise ConnectionError(
                f"the scheduler has no workers, and none came within {WORKERS_WITHIN} s; start "
                "some with `dask worker`"
            ) from error
    futures = [
        client.submit(compute_block, job, *block, key=f"{job.name}-{i}", retries=RETRIES)
        for i, block in enumerate(blocks)
    ]
    try:
        for future in distributed.as_completed(futures):
            yield future.result()
            future.release()
    except (CancelledError, distributed.comm.CommClosedError) as error:
        said = str(error).partition("\n")[0]
        raise ConnectionError(
            f"the scheduler is gone, or gave the blocks up ({said}); those that are finished are "
            f"in {job.store!r}, and the same call goes on from there with another scheduler"
        ) from error
    finally:
        with contextlib.suppress(Exception):  # of a scheduler that is gone
            client.cancel([future for future in futures if not future.done()])
