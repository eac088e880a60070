"""Cells on a device: from positions in a region of the grid to random keys and numbers.

The device holds a table for every axis, never for the grid: the values of its traced names, and
its summands of the address of a cell as two words of 32 bits. A program receives the positions of
its cells and looks everything up.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.keys import key_of
from negmaml.sweeps.grid import SweepGrid
from negmaml.sweeps.reduce import Reduction


def tables_of(grid: SweepGrid, root_seed: int, reduction: Reduction | None) -> dict[str, Any]:
    """The tables of a grid as NumPy arrays, with the root key.

    reduction: the chunks of seeds of a sweep that reduces over them.
    """
    axes = grid.tables
    # Values of axes are float64 on the host; the program has JAX's current dtype.
    dtype = jnp.result_type(float)
    seeds = grid.seeds if reduction is None else reduction.seeds
    chunks = {} if reduction is None else {
        "starts": np.array(reduction.bounds[:-1], np.uint32), "counts": reduction.counts
    }  # fmt: skip
    # A range is computed from its start and step, which wrap around like the words they make.
    listed = [seeds.start, seeds.step] if isinstance(seeds, range) else seeds
    return chunks | {
        "root": np.asarray(jax.random.key_data(key_of(root_seed))),
        "high": [(axis.addresses >> np.uint64(32)).astype(np.uint32) for axis in axes],
        "low": [axis.addresses.astype(np.uint32) for axis in axes],
        "numbers": {n: c.astype(dtype) for axis in axes for n, c in axis.numbers.items()},
        "seeds": np.array(listed, np.int64).astype(np.uint32),
    }


def cells_at(grid: SweepGrid, tables, positions, region):
    """Keys without their seeds, positions along the dim `seed`, and numbers of cells in a region.

    positions: (B,), in the region, whose last dim varies fastest. region: (2, dims), its corner and
    its shape.
    """
    corner, shape = region.astype(jnp.uint32)
    at: dict[str | None, jax.Array] = {None: jnp.zeros(positions.shape, jnp.uint32)}
    left = positions.astype(jnp.uint32)
    for i in reversed(range(len(grid.dims))):
        # The first dim takes all that is left.
        at[grid.dims[i]] = corner[i] + (left % shape[i] if i else left)
        left = left // shape[i]
    high = low = at[None]
    numbers: dict[str, jax.Array] = {}
    for axis, more_high, more_low in zip(grid.tables, tables["high"], tables["low"], strict=True):
        here = at[axis.dim]
        total = low + more_low[here]
        # The sum modulo 2^64 in two words: the low one carries if it wrapped around.
        high = high + more_high[here] + (total < low).astype(jnp.uint32)
        low = total
        numbers |= {name: tables["numbers"][name][here] for name in axis.numbers}
    root = jax.random.wrap_key_data(tables["root"], impl=jax.random.key_impl(key_of(0)))
    points = fold(fold(jnp.broadcast_to(root, positions.shape), high), low)
    return points, at["seed"], numbers


def seeds_at(seeds: range | tuple[int, ...], tables, at):
    """The seeds at positions, as words."""
    held = tables["seeds"]
    return held[0] + held[1] * at if isinstance(seeds, range) else held[at]


def fold(keys, words):
    """Every key folded with its word of 32 bits."""
    return jax.vmap(jax.random.fold_in)(keys, words)
