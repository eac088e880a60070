"""Computing blocks of cells on local devices, in batches that the devices do not wait for."""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from negmaml.sweeps.compiler import Compiler
from negmaml.sweeps.functions import Output, SweepFunction
from negmaml.sweeps.grid import Block, Region, SweepGrid
from negmaml.sweeps.reduce import Reduction

# XLA's batched factorisations on CPU can deadlock when two threads run them at once.
ONE_AT_A_TIME = threading.Lock()
IN_FLIGHT = 2  # batches that an accelerator has at once: one runs, the next one waits for it
Results = dict[str, np.ndarray]


@dataclass(frozen=True)
class _Batch:
    """A batch that was started: its outputs on the devices, and where they go in `results`.

    The last batch of a block has `block`.
    """

    out: dict[str, jax.Array]
    results: Results
    rows: Any
    count: int
    block: Block | None

    def fetch(self) -> None:
        """Wait for the outputs and copy them."""
        for name, values in self.out.items():
            self.results[name][self.rows] = np.asarray(values)[: self.count]


class Runner:
    """Computes blocks of a grid, sharded over `devices`, in batches of at most `memory` bytes.

    `expect` announces blocks, so that their programs compile ahead. `compute` returns the outputs
    of blocks. `probe` measures the time of a cell.
    """

    def __init__(
        self, function: SweepFunction, grid: SweepGrid, outputs, root_seed: int, block, memory=None,
        devices=None, reduction: Reduction | None = None,
    ):  # fmt: skip
        self.grid, self.outputs = grid, outputs
        self.devices = list(jax.local_devices() if devices is None else devices)
        self.memory = memory or default_memory(self.devices[0])
        self.compiler = Compiler(
            function, grid, reduction, root_seed, block, self.memory, self.devices
        )
        # A CPU works itself on each batch, so nothing is gained by starting the next one.
        self.in_flight = 1 if self.devices[0].platform == "cpu" else IN_FLIGHT

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

    def compute(self, blocks: Iterable[Block | None]) -> Iterator[tuple[Any, Results]]:
        """Each block with the outputs and the flag `finite` of its wanted cells, as rows.

        None is a barrier: it comes back after all blocks before it, before the next is asked for.
        """
        started: deque[_Batch] = deque()
        for block in blocks:
            if block is not None:
                for batch in self._start(block):
                    started.append(batch)
                    # Fetched only once the next batch is started, so that no device waits.
                    yield from _fetched(started, self.in_flight - 1)
            else:
                yield from _fetched(started, 0)
                yield None, {}
        yield from _fetched(started, 0)

    def _start(self, block: Block) -> Iterator[_Batch]:
        """Start the batches of a block, one whenever the next is asked for."""
        region, wanted = block
        positions = np.flatnonzero(wanted).astype(np.int32)
        results = empty(self.outputs, (len(positions),))
        corner = np.array([[part.start for part in region], wanted.shape], np.int32)
        left = len(positions)
        for group, rows in self._groups(block):
            start = 0
            while start < len(rows):
                with ONE_AT_A_TIME:
                    program = self.compiler.program(group)
                    part = rows[start : start + program.batch]
                    # The last batch repeats cells, so that the program keeps its shape.
                    out = program(np.resize(positions[part], program.batch), corner)
                    for values in out.values():
                        values.copy_to_host_async()
                    if self.devices[0].platform == "cpu":
                        jax.block_until_ready(out)
                start, left = start + len(part), left - len(part)
                together = part[-1] - part[0] + 1 == len(part)  # then a slice copies faster
                where = slice(part[0], part[-1] + 1) if together else part
                yield _Batch(out, results, where, len(part), None if left else block)

    def _groups(self, block: Block) -> Iterator[tuple[int, np.ndarray]]:
        """The groups of a block, each with its rows among the wanted cells."""
        region, wanted = block
        groups = self.grid.region_groups(region)
        if len(groups) == 1:
            yield groups[0], np.arange(np.count_nonzero(wanted))
            return
        group_of = self.grid.groups_of(region)[wanted]
        order = np.argsort(group_of, kind="stable")
        for rows in np.split(order, np.flatnonzero(np.diff(group_of[order])) + 1):
            yield int(group_of[rows[0]]), rows

    def probe(self, group: int) -> float:
        """Measure the seconds of a cell, and correct the estimate of memory by one batch."""
        program = self.compiler.program(group)
        # The first cell, repeated: time and memory depend on shapes, not on values.
        positions = np.zeros(program.batch, np.int32)
        corner = np.array([[0] * len(self.grid.dims), self.grid.shape], np.int32)
        # A chunk of seeds is long, so only its first tile is timed.
        short, tiles = self.compiler.first_tile()
        before = _peak_memory(self.devices[0])
        with ONE_AT_A_TIME:
            # The first call also allocates its buffers; only the second is timed.
            jax.block_until_ready(program(positions, corner, short))
            taken = _peak_memory(self.devices[0]) - before
            start = time.perf_counter()
            jax.block_until_ready(program(positions, corner, short))
        seconds = tiles * (time.perf_counter() - start)
        # The estimate misses buffers of the runtime; correct it once it is clearly wrong.
        if taken > 1.2 * self.memory:
            self.compiler.correction *= taken / (program.nbytes * self.compiler.correction)
            self.compiler.forget()
        return seconds / program.batch


def _fetched(started: deque[_Batch], left: int) -> Iterator[tuple[Block, Results]]:
    """Fetch the oldest batches until `left` are in flight; yield the blocks that are complete."""
    while len(started) > left:
        batch = started.popleft()
        batch.fetch()
        if batch.block is not None:
            yield batch.block, batch.results


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


def block_memory(device, memory: int) -> int:
    """Bytes of the results of a block on the host, where up to three blocks are at once.

    memory: bytes of a batch. Results of an accelerator leave its memory, so only the memory of the
    host limits them. On CPU small blocks are faster, because their buffers are used again.
    """
    return memory // 16 if device.platform == "cpu" else host_memory() // 64


def host_memory() -> int:
    """Bytes of memory of this machine."""
    pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0  # not on Windows
    return pages * os.sysconf("SC_PAGE_SIZE") if pages else 2**34


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
