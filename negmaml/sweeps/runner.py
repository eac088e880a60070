"""Computing cells on local devices: one compiled program for each group, run in batches."""

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from negmaml._core.keys import key_of
from negmaml._core.settings import other_settings, result_settings
from negmaml.sweeps.functions import Output, SweepFunction, inputs
from negmaml.sweeps.grid import Region, SweepGrid

# XLA's batched factorisations on CPU can deadlock when two threads run them at once.
ONE_AT_A_TIME = threading.Lock()
KEYS = 2**14  # keys of one call of the program that derives them, which all groups share
KEPT = 32  # programs of about 3 MiB each; blocks are sorted by group, so few are needed at once


class Program:
    """A compiled program over `batch` cells, called as `program(keys, numbers, vectorized)`.

    Its arguments are NumPy arrays; it places them on the devices.
    """

    def __init__(self, executable, batch: int, devices: list):
        self.executable, self.batch, self.devices = executable, batch, devices

    def __call__(
        self, keys, numbers: Mapping[str, np.ndarray], vectorized: Mapping[str, np.ndarray]
    ):
        # Values of axes are float64 on the host; the program was traced with JAX's current dtype.
        dtype = jnp.result_type(float)
        numbers, vectorized = jax.tree.map(lambda x: np.asarray(x, dtype), (numbers, vectorized))
        one = len(self.devices) == 1
        # An executable does not move its arguments: they have to lie where it expects them.
        place = self.devices[0] if one else self.executable.input_shardings[0]
        return self.executable(*jax.device_put((keys, numbers, vectorized), place))

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

    def __init__(self, function: SweepFunction, grid: SweepGrid, block, memory: int, devices: list):
        self.function, self.grid, self.block = function, grid, block
        self.memory, self.devices = memory, devices
        self.correction = 1.0  # measured over estimated memory
        self.groups = grid.groups()
        self.ready: dict[int, Program] = {}
        self.started: dict[int, tuple[int, Future]] = {}
        self.upcoming: Iterator[int] = iter(())
        # XLA compiles without Python's global lock, so threads do compile in parallel.
        self.at_once = max(2, min(8, os.cpu_count() or 1))
        self.pool = ThreadPoolExecutor(self.at_once)
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
            program = Program(executable, batch, self.devices)
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
        devices = len(self.devices)
        said = self.function.batch_cells(**self.groups[group])
        if said is not None:
            return said * devices
        program = self._traced(group, devices).jaxpr
        return max(1, int(self.memory * devices / max(1, _intermediate_bytes(program.jaxpr))))

    def _options(self, group: int) -> dict[str, Any] | None:
        cells = self.grid.group_cells(self.grid.shape)
        platform = self.devices[0].platform
        return self.function.compiler_options(platform, cells, **self.groups[group])

    def _traced(self, group: int, batch: int):
        """The jitted program of a batch of cells, traced."""
        function, statics = self.function, self.groups[group]

        def cells(keys, numbers, vectorized):
            keys = jax.random.wrap_key_data(keys, impl=generator)
            out = function.batched(keys, numbers, {**statics, **vectorized})
            return {**out, "finite": _finite(out, keys.shape)}

        keys, numbers, vectorized = inputs(self.grid, (batch,))
        generator = jax.random.key_impl(key_of(0))
        keys = jax.eval_shape(jax.random.key_data, keys)
        if len(self.devices) > 1:
            # Cells are independent, so each device gets its share of keys and numbers.
            over, all_ = PartitionSpec("cells"), PartitionSpec()
            mesh = Mesh(np.array(self.devices), ("cells",))
            specs = (over, over, all_)
            # `check_vma` is off: no output is replicated, and operations of users may have no rule
            # for it.
            cells = jax.shard_map(cells, mesh=mesh, in_specs=specs, out_specs=over, check_vma=False)
        return jax.jit(cells).trace(keys, numbers, vectorized)


