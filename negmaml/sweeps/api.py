"""`nm.sweep`: from a function and a grid to one labelled dataset."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from negmaml._core.deprecation import renamed_arguments
from negmaml._core.extras import require
from negmaml._core.fingerprint import check_code_version
from negmaml._core.platform import is_tracing
from negmaml._core.settings import own_transfers
from negmaml.sweeps.cluster import EXPECTED_WORKERS, connected
from negmaml.sweeps.layout import coordinates
from negmaml.sweeps.members import parse_worker
from negmaml.sweeps.planning import (
    ValidatedSweep,
    check_execution,
    planned,
    prepare,
    regions,
)
from negmaml.sweeps.progress import ProgressCallback, progress_reporter
from negmaml.sweeps.reduce import statistics_of
from negmaml.sweeps.runner import empty
from negmaml.sweeps.session import ExecutionOptions, StorePolicy, read_finished
from negmaml.sweeps.storage import Address, check_url, check_writable
from negmaml.sweeps.worker import run_exclusive, run_shared

if TYPE_CHECKING:
    import xarray


@renamed_arguments(
    root="root_seed", whole="vectorized", common="common_random_numbers", part="worker",
    accept_changes="allow_code_change", version="code_version",
)  # fmt: skip
@own_transfers
def sweep(
    function: Callable[..., Mapping[str, Any]],
    grid: Mapping[Any, Any] | Sequence[Mapping[Any, Any]],
    seeds: int | Iterable[int],
    store: str | os.PathLike[str] | None = None,
    *,
    root_seed: int = 0,
    static: Sequence[str] | None = None,
    vectorized: Sequence[str] | None = None,
    common_random_numbers: Sequence[str] = (),
    output_dims: Mapping[str, Sequence[str]] | None = None,
    reduce: Mapping[str, Sequence[str]] | None = None,
    memory: int | None = None,
    block: int | None = None,
    devices: Sequence[Any] | None = None,
    client: Any = None,
    worker: tuple[int, int] | str | None = None,
    extend: bool = False,
    allow_code_change: bool = False,
    code_version: str | None = None,
    progress: bool | ProgressCallback = False,
) -> "xarray.Dataset":
    """Evaluate `function(key, **point)` at every point of a grid and every seed.

    Arguments:
        function: any JAX function that returns a dict of arrays; `nm.sweeps.linear` is the linear
            model.
        grid: a dict of axes, `name: values`. A single value is a constant. A tuple of names zips
            axes, `("p", "m"): [(20, 2), (60, 3)]`. `"point": [{"a": 1, "b": 0.5}, ...]` lists
            points, as `nm.sweeps.random_points` draws them. A list of dicts is their union, along
            the dim `point`.
        seeds: a count n for seeds 0 .. n - 1, or a list or range of integers from 0 to 2^32 - 1. A
            count or range has at most 10^9 of them, a list 10^7.
        store: a path, which may begin with `~`, or an fsspec URL of a zarr store; without it the
            result is kept in memory. Running the same call again resumes it. All spellings of a
            path are one store. A finished store can be read from a read-only disk.
        root_seed: seed of all random numbers. The random numbers of a cell depend on `root_seed`,
            on its seed and on the values of its axes, and on nothing else: not on the rest of the
            grid, blocks or devices.
        static: axes that set shapes or branches; by default those of integers, strings and truth
            values.
        vectorized: axes that the function takes as one array each and returns as leading dims. Its
            outputs at one value must not depend on the other values.
        common_random_numbers: axes along which cells share their random numbers. Cells along
            vectorized axes always do.
        output_dims: names of the dims of outputs, if they do not lead with all vectorized axes.
        reduce: {"seed": ["mean", "sem", ...]} returns statistics over the seeds in place of single
            cells, each as a variable such as `test_loss_mean`: some of mean, var, std, sem, count,
            min and max. Devices accumulate them, so memory and store do not grow with the seeds.
        memory: bytes that one batch of cells may take; by default 256 MiB on CPU, and a quarter of
            the memory of an accelerator.
        block: cells computed and stored at once; by default 2 to 60 seconds of work, so that a
            long sweep has few files.
        devices: local devices to shard cells over; by default all.
        client: a Dask client, or the address of a scheduler, whose workers compute the blocks.
            Needs a store that all of them can access.
        worker: (k, n) in the k-th of n processes, on any machines, that make the same call to
            share one store; or "slurm" in an array job. Each process claims blocks and computes
            them, takes over blocks of processes that died, and returns when all blocks are
            complete. n is only a hint: workers may join or leave at any time.
        extend: add seeds and values of axes to an existing store and keep its contents. Readers
            see the old store until the extension is in place.
        allow_code_change: resume even if the function computes something else than when the store
            was written; the change is noted in the attribute `history`.
        code_version: a label that identifies what the function computes. Functions that call back
            to Python need it, because JAX cannot see changes in them. Change it with the function.
        progress: True shows a bar on a terminal, or lines in a log; a function is called as
            progress(cells completed, cells in all) after every block.

    Statistics over seeds (`reduce`) are those of the finite values at each position. `count` is the
    number of these, and `finite` is False at points where any value is not finite. Without a finite
    value a statistic is NaN. `var` divides by count - 1, and `sem` is std / sqrt(count). Integers
    and truth values count as floats. The order of all sums follows from the seeds, so that blocks,
    batches, devices and workers change at most the last digit. A store holds the moments of chunks
    of seeds, in which progress is counted: it serves all statistics, takes more seeds with
    `extend`, and can be merged. Quantiles need every value and raise ValueError.

    If a store holds more than this call asks for, the result is the part that was asked for.

    Returns an `xarray.Dataset`, which is read lazily if there is a store and no `reduce`. Dims are
    named by the grid, then `seed`, then those of the output; coordinates are the values. `finite`
    is False at cells with a NaN or infinity, which are kept. Attributes record how the dataset was
    made. Outputs that have no NumPy dtype get the smallest one that holds all their values: float32
    for bfloat16 and float8, int8 and uint8 for integers of fewer bits.

    Axes, outputs and their dims share one namespace. Values of an axis must differ in JAX's current
    dtype: float32, or float64 with 64 bits enabled.

    A store identifies its function by the program that JAX traces from it, including constants,
    globals and attributes, but not names. It also records the settings of JAX that change results:
    matmul precision, random number generator, seed offset, x64 and the like; settings that it does
    not record had their defaults. Neither may change while a sweep runs.

    Raises ValueError or TypeError for an invalid grid, function or spec, for names that clash, and
    for values that are equal after rounding; `StoreError` for a store of another sweep;
    ConnectionError if the scheduler does not answer; and OSError for a store that cannot be
    written. All errors but a full disk are raised before anything is computed.

    >>> import negmaml as nm
    >>> grid = {"p": [20, 30], "m": 2, "n_t": 10, "n_v": 2, "n_r": 10, "sigma": [0.1, 1.0],
    ...         "nu": 1.0, "train_rate": [-0.3, 0.0, 0.3], "adapt_rate": 0.2}
    >>> result = sweep(nm.sweeps.linear, grid, seeds=5)
    >>> dict(result.test_loss.sizes)
    {'p': 2, 'sigma': 2, 'seed': 5, 'train_rate': 3}
    """
    # Everything that can be checked is checked before anything is computed or stored.
    require("xarray", "sweep")
    url = _check_options(store, client, worker, extend, allow_code_change)
    index = None if worker is None else parse_worker(worker)
    check_code_version(code_version)
    check_execution(memory, block, devices)
    prepared = prepare(
        function, grid, seeds, root_seed=root_seed, static=static, vectorized=vectorized,
        common_random_numbers=common_random_numbers, output_dims=output_dims, reduce=reduce,
    )  # fmt: skip
    # Opened first: if the bar needs a missing package, nothing has been computed yet.
    with progress_reporter(progress) as report:
        if url is None:
            return _in_memory(prepared, memory, block, devices, report)
        policy = StorePolicy(extend, allow_code_change, code_version)
        try:
            # A finished store on a read-only disk is still readable.
            check_writable(url)
        except OSError:
            if (found := read_finished(prepared, url, policy)) is None:
                raise
            return found
        # Connected after all checks: a scheduler that does not answer takes seconds to find out.
        with connected(client) as workers, _add_resume_hint(url):
            count = EXPECTED_WORKERS if workers is not None else index[1] if index else 1
            options = ExecutionOptions(memory, block, devices, workers, report, count)
            if index is not None:
                return run_shared(prepared, url, index, options, policy)
            return run_exclusive(prepared, url, options, policy)


def _check_options(store, client, worker, extend, allow_code_change) -> Address | None:
    """The address of the store; raises unless the options about it are valid and go together."""
    # Under jit this would store tracers, or run once and then never again.
    if is_tracing():
        raise TypeError(
            "sweep computes and stores when it is called; call it outside of jit, and put what "
            "should be compiled into its function, which always is"
        )
    # A string such as "no" counts as true, so only a bool is accepted.
    for name, value in (("extend", extend), ("allow_code_change", allow_code_change)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
        if value and store is None:
            raise ValueError(f"{name}=True is about a store that is there; pass store=")
    url = None if store is None else check_url(store)
    if worker is not None:
        if store is None:
            raise ValueError("worker is for a sweep that processes share in a store; pass store=")
        if client is not None:
            raise ValueError(
                "pass either worker or client, not both: each is a way to share a sweep"
            )
    if client is not None:
        if store is None:
            raise ValueError("client needs a store that its workers can write to; pass store=")
        # Tested by its method, since `distributed` is optional and may not be installed.
        if not isinstance(client, str) and not hasattr(client, "submit"):
            raise TypeError(
                "client must be a distributed.Client, or the address of a scheduler such as "
                f"'tcp://localhost:8786', got {client!r}"
            )
    return url


@contextmanager
def _add_resume_hint(store: str) -> Iterator[None]:
    """Add a note to an interrupt that says how to resume."""
    try:
        yield
    # A note instead of another exception: the caller still catches a KeyboardInterrupt.
    except KeyboardInterrupt as stop:
        stop.add_note(f"finished blocks are in {store!r}; the same call resumes")
        raise


def _in_memory(sweep: ValidatedSweep, memory, block, devices, report: ProgressCallback):
    import xarray as xr

    started = time.perf_counter()
    grid, (_, runner) = sweep.grid, planned(sweep, memory, block, devices)
    results = empty(sweep.outputs, grid.shape)
    completed = 0
    todo = regions(grid, runner.block)
    runner.expect(todo)
    # Blocks bound the memory of a batch here, too; results are complete arrays.
    blocks = ((r, np.ones([part.stop - part.start for part in r], bool)) for r in todo)
    for (region, wanted), found in runner.compute(blocks):
        # The runner returns cells as rows; here they get their dims back.
        for name, values in found.items():
            results[name][region] = values.reshape(*wanted.shape, *values.shape[1:])
        completed += wanted.size
        report(completed, grid.cells)
    dims = {o.name: (*grid.dims, *o.dims) for o in sweep.outputs} | {"finite": grid.dims}
    attributes = sweep.attributes() | {"wall_seconds": time.perf_counter() - started}
    # `finite` has only the dims of the cells.
    variables = {name: (dims[name], results[name]) for name in dims}
    dataset = xr.Dataset(variables, coordinates(grid), attributes)
    return statistics_of(dataset, sweep, sweep.statistics)
