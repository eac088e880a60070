"""Computing cells on local devices, batch by batch."""

import threading
import time
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np

from negmaml.sweeps.contract import Output
from negmaml.sweeps.grid import Grid, Region
from negmaml.sweeps.program import Compiler

# XLA's batched factorisations on CPU can deadlock when two threads run them at once.
ONE_AT_A_TIME = threading.Lock()
KEYS = 2**14  # folded by one call of a program that all groups share


class Runner:
    """Computes cells of a grid, sharded over `devices`, in batches of at most `memory` bytes."""

    def __init__(self, function, grid: Grid, outputs, root: int, block, memory=None, devices=None):
        self.grid, self.outputs = grid, outputs
        self.root = jax.random.key(root)
        self.devices = list(jax.local_devices() if devices is None else devices)
        self.memory = memory or default_memory(self.devices[0])
        key_shape = jax.random.key_data(self.root).shape
        self.compiler = Compiler(function, grid, block, self.memory, self.devices, key_shape)
        self.whole = {n: np.asarray(v) for n, v in grid.whole_values().items()}

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
        """Say which regions will be computed, in order: their programs compile ahead of them."""
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
                    padded = np.resize(part, program.batch)
                    columns = {name: column[padded] for name, column in numbers.items()}
                    out = program(keys[padded], columns, self.whole)
                    together = part[-1] - part[0] + 1 == len(part)  # as a slice they copy faster
                    where = slice(part[0], part[-1] + 1) if together else part
                    for name, values in jax.device_get(out).items():
                        results[name][where] = values[: len(part)]
        return results

    def _keys(self, address: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """Key data of cells."""
        words = (address >> np.uint64(32)).astype(np.uint32), address.astype(np.uint32), seeds
        parts = []
        for start in range(0, len(seeds), KEYS):
            part = [np.resize(word[start : start + KEYS], KEYS) for word in words]
            parts.append(np.asarray(_fold(self.root, *part)))
        return np.concatenate(parts)[: len(seeds)]

    def probe(self, group: int) -> float:
        """Seconds a cell, and the estimate of memory corrected by what one batch really took."""
        program = self.compiler.program(group)
        index = [np.zeros(program.batch, int) for _ in self.grid.dims]
        _, numbers, address, _ = self.grid.select(index)
        keys = self._keys(address, np.arange(program.batch, dtype=np.uint32))
        before = _peak_memory(self.devices[0])
        with ONE_AT_A_TIME:
            jax.block_until_ready(program(keys, numbers, self.whole))
            taken = _peak_memory(self.devices[0]) - before
            start = time.perf_counter()
            jax.block_until_ready(program(keys, numbers, self.whole))
        seconds = time.perf_counter() - start
        if taken > 1.2 * self.memory:
            self.compiler.correction *= taken / (program.nbytes * self.compiler.correction)
            self.compiler.forget()
        return seconds / program.batch


@jax.jit
def _fold(root, high, low, seeds):
    """Key data of cells: the root key, folded with both words of the address and the seed."""

    def key(*words):
        folded = root
        for word in words:
            folded = jax.random.fold_in(folded, word)
        return jax.random.key_data(folded)

    return jax.vmap(key)(high, low, seeds)


def _first_seen(values: Iterable[int]) -> Iterator[int]:
    """Each value once, at its first place."""
    seen = set()
    for value in values:
        if value not in seen:
            seen.add(value)
            yield value


def empty(outputs: Sequence[Output], shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Arrays for cells of this shape, not yet filled."""
    arrays = {o.name: np.empty((*shape, *o.shape), o.dtype) for o in outputs}
    return arrays | {"finite": np.empty(shape, bool)}


def default_memory(device) -> int:
    """A quarter of an accelerator's memory; 256 MiB on CPU, where caches want small batches."""
    statistics = device.memory_stats() if device.platform != "cpu" else None
    return (statistics or {}).get("bytes_limit", 2**30) // 4


def _peak_memory(device) -> int:
    """The most bytes ever held: by the device, or by the process on CPU."""
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
    import resource  # not on every system, and only needed here

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