class Runner:
    """Computes cells of a grid, sharded over `devices`, in batches of at most `memory` bytes.

    `expect` announces blocks, so that their programs compile ahead. `compute` returns the outputs
    of any cells. `probe` measures the time of a cell.
    """

    def __init__(
        self, function: SweepFunction, grid: SweepGrid, outputs, root_seed: int, block, memory=None,
        devices=None,
    ):  # fmt: skip
        self.grid, self.outputs = grid, outputs
        self.root_key = key_of(root_seed)
        self.devices = list(jax.local_devices() if devices is None else devices)
        self.memory = memory or default_memory(self.devices[0])
        self.compiler = Compiler(function, grid, block, self.memory, self.devices)
        self.vectorized = {n: np.asarray(v) for n, v in grid.vectorized_values().items()}

    @property
    def block(self) -> tuple[int, ...]:
        """Shape of blocks over the dims of the grid."""
        return self.compiler.block

    @block.setter
    def block(self, shape: tuple[int, ...]) -> None:
        cells = self.grid.group_cells(shape)
        if any(program.batch > cells for program in self.compiler.ready.values()):
            self.compiler.forget()
        self.compiler.block = shape

    def expect(self, regions: Iterable[Region]) -> None:
        """Announce the regions to be computed, in order; their programs compile ahead."""
        self.compiler.expect(_first_seen(g for r in regions for g in self.grid.region_groups(r)))

    def compute(self, index: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs and the flag `finite` of the cells at an index over the dims of the grid."""
        groups, numbers, address, seeds = self.grid.select(index)
        results = empty(self.outputs, (len(seeds),))
        with ONE_AT_A_TIME:
            keys = self._keys(address, seeds)
            for group in np.unique(groups):
                cells = np.flatnonzero(groups == group)
                program = self.compiler.program(int(group))
                for start in range(0, len(cells), program.batch):
                    part = cells[start : start + program.batch]
                    # The last batch repeats cells, so that the program keeps its shape.
                    padded = np.resize(part, program.batch)
                    columns = {name: column[padded] for name, column in numbers.items()}
                    out = program(keys[padded], columns, self.vectorized)
                    together = part[-1] - part[0] + 1 == len(part)  # then a slice copies faster
                    where = slice(part[0], part[-1] + 1) if together else part
                    for name, values in jax.device_get(out).items():
                        results[name][where] = values[: len(part)]
        return results

    def _keys(self, address: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """Key data of cells."""
        # fold_in takes 32 bits at a time, so an address of 64 bits is two words.
        words = (address >> np.uint64(32)).astype(np.uint32), address.astype(np.uint32), seeds
        parts = []
        for start in range(0, len(seeds), KEYS):
            # Always as many keys, so that one program serves blocks of every size.
            part = [np.resize(word[start : start + KEYS], KEYS) for word in words]
            parts.append(np.asarray(_fold(self.root_key, *part)))
        return np.concatenate(parts)[: len(seeds)]

    def probe(self, group: int) -> float:
        """Measure the seconds of a cell, and correct the estimate of memory by one batch."""
        program = self.compiler.program(group)
        # The first cell, repeated: time and memory depend on shapes, not on values.
        index = [np.zeros(program.batch, int) for _ in self.grid.dims]
        numbers = self.grid.select(index)[1]
        width = jax.eval_shape(jax.random.key_data, self.root_key).shape
        keys = np.arange(program.batch * math.prod(width), dtype=np.uint32)  # any keys will do
        keys = keys.reshape(program.batch, *width)
        before = _peak_memory(self.devices[0])
        with ONE_AT_A_TIME:
            # The first call also allocates its buffers; only the second is timed.
            jax.block_until_ready(program(keys, numbers, self.vectorized))
            taken = _peak_memory(self.devices[0]) - before
            start = time.perf_counter()
            jax.block_until_ready(program(keys, numbers, self.vectorized))
        seconds = time.perf_counter() - start
        # The estimate misses buffers of the runtime; correct it once it is clearly wrong.
        if taken > 1.2 * self.memory:
            self.compiler.correction *= taken / (program.nbytes * self.compiler.correction)
            self.compiler.forget()
        return seconds / program.batch


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


@jax.jit
def _fold(root_key, high, low, seeds):
    """Key data of cells: the root key folded with both words of the address and with the seed."""

    def key(*words):
        folded = root_key
        for word in words:
            folded = jax.random.fold_in(folded, word)
        return jax.random.key_data(folded)

    return jax.vmap(key)(high, low, seeds)


def _first_seen(values: Iterable[int]) -> Iterator[int]:
    """Each value once, in order of first occurrence."""
    seen = set()
    for value in values:
        if value not in seen:
            seen.add(value)
            yield value


def empty(outputs: Sequence[Output], shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Uninitialised arrays for cells of this shape."""
    arrays = {o.name: np.empty((*shape, *o.shape), o.dtype) for o in outputs}
    return arrays | {"finite": np.empty(shape, bool)}


def default_memory(device) -> int:
    """A quarter of an accelerator's memory; 256 MiB on CPU, where caches want small batches."""
    statistics = device.memory_stats() if device.platform != "cpu" else None
    return (statistics or {}).get("bytes_limit", 2**30) // 4


def _peak_memory(device) -> int:
    """Peak memory in bytes: of the device, or of the process on CPU."""
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    # In kibibytes, but on macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
