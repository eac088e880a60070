"""Cutting a grid into blocks: hyper-rectangles of cells, each a chunk of the store."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from negmaml.sweeps.contract import Output
from negmaml.sweeps.grid import Grid, Region
from negmaml.sweeps.run import Runner
from negmaml.sweeps.work import Work

BLOCK_SECONDS = 2.0  # what a kill loses at most, and long next to the milliseconds of a write
LARGEST_BLOCK = 2**28  # bytes
OWN_BYTES = 100  # of a cell, for its position, numbers and key


@dataclass(frozen=True)
class Plan:
    """What a sweep will do; `rows` of it are the report of a dry run.

    block: cells of a block along each dim. seconds_per_cell and batch: of the largest group.
    """

    grid: Grid
    outputs: tuple[Output, ...]
    block: tuple[int, ...]
    groups: int
    batch: int
    batch_bytes: int
    seconds_per_cell: float

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
        """Estimated time to compute everything, had every group the cost of the largest."""
        return self.grid.cells * self.seconds_per_cell

    def rows(self) -> dict[str, str]:
        """The plan in words."""
        dims = " x ".join(f"{d} {n}" for d, n in zip(self.grid.dims, self.grid.shape, strict=True))
        return {
            "cells": f"{self.grid.cells:,} ({dims})",
            "shape groups": str(self.groups),
            "blocks": f"{self.blocks:,} of up to {math.prod(self.block):,} cells",
            "batch": f"{self.batch:,} cells, {self.batch_bytes / 2**20:.1f} MiB",
            "result": f"{self.nbytes / 2**20:.1f} MiB",
            "estimated time": f"at most {self.seconds:.1f} s, and compiling {self.groups} programs",
        }


def planned(work: Work, memory, cells, devices) -> tuple[Plan, Runner]:
    """What the sweep will do, and a runner that knows its blocks: of two seconds, or of `cells`.

    A probe runs the group of the largest sizes.
    """
    _check_positive("memory", memory)
    _check_positive("block", cells)
    runner = work.runner(work.grid.shape, memory, devices)
    groups = runner.compiler.groups
    group = max(range(len(groups)), key=lambda g: _size(groups[g]))
    if cells is None:
        of_cell = OWN_BYTES + sum(output.nbytes for output in runner.outputs)
        in_memory = min(runner.memory // 16, LARGEST_BLOCK) // of_cell
        runner.block = block_shape(runner.grid.shape, max(1, in_memory))
    else:
        runner.block = block_shape(runner.grid.shape, cells)
    seconds = runner.probe(group)
    if cells is None and seconds * math.prod(runner.block) > BLOCK_SECONDS:
        runner.block = block_shape(runner.grid.shape, max(1, int(BLOCK_SECONDS / seconds)))
    program = runner.compiler.program(group)
    plan = Plan(
        runner.grid, runner.outputs, runner.block, len(groups), program.batch, program.nbytes,
        seconds,
    )  # fmt: skip
    return plan, runner


def _check_positive(name: str, value) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def block_shape(shape: Sequence[int], cells: int) -> tuple[int, ...]:
    """About `cells` cells: whole seeds first, then the axes from the last to the first."""
    block, left = [], max(1, cells)
    for size in reversed(shape):
        chunk = min(size, left)
        block.append(math.ceil(size / math.ceil(size / chunk)))  # even chunks
        left //= block[-1]
        left = max(1, left)
    return tuple(reversed(block))


def regions(grid: Grid, block: Sequence[int]) -> list[Region]:
    """Every block as slices over the dims of the grid; those of one group after another."""
    starts = (range(0, size, chunk) for size, chunk in zip(grid.shape, block, strict=True))
    found = [
        tuple(
            slice(start, min(start + chunk, size))
            for start, chunk, size in zip(corner, block, grid.shape, strict=True)
        )
        for corner in product(*starts)
    ]
    return sorted(found, key=grid.region_groups)


def index_of(region: Region, wanted: np.ndarray) -> list[np.ndarray]:
    """Positions over the dims of the cells of a region where `wanted` holds."""
    return [at + part.start for at, part in zip(np.nonzero(wanted), region, strict=True)]


def _size(group: dict) -> float:
    return math.prod(float(v) for v in group.values() if isinstance(v, int))
