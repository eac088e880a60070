"""`nm.sweep`: from a function and a grid to one labelled dataset."""

import contextlib
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from negmaml.sweeps import cluster as clusters
from negmaml.sweeps import store as stores
from negmaml.sweeps.contract import Output, contract, fingerprint, outputs
from negmaml.sweeps.extras import require
from negmaml.sweeps.grid import Grid
from negmaml.sweeps.manifest import differences, manifest
from negmaml.sweeps.parse import parse_grid
from negmaml.sweeps.plan import Plan, index_of, make_plan, regions
from negmaml.sweeps.provenance import provenance
from negmaml.sweeps.run import Runner, empty
from negmaml.version import __version__

Progress = Callable[[int, int], Any]


@dataclass(frozen=True)
class Work:
    """A checked sweep, nothing of it computed yet."""

    function: Any
    grid: Grid
    outputs: tuple[Output, ...]
    root: int

    def manifest(self) -> dict[str, Any]:
        """What a store of it says."""
        return manifest(
            fingerprint(self.function), __version__, self.root, self.grid, self.outputs,
            _x64(),
        )  # fmt: skip

    def runner(self, block: Sequence[int], memory: int | None, devices) -> Runner:
        """What computes it here."""
        return Runner(self.function, self.grid, self.outputs, self.root, block, memory, devices)


def sweep(
    function,
    grid: Mapping | Sequence[Mapping],
    seeds: int | Iterable[int],
    store: str | None = None,
    *,
    root: int = 0,
    static: Sequence[str] | None = None,
    whole: Sequence[str] | None = None,
    common: Sequence[str] = (),
    output_dims: Mapping[str, Sequence[str]] | None = None,
    memory: int | None = None,
    block: int | None = None,
    devices: Sequence | None = None,
    client: Any = None,
    extend: bool = False,
    accept_changes: bool = False,
    progress: Progress | None = None,
):
    """Evaluate `function(key, **point)` at every point of a grid and every seed.

    Arguments:
        function: any JAX function that returns a dict of arrays; `nm.sweeps.linear` is the linear
            model.
        grid: a dict of axes, `name: values`; a single value is a constant; a tuple of names zips
            axes, `("p", "m"): [(20, 2), (60, 3)]`. A list of dicts is their union, along the dim
            `point`.
        seeds: a count n for seeds 0 .. n - 1, or a list of integers.
        store: a path or fsspec URL of a zarr store; in memory without one. Running the same call
            again goes on where the last one stopped.
        root: seed of all random numbers. Those of a cell depend on `root`, its seed and the values
            of its axes, and on nothing else: not on the rest of the grid, blocks or devices.
        static: axes that set shapes or branches; by default integers, strings and truth values.
        whole: axes that the function takes as one array each and returns as leading dims.
        common: axes along which cells share their random numbers, as they do along whole axes.
        output_dims: names of the dims of outputs, where they do not lead with all whole axes.
        memory: bytes that one batch of cells may take; by default 256 MiB on CPU, and a quarter of
            the memory of an accelerator.
        block: cells computed and stored at once; by default what takes about two seconds.
        devices: local devices to shard cells over; by default all.
        client: a Dask client, or the address of a scheduler, to spread blocks over workers. Needs
            a store that all of them see.
        extend: add seeds and values of axes to an existing store, keeping what it holds.
        accept_changes: go on although the function or the package version differs from the
            store's; a note is kept in the attribute `history`.
        progress: called as progress(cells done, cells in all) after every block.

    Returns an `xarray.Dataset`, read lazily if there is a store. Dims are named by the grid, then
    `seed`, then those of the output; coordinates are the values. `finite` is False at cells with
    a NaN or infinity, which are kept and stop nothing. Attributes say how it was made.

    Raises ValueError or TypeError for a grid, function or spec that is not right, `StoreError` for
    a store of something else, ConnectionError for a scheduler that does not answer, and
    OSError for a store that cannot be written: all but a full disk before anything is computed.

    >>> import negmaml as nm
    >>> grid = {"p": [20, 30], "m": 2, "n_t": 10, "n_v": 2, "n_r": 10, "sigma": [0.1, 1.0],
    ...         "nu": 1.0, "train_rate": [-0.3, 0.0, 0.3], "adapt_rate": 0.2}
    >>> result = sweep(nm.sweeps.linear, grid, seeds=5)
    >>> dict(result.test_loss.sizes)
    {'p': 2, 'sigma': 2, 'seed': 5, 'train_rate': 3}
    """
    require("xarray", "sweep")
    work = prepare(function, grid, seeds, root, static, whole, common, output_dims)
    if client is not None and store is None:
        raise ValueError("client needs a store that its workers can write to; pass store=")
    if store is None:
        return _in_memory(work, memory, block, devices, progress)
    store = str(store)
    connected, ours = clusters.connect(client) if client is not None else (None, None)
    try:
        with stores.locked(store):
            return _stored(
                work, store, memory, block, devices, connected, extend, accept_changes, progress
            )
    except KeyboardInterrupt as stop:
        stop.add_note(f"finished blocks are in {store!r}; the same call goes on from there")
        raise
    finally:
        if ours is not None:
            ours.close()


def prepare(
    function, grid, seeds, root=0, static=None, whole=None, common=(), output_dims=None
) -> Work:
    """Check everything that can be checked before computing."""
    if isinstance(root, bool) or not isinstance(root, int) or not 0 <= root < 2**32:
        raise ValueError(f"root must be an integer from 0 to 2^32 - 1, got {root!r}")
    terms = contract(function, static, whole, output_dims)
    parsed = parse_grid(
        grid, seeds, terms.accepts, terms.requires, terms.static, terms.whole, common
    )
    return Work(function, parsed, outputs(terms, parsed), root)


