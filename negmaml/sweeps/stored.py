"""A sweep into a store: made or checked, extended, gone on with, and read back."""

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from negmaml.sweeps import cluster as clusters
from negmaml.sweeps import store as stores
from negmaml.sweeps.files import StoreError, address
from negmaml.sweeps.grid import Grid
from negmaml.sweeps.lock import Lock
from negmaml.sweeps.manifest import Manifest, differences, extended, other_whole_axes, part_of
from negmaml.sweeps.planning import Work, in_words, index_of, planned, regions, x64
from negmaml.sweeps.run import Runner


@dataclass(frozen=True)
class Means:
    """With what a sweep is computed, and whom it tells how far it is."""

    memory: int | None
    block: int | None
    devices: Any
    client: Any
    tell: Callable[[int, int], Any]


def into_store(work: Work, url: str, lock: Lock, means: Means, extend: bool, accept_changes: bool):
    """Compute what the store at `url` lacks of a sweep, and return its dataset: see `nm.sweep`."""
    started, asked = time.perf_counter(), work.grid
    work, store, runner = _opened(work, url, lock.left, means, extend, accept_changes)
    before, last = float(store.attributes.get("wall_seconds", 0.0)), len(store.parts) - 1
    wanted = _asked(store.manifest.grid, asked)
    whole = int((store.done()[wanted] > last).sum())
    means.tell(whole, asked.cells)
    computed = False
    try:
        for part in range(last + 1):
            for count in _compute(work, store, part, wanted, means, runner):
                lock.check()
                computed = True
                whole += count if part in (0, last) else 0
                means.tell(whole, asked.cells)
            runner = None  # it was for a new store, which has one part
    finally:
        if computed:
            with contextlib.suppress(OSError):  # the error of a full disk is told by the block
                store.describe({"wall_seconds": before + time.perf_counter() - started})
    return _labelled(store, asked, wanted)


def _compute(work: Work, store: stores.Store, part: int, asked, means: Means, runner):
    """Give a part to the cells that lack it, here or on the workers; yields how many, by block."""
    lacking = np.zeros(work.grid.shape, bool)
    lacking[asked] = store.done()[asked] == part
    todo = [region for region in regions(work.grid, store.manifest.block) if lacking[region].any()]
    if not todo:
        return
    grid, outputs = part_of(work.grid, work.outputs, store.parts[part])
    work = replace(work, grid=grid, outputs=outputs)
    block = store.manifest.block
    if means.client is None:
        runner = runner or work.runner(block, means.memory, means.devices)
        yield from _here(runner, store, part, todo, lacking)
        return
    job = clusters.Job(
        f"negmaml-{uuid.uuid4().hex[:8]}", work.function, grid, outputs, work.root, block,
        means.memory, x64(), store.url, part,
    )  # fmt: skip
    yield from clusters.spread(means.client, job, [(r, lacking[r]) for r in todo])


def _asked(held: Grid, asked: Grid) -> tuple[np.ndarray, ...]:
    """Positions of the cells asked for, as an open index over the dims of the store."""
    found = []
    by_names = {axis.names: axis for axis in asked.axes}
    for axis in held.axes:
        if axis.dim:
            found.append(_positions(axis.values, by_names[axis.names].values))
    return np.ix_(*found, _positions(held.seeds, asked.seeds))


def _positions(held: tuple, asked: tuple) -> np.ndarray:
    at = {value: i for i, value in enumerate(held)}
    return np.array([at[value] for value in asked])


def _opened(
    work: Work, url: str, tidy: bool, means: Means, extend: bool, accept_changes: bool
) -> tuple[Work, stores.Store, Runner | None]:
    """The store, made or checked; the work in the order of the store; a runner if one was made."""
    asked, store = work.manifest(), stores.open_store(url, tidy)
    if store is None:
        _, runner = planned(work, means.memory, means.block, means.devices)
        made = stores.create(url, replace(asked, block=runner.block), work.attributes())
        return work, made, runner
    wrong, more = differences(store.manifest, asked)
    changes = [
        f"{field}: store has {getattr(store.manifest, field)}, asked {getattr(asked, field)}"
        for field in ("function", "version")
        if getattr(store.manifest, field) != getattr(asked, field)
    ]
    wrong += [f"{text}; extend adds it (--extend)" for text in more if not extend]
    if not accept_changes:
        wrong += [f"{text}; accept_changes goes on all the same" for text in changes]
    if wrong:
        listed = "\n  ".join(wrong)
        raise StoreError(f"store {url!r} holds another sweep:\n  {listed}")
    _check_outputs(work, url, store.manifest, asked)
    store.follow()
    if changes:
        store.accept(asked, "; ".join(changes))
    if more:
        merged = extended(store.manifest, asked)
        store.extend(merged, in_words(merged.grid))
    held = store.manifest
    return replace(work, grid=held.grid, outputs=held.outputs), store, None


def _check_outputs(work: Work, url: str, stored: Manifest, asked: Manifest) -> None:
    """That what is stored stays right when whole axes differ, as far as it can be known."""
    other = other_whole_axes(stored.grid, asked.grid)
    hidden = [o.name for o in work.outputs if not o.dims and o.name not in work.declared]
    if other and hidden:
        raise StoreError(
            f"store {url!r} has other values of {', '.join(other)} than asked: outputs "
            f"{', '.join(hidden)} may depend on all values at once; if they do not, pass "
            f"output_dims={{{hidden[0]!r}: ()}}, or else sweep all values into another store"
        )


def _labelled(store: stores.Store, asked: Grid, cells):
    """The dataset of a store, lazily, in the order of the grid that was asked for."""
    import xarray as xr

    dataset = xr.open_zarr(address(store.url), chunks=None, zarr_format=3).drop_vars("done")
    held = store.manifest.grid
    at = {dim: index.ravel() for dim, index in zip(held.dims, cells, strict=True)}
    by_names = {axis.names: axis for axis in asked.whole}
    for axis in held.whole:
        if axis.dim:
            at[axis.dim] = _positions(axis.values, by_names[axis.names].values)
    sizes = dataset.sizes
    chosen = {d: i for d, i in at.items() if not np.array_equal(i, np.arange(sizes[d]))}
    dataset = dataset.isel(chosen) if chosen else dataset
    return dataset if held.dims == asked.dims else dataset.transpose(*asked.dims, ...)


def _here(runner: Runner, store: stores.Store, part: int, todo, lacking) -> Iterator[int]:
    """Compute and store a part of the cells of blocks that lack it, here; yields their number.

    A block is written while the next one is computed, so a kill loses two at most.
    """
    runner.expect(todo)
    with ThreadPoolExecutor(1) as writer:
        pending: list[tuple[int, Future]] = []
        for region in todo:
            wanted = lacking[region]
            values = runner.compute(index_of(region, wanted))
            yield from _finished(pending)
            written = writer.submit(store.write, region, part, wanted, values)
            pending = [(int(wanted.sum()), written)]
        yield from _finished(pending)


def _finished(pending):
    """Wait for a write; an error of it is raised here."""
    for count, written in pending:
        written.result()
        yield count
