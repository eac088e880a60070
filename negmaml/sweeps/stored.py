"""A sweep into a store: made or checked, gone on with, extended, and read back."""

import contextlib
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from negmaml.sweeps import cluster as clusters
from negmaml.sweeps import store as stores
from negmaml.sweeps.grid import Grid
from negmaml.sweeps.lock import StoreError, local_path
from negmaml.sweeps.manifest import differences, longer_whole_axes, part_of
from negmaml.sweeps.plan import index_of, planned, regions
from negmaml.sweeps.run import Runner
from negmaml.sweeps.work import Work, x64


def into_store(work, url, memory, block, devices, client, extend, accept_changes, progress):
    """Compute what the store at `url` lacks, and return its dataset: see `nm.sweep`."""
    started, asked, tell = time.perf_counter(), work.grid, progress or (lambda *_: None)
    work, store, runner = _opened(work, url, memory, block, devices, extend, accept_changes)
    before, last = float(store.group.attrs.get("wall_seconds", 0.0)), len(store.parts) - 1
    whole = int((store.done() > last).sum())
    tell(whole, work.grid.cells)
    try:
        for part in range(last + 1):
            for count in _compute(work, store, part, memory, devices, client, runner):
                whole += count if part in (0, last) else 0
                tell(whole, work.grid.cells)
            runner = None  # it was for a new store, which has one part
    finally:
        with contextlib.suppress(OSError):  # the error of a full disk is told by the block
            store.describe({"wall_seconds": before + time.perf_counter() - started})
    return _labelled(store, asked)


def _compute(work: Work, store: stores.Store, part: int, memory, devices, client, runner):
    """Give a part to the cells that lack it, here or on the workers; yields how many, by block."""
    lacking = store.done() == part
    todo = [region for region in regions(work.grid, store.block) if lacking[region].any()]
    if not todo:
        return
    grid, outputs = part_of(work.grid, work.outputs, store.parts[part])
    work = replace(work, grid=grid, outputs=outputs)
    if client is None:
        runner = runner or work.runner(store.block, memory, devices)
        yield from _here(runner, store, part, todo, lacking)
        return
    job = clusters.Job(
        f"negmaml-{uuid.uuid4().hex[:8]}", work.function, grid, outputs, work.root, store.block,
        memory, x64(), store.url, part,
    )  # fmt: skip
    yield from clusters.spread(client, job, todo)


def _opened(
    work: Work, url: str, memory, block, devices, extend: bool, accept_changes: bool
) -> tuple[Work, stores.Store, Runner | None]:
    """The store, made or checked; the work in the order of the store; a runner if one was made."""
    asked, store = work.manifest(), stores.open_store(url)
    if store is None:
        _, runner = planned(work, memory, block, devices)
        made = stores.create(url, asked, work.grid, runner.block, work.attributes())
        return work, made, runner
    wrong, more = differences(store.manifest, asked)
    changes = [
        f"{field}: store has {store.manifest[field]}, asked {asked[field]}"
        for field in ("function", "version")
        if store.manifest[field] != asked[field]
    ]
    wrong += [f"{text}; extend adds it (--extend)" for text in more if not extend]
    if not accept_changes:
        wrong += [f"{text}; accept_changes goes on all the same" for text in changes]
    if wrong:
        listed = "\n  ".join(wrong)
        raise StoreError(f"store {url!r} holds another sweep:\n  {listed}")
    _check_outputs(work, url, longer_whole_axes(store.manifest, asked))
    store.repair()
    if changes:
        store.accept(asked, "; ".join(changes))
    work = replace(work, grid=store.extend(asked) if more else store.grid())
    if more:
        described = work.description()
        store.describe({name: described[name] for name in ("grid", "seeds")})
    return work, store, None


def _check_outputs(work: Work, url: str, longer: list[str]) -> None:
    """That what is stored stays right when whole axes get longer, of which only new is computed."""
    hidden = [o.name for o in work.outputs if not o.dims and o.name not in work.declared]
    if longer and hidden:
        raise StoreError(
            f"store {url!r} cannot take new values of {', '.join(longer)}: outputs "
            f"{', '.join(hidden)} may depend on all values at once; if they do not, pass "
            f"output_dims={{{hidden[0]!r}: ()}}, or else sweep all values into another store"
        )


def _labelled(store: stores.Store, asked: Grid):
    """The dataset of a store, lazily, in the order of the grid that was asked for."""
    import xarray as xr

    path = local_path(store.url)
    dataset = xr.open_zarr(str(path or store.url), chunks=None, consolidated=False)
    dataset = dataset.drop_vars("done")
    held = store.grid()
    for old, new in zip((*held.axes, *held.whole), (*asked.axes, *asked.whole), strict=True):
        if old.dim and old.values != new.values:
            dataset = dataset.isel({old.dim: [old.values.index(v) for v in new.values]})
    if held.seeds != asked.seeds:
        dataset = dataset.isel(seed=[held.seeds.index(seed) for seed in asked.seeds])
    return dataset


def _here(runner: Runner, store: stores.Store, part: int, todo, lacking):
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