def plan(work: Work, memory=None, block=None, devices=None) -> Plan:
    """What the sweep would do: a dry run. Compiles and times the largest group of shapes."""
    _check_positive("memory", memory)
    _check_positive("block", block)
    return make_plan(work.runner(work.grid.shape, memory, devices), block)


def _check_positive(name: str, value) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def _planned(work: Work, memory, block, devices) -> Runner:
    """A runner that knows its blocks."""
    _check_positive("memory", memory)
    _check_positive("block", block)
    runner = work.runner(work.grid.shape, memory, devices)
    make_plan(runner, block)
    return runner


def _in_memory(work: Work, memory, block, devices, progress):
    import xarray as xr

    started = time.perf_counter()
    grid, runner = work.grid, _planned(work, memory, block, devices)
    results = empty(work.outputs, grid.shape)
    done = 0
    todo = list(regions(grid.shape, runner.block))
    runner.expect(todo)
    for region in todo:
        wanted = np.ones([part.stop - part.start for part in region], bool)
        for name, values in runner.compute(index_of(region, wanted)).items():
            results[name][region] = values.reshape(*wanted.shape, *values.shape[1:])
        done += wanted.size
        if progress:
            progress(done, grid.cells)
    dims = {o.name: (*grid.dims, *o.dims) for o in work.outputs} | {"finite": grid.dims}
    attributes = _attributes(work) | {"wall_seconds": time.perf_counter() - started}
    variables = {name: (dims[name], results[name]) for name in dims}
    return xr.Dataset(variables, stores.coordinates(grid), attributes)


def _attributes(work: Work) -> dict[str, Any]:
    function, grid = fingerprint(work.function), work.manifest()["axes"]
    values = {name: axis["values"] for name, axis in grid.items()}
    plain = {n: [v[0] for v in rows] if "," not in n else rows for n, rows in values.items()}
    seeds = work.grid.seeds
    counted = seeds == tuple(range(len(seeds)))
    return {**provenance(__version__), "function": function, "root": work.root, "grid": str(plain),
            "seeds": f"0 to {len(seeds) - 1}" if counted else str(list(seeds))}  # fmt: skip


def _stored(work, url, memory, block, devices, client, extend, accept_changes, progress):
    started, asked = time.perf_counter(), work.grid
    work, store, runner = _opened(work, url, memory, block, devices, extend, accept_changes)
    done = store.done()
    todo = [r for r in regions(work.grid.shape, store.block) if not done[r].all()]
    before, stored = float(store.group.attrs.get("wall_seconds", 0.0)), int(done.sum())
    if progress:
        progress(stored, work.grid.cells)
    if client is None:
        runner = runner or work.runner(store.block, memory, devices)
        cells = _here(runner, store, todo)
    else:
        job = clusters.Job(
            f"negmaml-{uuid.uuid4().hex[:8]}", work.function, work.grid, work.outputs, work.root,
            store.block, memory, _x64(), store.url,
        )  # fmt: skip
        cells = clusters.spread(client, job, todo)
    try:
        for count in cells:
            stored += count
            if progress:
                progress(stored, work.grid.cells)
    finally:
        with contextlib.suppress(OSError):  # the error of a full disk is told by the block
            store.describe({"wall_seconds": before + time.perf_counter() - started})
    return _labelled(store, asked)


def _opened(
    work: Work, url: str, memory, block, devices, extend: bool, accept_changes: bool
) -> tuple[Work, stores.Store, Runner | None]:
    """The store, made or checked; the work in the order of the store; a runner if one was made."""
    asked, store = work.manifest(), stores.open_store(url)
    if store is None:
        runner = _planned(work, memory, block, devices)
        made = stores.create(url, asked, work.grid, runner.block, _attributes(work))
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
        raise stores.StoreError(f"store {url!r} holds another sweep:\n  {listed}")
    store.repair()
    if changes:
        store.accept(asked, "; ".join(changes))
    work = replace(work, grid=store.extend(asked) if more else store.grid())
    if more:
        store.describe({name: _attributes(work)[name] for name in ("grid", "seeds")})
    return work, store, None


def _labelled(store: stores.Store, asked: Grid):
    """The dataset of a store, lazily, in the order of the grid that was asked for."""
    import xarray as xr

    path = stores.local_path(store.url)
    dataset = xr.open_zarr(str(path or store.url), chunks=None, consolidated=False)
    dataset = dataset.drop_vars("done")
    for old, new in zip(store.grid().axes, asked.axes, strict=True):
        if old.dim and old.values != new.values:
            dataset = dataset.isel({old.dim: [old.values.index(v) for v in new.values]})
    if (stored := store.grid().seeds) != asked.seeds:
        dataset = dataset.isel(seed=[stored.index(seed) for seed in asked.seeds])
    return dataset


def _x64() -> bool:
    return jnp.result_type(float) == jnp.float64


def _here(runner: Runner, store: stores.Store, todo):
    """Compute and store blocks in this process; yields the cells of each.

    A block is written while the next one is computed, so a kill loses two at most.
    """
    runner.expect(todo)
    with ThreadPoolExecutor(1) as writer:
        pending: list[tuple[int, Future]] = []
        for region in todo:
            wanted = ~store.done(region)
            values = runner.compute(index_of(region, wanted))
            yield from _finished(pending)
            pending = [(int(wanted.sum()), writer.submit(store.write, region, wanted, values))]
        yield from _finished(pending)


def _finished(pending):
    """Wait for a write; an error of it is raised here."""
    for count, written in pending:
        written.result()
        yield count
