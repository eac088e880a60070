"""Computing cells: one compiled program for each group of static values, batch by batch."""

import math
import resource
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from negmaml.sweeps.contract import Output
from negmaml.sweeps.grid import Grid

# XLA's batched factorisations on CPU can deadlock when two threads run them at once.
ONE_AT_A_TIME = threading.Lock()


class Runner:
    """Computes cells of a grid on local devices.

    Cells are sharded over `devices`; a batch is as large as `memory` bytes and the block allow.
    """

    def __init__(self, function, grid: Grid, outputs, root: int, block, memory=None, devices=None):
        self.function, self.grid = function, grid
        self.outputs: tuple[Output, ...] = outputs
        self.root = jax.random.key(root)
        self.block = block
        self.devices = list(jax.local_devices() if devices is None else devices)
        self.memory = memory or default_memory(self.devices[0])
        self.correction = 1.0  # memory measured by the probe over memory estimated
        self.programs: dict[int, tuple[int, Any, int]] = {}
        self.groups = grid.groups()
        self.whole = {n: np.asarray(v) for n, v in grid.whole_values().items()}

    def compute(self, index: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs and the flag `finite` of the cells at an index over the dims of the grid."""
        groups, numbers, address, seeds = self.grid.select(index)
        results = empty(self.outputs, (len(seeds),))
        with ONE_AT_A_TIME:
            for group in np.unique(groups):
                cells = np.flatnonzero(groups == group)
                batch, program, _ = self.program(int(group))
                for start in range(0, len(cells), batch):
                    part = cells[start : start + batch]
                    padded = np.resize(part, batch)
                    arguments = _arguments(address[padded], seeds[padded], numbers, padded)
                    out = program(self.root, *arguments, self.whole)
                    for name, values in jax.device_get(out).items():
                        results[name][part] = values[: len(part)]
        return results

    def program(self, group: int) -> tuple[int, Any, int]:
        """(cells in a batch, compiled program, bytes it is estimated to use)."""
        if group not in self.programs:
            quantum = len(self.devices)
            most = self.grid.group_cells(self.block)
            batch = _even(most, self._first_guess(group), quantum)
            while True:
                program = self._compile(group, batch)
                used = int(program_memory(program) * self.correction)
                if used <= self.memory or batch <= quantum:
                    break
                batch = _even(most, min(batch - 1, int(0.9 * batch * self.memory / used)), quantum)
            self.programs[group] = batch, program, used
        return self.programs[group]

    def _first_guess(self, group: int) -> int:
        """Cells that should fit: what the function says, or from the sizes of all intermediates."""
        statics = self.groups[group]
        if hasattr(self.function, "batch_cells"):
            return self.function.batch_cells(**statics) * len(self.devices)
        devices = len(self.devices)
        program = self._traced(group, devices).jaxpr
        return max(1, int(self.memory * devices / max(1, _intermediate_bytes(program.jaxpr))))

    def _traced(self, group: int, batch: int):
        """The jitted program of a batch of cells, traced."""
        statics, devices = self.groups[group], self.devices

        def cells(root, high, low, seeds, numbers, whole):
            def key(high, low, seed):
                return jax.random.fold_in(
                    jax.random.fold_in(jax.random.fold_in(root, high), low), seed
                )

            keys = jax.vmap(key)(high, low, seeds)
            if hasattr(self.function, "batched"):
                out = self.function.batched(keys, **statics, **numbers, **whole)
            else:
                out = jax.vmap(
                    lambda key, numbers: self.function(key, **statics, **numbers, **whole)
                )(keys, numbers)
            return {**out, "finite": _finite(out, high.shape)}

        names = [n for axis in self.grid.axes for n in axis.names if n not in self.grid.static]
        word = jax.ShapeDtypeStruct((batch,), np.uint32)
        number = jax.ShapeDtypeStruct((batch,), jnp.result_type(float))
        whole = {
            n: jax.ShapeDtypeStruct(v.shape, jnp.result_type(float)) for n, v in self.whole.items()
        }
        root = jax.ShapeDtypeStruct((), self.root.dtype)
        if len(devices) > 1:
            over, all_ = PartitionSpec("cells"), PartitionSpec()
            mesh = Mesh(np.array(devices), ("cells",))
            specs = (all_, over, over, over, over, all_)
            cells = jax.shard_map(cells, mesh=mesh, in_specs=specs, out_specs=over, check_vma=False)
        return jax.jit(cells).trace(root, word, word, word, dict.fromkeys(names, number), whole)

    def _compile(self, group: int, batch: int):
        on_cpu = self.devices[0].platform == "cpu"
        options = getattr(self.function, "compiler_options", None) if on_cpu else None
        program = self._traced(group, batch).lower().compile(options)

        def call(root, high, low, seeds, numbers, whole):
            dtype = jnp.result_type(float)
            numbers, whole = jax.tree.map(lambda x: np.asarray(x, dtype), (numbers, whole))
            if len(self.devices) == 1:
                arguments = jax.device_put(
                    (root, high, low, seeds, numbers, whole), self.devices[0]
                )
                return program(*arguments)
            arguments = (root, high, low, seeds, numbers, whole)
            return program(*jax.device_put(arguments, program.input_shardings[0]))

        call.program = program  # type: ignore[attr-defined]
        return call

    def probe(self, group: int) -> float:
        """Seconds a cell, and the estimate of memory corrected by what one batch really took."""
        batch, program, used = self.program(group)
        index = [np.zeros(batch, int) for _ in self.grid.dims]
        _, numbers, address, seeds = self.grid.select(index)
        seeds = np.arange(batch, dtype=np.uint32)
        arguments = _arguments(address, seeds, numbers, slice(None))
        before = _peak_memory(self.devices[0])
        with ONE_AT_A_TIME:
            jax.block_until_ready(program(self.root, *arguments, self.whole))
            taken = _peak_memory(self.devices[0]) - before
            start = time.perf_counter()
            jax.block_until_ready(program(self.root, *arguments, self.whole))
        if taken > 1.2 * self.memory:
            self.correction *= taken / used
            self.programs.clear()
        return (time.perf_counter() - start) / batch


def empty(outputs: Sequence[Output], shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Arrays for cells of this shape, not yet filled."""
    arrays = {o.name: np.empty((*shape, *o.shape), o.dtype) for o in outputs}
    return arrays | {"finite": np.empty(shape, bool)}


def default_memory(device) -> int:
    """A quarter of an accelerator's memory; 256 MiB on CPU, where caches want small batches."""
    statistics = device.memory_stats() if device.platform != "cpu" else None
    return (statistics or {}).get("bytes_limit", 2**30) // 4


def program_memory(call) -> int:
    """Bytes that one call of a compiled program holds: arguments, results and temporaries."""
    sizes = call.program.memory_analysis()
    if sizes is None:
        return 0
    return sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes


def _arguments(address, seeds, numbers: Mapping[str, np.ndarray], cells):
    high, low = (address >> np.uint64(32)).astype(np.uint32), address.astype(np.uint32)
    return high, low, seeds, {name: column[cells] for name, column in numbers.items()}


def _even(cells: int, limit: int, quantum: int) -> int:
    """A batch of at most `limit` that cuts `cells` evenly, in multiples of `quantum`."""
    batches = math.ceil(cells / (max(1, limit // quantum) * quantum))
    return math.ceil(cells / batches / quantum) * quantum


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


def _peak_memory(device) -> int:
    """The most bytes ever held: by the device, or by the process on CPU."""
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
