"""The compiled programs of a sweep, one for each group of static values."""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from negmaml._core.platform import lowered_for
from negmaml._core.settings import other_settings, result_settings
from negmaml.sweeps.cells import cells_at, fold, seeds_at, tables_of
from negmaml.sweeps.functions import SweepFunction
from negmaml.sweeps.grid import SweepGrid
from negmaml.sweeps.reduce import TILE, Reduction, chunk_moments

KEPT = 32  # programs of about 3 MiB each; blocks are sorted by group, so few are needed at once


class Program:
    """A compiled program over `batch` cells, called as `program(positions, region)`.

    positions: those of the cells in the region, int32. region: its corner and its shape.
    """

    def __init__(self, executable, batch: int, constants: tuple, places: tuple):
        self.executable, self.batch = executable, batch
        self.constants, self.places = constants, places

    def __call__(self, positions: np.ndarray, region: np.ndarray, constants=None):
        # An executable does not move its arguments: they have to lie where it expects them.
        given = jax.device_put((positions, region), self.places)
        return self.executable(*given, *(constants or self.constants))

    @property
    def nbytes(self) -> int:
        """Bytes that one call holds: arguments, results and temporaries."""
        sizes = self.executable.memory_analysis()
        if sizes is None:
            return 0
        return sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes


class Compiler:
    """Compiles the programs of the groups of a grid, the next ones while one runs.

    block: the shape of blocks over the dims of the grid. Batches are as large as `memory` and the
    block allow.
    """

    def __init__(
        self, function: SweepFunction, grid: SweepGrid, reduction: Reduction | None, root_seed: int,
        block, memory: int, devices: list,
    ):  # fmt: skip
        self.function, self.grid, self.block = function, grid, block
        self.reduction = reduction
        self.longest = 1 if reduction is None else int(reduction.counts.max())
        self.memory, self.devices = memory, devices
        self.mesh = Mesh(np.array(devices), ("cells",))
        # Tables of the axes stay on the devices, so that a call moves only positions.
        vectorized = grid.vectorized_values()
        number = jnp.result_type(float)
        tables = tables_of(grid, root_seed, reduction)
        held = tables, {n: np.asarray(v, number) for n, v in vectorized.items()}
        self.constants = jax.device_put(held, self._place(PartitionSpec()))
        self.correction = 1.0  # measured over estimated memory
        self.groups = grid.groups()
        self.ready: dict[int, Program] = {}
        self.started: dict[int, tuple[int, Future]] = {}
        self.upcoming: Iterator[int] = iter(())
        # XLA compiles without Python's global lock, so threads do compile in parallel.
        self.at_once = max(2, min(8, os.cpu_count() or 1))
        self.pool = ThreadPoolExecutor(self.at_once)
        self.limits: dict[int, int | None] = {}  # cells of a group that are evaluated at once
        self.took: dict[int, list[float]] = {}  # seconds to trace and to compile a group
        self.check: Callable[[Mapping[str, Any]], None] = lambda group: (
            None
        )  # compares with the record
        self.settings = result_settings()

    def expect(self, groups: Iterable[int]) -> None:
        """Announce the order of groups: the next ones compile while one runs."""
        self.upcoming = iter(groups)

    def program(self, group: int) -> Program:
        """The program of a group; the most recent ones are kept."""
        if group not in self.ready:
            self._start(group)
            unseen = (g for g in self.upcoming if g not in self.ready and g not in self.started)
            for other in islice(unseen, max(0, self.at_once + 1 - len(self.started))):
                self._start(other)
            batch, executable = self.started.pop(group)
            self.ready[group] = self._fitting(group, batch, executable.result())
            # Oldest first: dicts keep the order of insertion.
            if len(self.ready) > KEPT:
                del self.ready[next(iter(self.ready))]
        return self.ready[group]

    def forget(self) -> None:
        """Discard all programs, because the block or the estimate of memory has changed."""
        self.ready.clear()
        self.started.clear()

    def first_tile(self) -> tuple[tuple, int]:
        """The constants with chunks of one tile at most, and the number of tiles of a chunk."""
        tables, vectorized = self.constants
        if "counts" in tables:
            tables = tables | {"counts": jnp.minimum(tables["counts"], TILE)}
        return (tables, vectorized), -(-self.longest // TILE)

    def seconds(self, group: int) -> float:
        """Estimated time to compile all groups, from that of this compiled one."""
        trace, compilation = self.took[group]
        return len(self.groups) * (trace + compilation / min(self.at_once, len(self.groups)))

    def _start(self, group: int) -> None:
        if group not in self.started:
            batch = self._even(self._first_guess(group))
            start = time.perf_counter()
            lowered = self._traced(
                group, batch
            ).lower()  # here, since settings of JAX may be local to a thread
            self.took[group] = [time.perf_counter() - start]
            self._check(group)
            compiled = self.pool.submit(self._compiled, group, lowered, self._options(group))
            self.started[group] = batch, compiled

    def _check(self, group: int) -> None:
        """Raise if settings or the program changed since the sweep began."""
        if changed := other_settings(self.settings, result_settings()):
            raise ValueError(
                "settings of JAX must stay as they are while a sweep runs; "
                f"{'; '.join(changed)}; undo the change, and sweep again"
            )
        self.check(self.groups[group])

    def _compiled(self, group: int, lowered, options):
        start = time.perf_counter()
        executable = lowered.compile(options)
        self.took[group].append(time.perf_counter() - start)
        return executable

    def _fitting(self, group: int, batch: int, executable) -> Program:
        """This program, or one of a smaller batch that fits into the memory."""
        while True:
            places = self._place(PartitionSpec("cells")), self._place(PartitionSpec())
            program = Program(executable, batch, self.constants, places)
            used = program.nbytes * self.correction
            if used <= self.memory or batch <= len(self.devices):
                return program
            # Memory is nearly proportional to the batch; aim a little below the limit.
            batch = self._even(min(batch - 1, int(0.9 * batch * self.memory / used)))
            executable = self._traced(group, batch).lower().compile(self._options(group))

    def _even(self, limit: int) -> int:
        """A batch of at most `limit` cells that divides a block evenly, in multiples of devices."""
        cells, quantum = self.grid.group_cells(self.block), len(self.devices)
        # Even batches waste no cells on padding in the last one.
        batches = math.ceil(cells / (max(1, limit // quantum) * quantum))
        return math.ceil(cells / batches / quantum) * quantum

    def _first_guess(self, group: int) -> int:
        """Cells that should fit into memory: as the function says, or from all intermediates."""
        devices, tile = len(self.devices), min(TILE, self.longest)
        fit = self.function.batch_cells(**self.groups[group])
        if fit is None:
            program = self._traced(group, devices).jaxpr
            each = _intermediate_bytes(program.jaxpr) / tile / devices
            fit = int(self.memory / max(1, each))
        # A reduced sweep computes a tile of every cell at once, or parts of it if memory is small.
        self.limits[group] = max(1, fit) if fit < tile else None
        return max(1, fit // tile) * devices

    def _options(self, group: int) -> dict[str, Any] | None:
        cells = self.grid.group_cells(self.grid.shape) * self.longest
        platform = self.devices[0].platform
        return self.function.compiler_options(platform, cells, **self.groups[group])

    def _traced(self, group: int, batch: int):
        """The jitted program of a batch of cells, traced."""
        grid, reduction = self.grid, self.reduction

        def cells(positions, region, tables, vectorized):
            points, at, numbers = cells_at(grid, tables, positions, region)
            if reduction is None:
                seeds = seeds_at(grid.seeds, tables, at)
                out = self._evaluate(group, points, seeds, numbers, vectorized)
                return {**out, "finite": _finite(out, positions.shape)}

            def evaluate(j):
                # Every seed of the tile with every chunk, as cells one after the other.
                first = tables["starts"][at][:, None]
                seeds = seeds_at(reduction.seeds, tables, first + j.astype(jnp.uint32)[None])
                each = jax.tree.map(lambda x: jnp.repeat(x, len(j), 0), (points, numbers))
                out = self._evaluate(group, each[0], seeds.ravel(), each[1], vectorized)
                return jax.tree.map(lambda x: x.reshape(*seeds.shape, *x.shape[1:]), out)

            return chunk_moments(evaluate, tables["counts"][at], self.longest)

        if len(self.devices) > 1:
            # Cells are independent, so each device gets its share of positions.
            over, all_ = PartitionSpec("cells"), PartitionSpec()
            specs = (over, all_, all_, all_)
            # `check_vma` is off: no output is replicated, and operations of users may have no rule
            # for it.
            cells = jax.shard_map(
                cells, mesh=self.mesh, in_specs=specs, out_specs=over, check_vma=False
            )
        given = (batch,), (2, len(grid.dims))
        shapes = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in given]
        with lowered_for(self.devices[0].platform):
            return jax.jit(cells).trace(*shapes, *self.constants)

    def _evaluate(self, group: int, points, seeds, numbers, vectorized) -> dict[str, jax.Array]:
        """The outputs of cells, from the keys of their points and their seeds."""
        shared = {**self.groups[group], **vectorized}
        # Without the barrier, XLA may derive a key again for each of its uses.
        # JAX's check of the reuse of keys knows no barrier of keys, hence one of their words.
        keys = fold(points, seeds)
        words, numbers = lax.optimization_barrier((jax.random.key_data(keys), numbers))
        cells = jax.random.wrap_key_data(words, impl=jax.random.key_impl(keys)), numbers
        count, limit = len(seeds), self.limits.get(group)
        if limit is None or limit >= count:
            return self.function.batched(cells[0], cells[1], shared)
        # The last part repeats cells, so that all have one shape.
        parts = jnp.arange(-(-count // limit) * limit).reshape(-1, limit) % count

        def part(at):
            keys, numbers = jax.tree.map(lambda x: x[at], cells)
            return self.function.batched(keys, numbers, shared)

        out = lax.map(part, parts)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], out)

    def _place(self, spec: PartitionSpec):
        """Where an argument lies."""
        if len(self.devices) == 1:
            return SingleDeviceSharding(self.devices[0])
        return NamedSharding(self.mesh, spec)


def _finite(out, shape):
    """True for the cells whose floating outputs are all finite."""
    flag = jnp.ones(shape, bool)
    for values in out.values():
        if jnp.issubdtype(values.dtype, jnp.inexact):
            flag &= jnp.all(jnp.isfinite(values), range(1, values.ndim))
    return flag


def _intermediate_bytes(jaxpr) -> int:
    """Bytes of every array that the program computes, as if none were freed or fused."""
    # An upper bound: it counts every intermediate, also those that XLA fuses or frees.
    total = 0
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            shape, dtype = variable.aval.shape, variable.aval.dtype
            total += math.prod(shape) * getattr(dtype, "itemsize", 8)
        for parameter in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                total += _intermediate_bytes(inner)
    return total
