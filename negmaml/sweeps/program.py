"""Compiled programs: one for each group of static values, made while others run."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from negmaml.sweeps.grid import Grid

KEPT = 32  # programs of some 3 MiB each; blocks come group by group


class Program:
    """A compiled program over `batch` cells: `program(keys, numbers, whole)`, all in NumPy."""

    def __init__(self, executable, batch: int, devices: list):
        self.executable, self.batch, self.devices = executable, batch, devices

    def __call__(self, keys, numbers: Mapping[str, np.ndarray], whole: Mapping[str, np.ndarray]):
        dtype = jnp.result_type(float)
        numbers, whole = jax.tree.map(lambda x: np.asarray(x, dtype), (numbers, whole))
        one = len(self.devices) == 1
        place = self.devices[0] if one else self.executable.input_shardings[0]
        return self.executable(*jax.device_put((keys, numbers, whole), place))

    @property
    def nbytes(self) -> int:
        """Bytes that one call holds: arguments, results and temporaries."""
        sizes = self.executable.memory_analysis()
        if sizes is None:
            return 0
        return sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes


class Compiler:
    """Programs of the groups of a grid, with batches as large as `memory` and the block allow.

    block: the shape of blocks over the dims of the grid. key_shape: of the data of one key.
    """

    def __init__(self, function, grid: Grid, block, memory: int, devices: list, key_shape):
        self.function, self.grid, self.block = function, grid, block
        self.memory, self.devices, self.key_shape = memory, devices, key_shape
        self.correction = 1.0  # memory measured by a probe over memory estimated
        self.groups = grid.groups()
        self.ready: dict[int, Program] = {}
        self.started: dict[int, tuple[int, Future]] = {}
        self.upcoming: Iterator[int] = iter(())
        self.at_once = max(2, min(8, os.cpu_count() or 1))
        self.pool = ThreadPoolExecutor(self.at_once)

    def expect(self, groups: Iterable[int]) -> None:
        """Say in which order groups will be wanted: the next ones compile while one runs."""
        self.upcoming = iter(groups)

    def program(self, group: int) -> Program:
        """The program of a group; the last ones are kept."""
        if group not in self.ready:
            self._start(group)
            unseen = (g for g in self.upcoming if g not in self.ready and g not in self.started)
            for other in islice(unseen, max(0, self.at_once + 1 - len(self.started))):
                self._start(other)
            batch, executable = self.started.pop(group)
            self.ready[group] = self._fitting(group, batch, executable.result())
            if len(self.ready) > KEPT:
                del self.ready[next(iter(self.ready))]
        return self.ready[group]

    def forget(self) -> None:
        """Make all programs anew: the block or what is known of memory has changed."""
        self.ready.clear()
        self.started.clear()

    def _start(self, group: int) -> None:
        if group not in self.started:
            batch = self._even(self._first_guess(group))
            lowered = self._traced(group, batch).lower()  # heeds the settings of this thread
            self.started[group] = batch, self.pool.submit(lowered.compile, self._options(group))

    def _fitting(self, group: int, batch: int, executable) -> Program:
        """This program, or one of a smaller batch that keeps to the memory."""
        while True:
            program = Program(executable, batch, self.devices)
            used = program.nbytes * self.correction
            if used <= self.memory or batch <= len(self.devices):
                return program
            batch = self._even(min(batch - 1, int(0.9 * batch * self.memory / used)))
            executable = self._traced(group, batch).lower().compile(self._options(group))

    def _even(self, limit: int) -> int:
        """A batch of at most `limit` that cuts a block evenly, in multiples of the devices."""
        cells, quantum = self.grid.group_cells(self.block), len(self.devices)
        batches = math.ceil(cells / (max(1, limit // quantum) * quantum))
        return math.ceil(cells / batches / quantum) * quantum

    def _first_guess(self, group: int) -> int:
        """Cells that should fit: what the function says, or from the sizes of all intermediates."""
        devices = len(self.devices)
        if hasattr(self.function, "batch_cells"):
            return self.function.batch_cells(**self.groups[group]) * devices
        program = self._traced(group, devices).jaxpr
        return max(1, int(self.memory * devices / max(1, _intermediate_bytes(program.jaxpr))))

    def _options(self, group: int) -> dict[str, Any] | None:
        choose = getattr(self.function, "compiler_options", None)
        cells = self.grid.group_cells(self.grid.shape)
        platform = self.devices[0].platform
        return None if choose is None else choose(platform, cells, **self.groups[group])

    def _traced(self, group: int, batch: int):
        """The jitted program of a batch of cells, traced."""
        function, statics = self.function, self.groups[group]

        def cells(keys, numbers, whole):
            keys = jax.random.wrap_key_data(keys)
            if hasattr(function, "batched"):
                out = function.batched(keys, **statics, **numbers, **whole)
            else:
                out = jax.vmap(lambda key, numbers: function(key, **statics, **numbers, **whole))(
                    keys, numbers
                )
            return {**out, "finite": _finite(out, keys.shape)}

        names = [n for axis in self.grid.axes for n in axis.names if n not in self.grid.static]
        number = jnp.result_type(float)
        keys = jax.ShapeDtypeStruct((batch, *self.key_shape), np.uint32)
        numbers = dict.fromkeys(names, jax.ShapeDtypeStruct((batch,), number))
        whole = {
            n: jax.ShapeDtypeStruct(np.shape(v), number)
            for n, v in self.grid.whole_values().items()
        }
        if len(self.devices) > 1:
            over, all_ = PartitionSpec("cells"), PartitionSpec()
            mesh = Mesh(np.array(self.devices), ("cells",))
            specs = (over, over, all_)
            cells = jax.shard_map(cells, mesh=mesh, in_specs=specs, out_specs=over, check_vma=False)
        return jax.jit(cells).trace(keys, numbers, whole)


def _finite(out, shape):
    """Whether all floating outputs of a cell are finite."""
    flag = jnp.ones(shape, bool)
    for values in out.values():
        if jnp.issubdtype(values.dtype, jnp.inexact):
            flag &= jnp.all(jnp.isfinite(values), range(1, values.ndim))
    return flag


def _intermediate_bytes(jaxpr) -> int:
    """Bytes of every array that the program computes, as if none were freed or fused."""
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
