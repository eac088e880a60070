"""Planning before anything is computed: a validated sweep, and its blocks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp

from negmaml._core.checks import check_count, check_optional
from negmaml._core.deprecation import renamed_arguments
from negmaml._core.provenance import provenance
from negmaml._core.settings import own_transfers
from negmaml._core.version import __version__
from negmaml.sweeps.functions import Output, Plain, SweepFunction, outputs, roles
from negmaml.sweeps.grid import Axis, Region, SweepGrid
from negmaml.sweeps.layout import ROUND
from negmaml.sweeps.manifest import Manifest
from negmaml.sweeps.names import check_outputs, check_portable
from negmaml.sweeps.parse import name_tuple, parse_grid, parse_seeds
from negmaml.sweeps.reduce import STATISTICS, Reduction, moment_outputs, parse_reduce, reduction_of
from negmaml.sweeps.runner import Runner, block_memory

# A kill loses at most three blocks, and a block is a file for every array: short sweeps have small
# blocks, and long sweeps few of them.
BLOCK_SECONDS, MAX_BLOCK_SECONDS = 2.0, 60.0
BLOCKS = 128  # of a long sweep
BLOCKS_PER_WORKER = 16  # so that all workers end at about the same time
MAX_BLOCK_BYTES = 2**28  # of a merged store
OWN_BYTES = 16  # bytes of a cell for its position


@dataclass(frozen=True)
class ValidatedSweep:
    """A sweep whose arguments have all been checked.

    declared: outputs whose dims the function or the caller names. reduction: the chunks of seeds,
    if the outputs are moments over them. statistics: those that the caller asked for.
    """

    function: SweepFunction
    grid: SweepGrid
    outputs: tuple[Output, ...]
    root_seed: int
    declared: frozenset[str]
    reduction: Reduction | None = None
    statistics: tuple[str, ...] = ()

    def manifest(self) -> Manifest:
        """The manifest of its store, still without programs and blocks."""
        name = name_of(self.function)
        return Manifest(
            name, __version__, self.root_seed, x64(), self.grid, self.outputs, {}, {},
            reduction=self.reduction,
        )  # fmt: skip

    def check_portable(self) -> None:
        """Raise for names that cannot be those of arrays of a store on every system."""
        axes = (*self.grid.axes, *self.grid.vectorized)
        check_portable([n for a in axes for n in a.names] + [o.name for o in self.outputs])

    def runner(self, block: Sequence[int], memory: int | None, devices) -> Runner:
        """A runner that computes it on local devices."""
        return Runner(
            self.function, self.grid, self.outputs, self.root_seed, block, memory, devices,
            self.reduction,
        )  # fmt: skip

    def attributes(self) -> dict[str, Any]:
        """The attributes of its dataset, which record how it was made."""
        name = {"function": name_of(self.function), "root_seed": self.root_seed}
        return provenance() | name | describe(self)


def describe(sweep: "ValidatedSweep | Manifest") -> dict[str, str]:
    """The points and seeds of a sweep as attributes of a dataset."""
    grid, reduction = sweep.grid, sweep.reduction
    seeds = grid.seeds if reduction is None else reduction.seeds
    axes = {",".join(axis.names): _plain(axis) for axis in (*grid.axes, *grid.vectorized)}
    # As text, because attributes of netCDF files cannot hold tables.
    return {"grid": str(axes), "seeds": _seeds_text(seeds)}


def _seeds_text(seeds: range | tuple[int, ...]) -> str:
    """The seeds as text, whose length does not grow with that of a range."""
    if not isinstance(seeds, range) or (len(seeds) < 3 and seeds[0]):
        return str(list(seeds))
    step = "" if seeds.step == 1 else f" in steps of {seeds.step}"
    return f"{seeds[0]} to {seeds[-1]}{step}"


def _plain(axis: Axis) -> list:
    return [row[0] if len(axis.names) == 1 else list(row) for row in axis.values]


@renamed_arguments(root="root_seed", whole="vectorized", common="common_random_numbers")
def prepare(
    function,
    grid,
    seeds,
    *,
    root_seed=0,
    static=None,
    vectorized=None,
    common_random_numbers=(),
    output_dims=None,
    reduce=None,
) -> ValidatedSweep:
    """Check the arguments of `nm.sweep`, as far as that needs no computing.

    Arguments are those of `nm.sweep`. Returns the parsed sweep, with `grid` and `outputs`. Raises
    the errors of `nm.sweep` for invalid arguments.

    >>> import negmaml as nm
    >>> found = nm.sweeps.prepare(lambda key, x: {"y": x}, {"x": [1.0, 2.0]}, 5)
    >>> found.grid.cells, [output.name for output in found.outputs]
    (10, ['y'])
    >>> try:
    ...     nm.sweeps.prepare(lambda key, x: {"y": x}, {"x": [1.0, 1.0]}, 5)
    ... except ValueError as error:
    ...     print(error)
    axis 'x' must be distinct, got 1.0 twice
    """
    if (
        isinstance(root_seed, bool)
        or not isinstance(root_seed, Integral)
        or not 0 <= int(root_seed) < 2**32
    ):
        raise ValueError(f"root_seed must be an integer from 0 to 2^32 - 1, got {root_seed!r}")
    said = roles(function, static, vectorized, output_dims)
    names, reduction = parse_reduce(reduce), None
    if names:
        reduction = reduction_of(parse_seeds(seeds))
        seeds = reduction.firsts
    parsed = parse_grid(
        grid, seeds, said.function.accepts, said.function.requires, said.static, said.vectorized,
        name_tuple("common_random_numbers", common_random_numbers),
    )  # fmt: skip
    found, declared = outputs(said, parsed), frozenset(said.output_dims)
    if reduction is not None:
        # Outputs are named by moments in a store, and by statistics in the result.
        statistic_dims = {
            f"{o.name}_{statistic}": dict(zip(o.dims, o.shape, strict=True))
            for o in found
            for statistic in STATISTICS
        }
        found = moment_outputs(found)
        check_outputs({o.name: dict(zip(o.dims, o.shape, strict=True)) for o in found}, parsed)
        check_outputs(statistic_dims, parsed)
    return ValidatedSweep(said.function, parsed, found, int(root_seed), declared, reduction, names)


def x64() -> bool:
    """True if numbers are float64 here."""
    return jnp.result_type(float) == jnp.float64


@dataclass(frozen=True)
class Plan:
    """The plan of a sweep from a dry run; prints as a table.

    Attributes:
        grid, outputs: cells with their dims, and the stored arrays.
        block: cells of a block along each dim; a block is a chunk of the store.
        groups: number of combinations of static values; each is one program.
        batch, batch_bytes: cells and memory of one call of the largest program.
        seconds_per_cell: time of a cell of the largest group, once compiled.
        compile_seconds: estimate for all programs, if each costs as much as the largest.
        reduction: the chunks of seeds of a sweep that reduces over them; a chunk counts as a cell.
    """

    grid: SweepGrid
    outputs: tuple[Output, ...]
    block: tuple[int, ...]
    groups: int
    batch: int
    batch_bytes: int
    seconds_per_cell: float
    compile_seconds: float
    reduction: Reduction | None = None

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return math.prod(-(-n // k) for n, k in zip(self.grid.shape, self.block, strict=True))

    @property
    def nbytes(self) -> int:
        """Bytes of the result, uncompressed."""
        return self.grid.cells * sum(output.nbytes for output in self.outputs)

    @property
    def seconds(self) -> float:
        """Estimated time to compute everything, if every group costs as much as the largest."""
        return self.grid.cells * self.seconds_per_cell

    def rows(self) -> dict[str, str]:
        """The plan as (name, text)."""
        sizes = dict(zip(self.grid.dims, self.grid.shape, strict=True))
        dims = " x ".join(f"{dim} {size}" for dim, size in sizes.items())
        block = " x ".join(f"{d} {n}" for d, n in zip(sizes, self.block, strict=True))
        found = {
            **self._seed_rows(),
            "cells": f"{self.grid.cells:,} ({dims})",
            "shape groups": f"{self.groups:,}, a program each",
            "blocks": f"{self.blocks:,} of up to {math.prod(self.block):,} cells ({block})",
            "batch": f"{self.batch:,} cells, {self.batch_bytes / 2**20:.1f} MiB",
        }
        for output in self.outputs:
            own = "".join(f" x {d} {n}" for d, n in zip(output.dims, output.shape, strict=True))
            found[f"result {output.name}"] = f"{output.dtype}, cells{own}"
        return found | {
            "bytes": f"{self.nbytes / 2**20:.1f} MiB",
            "compiling": f"about {self.compile_seconds:.1f} s",
            "estimated time": f"at most {self.seconds:.1f} s, and compiling",
        }

    def record(self) -> dict[str, Any]:
        """The plan in plain numbers and texts."""
        return {
            "cells": self.grid.cells,
            "sizes": dict(zip(self.grid.dims, self.grid.shape, strict=True)),
            "shape_groups": self.groups,
            "blocks": self.blocks,
            "cells_of_a_block": math.prod(self.block),
            "cells_of_a_batch": self.batch,
            "bytes_of_a_batch": self.batch_bytes,
            "bytes": self.nbytes,
            "compile_seconds": self.compile_seconds,
            "seconds": self.seconds,
            "outputs": {
                output.name: {"dtype": str(output.dtype), "sizes": dict(
                    zip(output.dims, output.shape, strict=True))}
                for output in self.outputs
            },
        }  # fmt: skip

    def _seed_rows(self) -> dict[str, str]:
        if self.reduction is None:
            return {}
        chunks, seeds = len(self.reduction.counts), len(self.reduction.seeds)
        text = f"{seeds:,} of each point, reduced in {chunks} chunks; a chunk is a cell below"
        return {"seeds": text}

    def __repr__(self) -> str:
        rows = self.rows()
        width = 2 + max(map(len, rows))
        return "\n".join(f"{name:<{width}}{value}" for name, value in rows.items())


@renamed_arguments(root="root_seed", whole="vectorized", common="common_random_numbers")
@own_transfers
def plan(
    function, grid, seeds, *, root_seed=0, static=None, vectorized=None,
    common_random_numbers=(), output_dims=None,
    reduce=None, memory=None, block=None, devices=None,
) -> Plan:  # fmt: skip
    """Plan what `nm.sweep` with the same arguments would do (a dry run).

    Checks the arguments, compiles the program of the largest group of static values, and times one
    batch. Nothing is stored. Raises the errors of `nm.sweep` for invalid arguments.

    >>> found = plan(lambda key, x: {"y": x * jax.random.normal(key, (3,))}, {"x": [1.0, 2.0]}, 5)
    >>> found.blocks, found.nbytes, found.groups
    (1, 120, 1)
    >>> print(found)  # doctest: +ELLIPSIS
    cells           10 (x 2 x seed 5)
    shape groups    1, a program each
    blocks          1 of up to 10 cells (x 2 x seed 5)
    ...
    """
    sweep = prepare(
        function, grid, seeds, root_seed=root_seed, static=static, vectorized=vectorized,
        common_random_numbers=common_random_numbers, output_dims=output_dims, reduce=reduce,
    )  # fmt: skip
    return planned(sweep, memory, block, devices)[0]


def planned(sweep: ValidatedSweep, memory, cells, devices, workers: int = 1) -> tuple[Plan, Runner]:
    """The plan of a sweep, and a runner with its blocks: of 2 to 60 seconds, or of `cells`.

    A probe runs the group of the largest sizes.
    """
    check_execution(memory, cells, devices)
    # The whole grid is the first block: the probe has to show how much fits into one.
    runner = sweep.runner(sweep.grid.shape, memory, devices)
    groups = runner.compiler.groups
    # The largest sizes need the most memory and time.
    group = max(range(len(groups)), key=lambda g: _size(groups[g]))
    # Memory limits the block first; the probe then limits its time.
    if cells is None:
        # A block is held in memory while the next one is computed.
        of_cell = OWN_BYTES + sum(output.nbytes for output in runner.outputs)
        in_memory = block_memory(runner.devices[0], runner.memory) // of_cell
        runner.block = chunk_shape(runner.grid.shape, max(1, in_memory))
    else:
        runner.block = chunk_shape(runner.grid.shape, max(1, cells // runner.compiler.longest))
    seconds = runner.probe(group)
    if cells is None:
        even = seconds * runner.grid.cells / max(BLOCKS, BLOCKS_PER_WORKER * workers)
        limit = min(max(BLOCK_SECONDS, even), MAX_BLOCK_SECONDS) / seconds
        if math.prod(runner.block) > limit:
            runner.block = chunk_shape(runner.grid.shape, max(1, int(limit)))
    program = runner.compiler.program(group)
    found = Plan(
        runner.grid, runner.outputs, runner.block, len(groups), program.batch, program.nbytes,
        seconds, runner.compiler.seconds(group), sweep.reduction,
    )  # fmt: skip
    return found, runner


def check_execution(memory, block, devices) -> None:
    """Raise for an invalid number of bytes or cells, or for devices of another machine."""
    check_optional(check_count, "memory", memory)
    check_optional(check_count, "block", block)
    local = jax.local_devices()
    if devices is None:
        return
    if not isinstance(devices, Sequence) or not devices or any(d not in local for d in devices):
        raise ValueError(f"devices must be a list of some of {local}, got {devices!r}")


def chunk_shape(shape: Sequence[int], cells: int) -> tuple[int, ...]:
    """The shape of a block of about `cells` cells: all seeds first, then the last axes."""
    # Seeds are the last dim, so blocks take all seeds of few points: few programs a block.
    block, left = [], max(1, cells)
    for size in reversed(shape):
        chunk = min(size, left)
        even = math.ceil(size / math.ceil(size / chunk))  # chunks of even size
        # A round size can be divided into the inner chunks of a shard.
        block.append(even if even < 16 * ROUND else math.ceil(even / ROUND) * ROUND)
        left //= block[-1]
        left = max(1, left)
    return tuple(reversed(block))


def regions(grid: SweepGrid, block: Sequence[int]) -> list[Region]:
    """Every block as slices over the dims of the grid, sorted by group."""
    starts = (range(0, size, chunk) for size, chunk in zip(grid.shape, block, strict=True))
    found = [
        tuple(
            slice(start, min(start + chunk, size))
            for start, chunk, size in zip(corner, block, grid.shape, strict=True)
        )
        for corner in product(*starts)
    ]
    return sorted_by_group(grid, found)


def sorted_by_group(grid: SweepGrid, blocks: Sequence[Region]) -> list[Region]:
    """Blocks in the order of their groups, so that a program is compiled once for all of them."""
    return sorted(blocks, key=grid.region_groups)


def _size(group: dict) -> float:
    return math.prod(float(v) for v in group.values() if isinstance(v, int))


def name_of(function) -> str:
    """The qualified name of a function."""
    if isinstance(function, Plain):
        return name_of(function.function)
    if isinstance(function, partial):
        return f"partial of {name_of(function.func)}"
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"
