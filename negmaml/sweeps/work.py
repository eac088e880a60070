"""A checked sweep: what a function, a grid and seeds come to before anything is computed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from negmaml._core.provenance import provenance
from negmaml._core.version import __version__
from negmaml.sweeps.contract import Output, contract, fingerprint, outputs
from negmaml.sweeps.grid import Grid
from negmaml.sweeps.manifest import manifest
from negmaml.sweeps.parse import parse_grid
from negmaml.sweeps.run import Runner


@dataclass(frozen=True)
class Work:
    """A checked sweep, nothing of it computed yet."""

    function: Any
    grid: Grid
    outputs: tuple[Output, ...]
    root: int
    declared: frozenset[str]  # outputs whose dims the function or the caller names

    def manifest(self) -> dict[str, Any]:
        """What a store of it says."""
        return manifest(
            fingerprint(self.function), __version__, self.root, self.grid, self.outputs,
            x64(),
        )  # fmt: skip

    def runner(self, block: Sequence[int], memory: int | None, devices) -> Runner:
        """What computes it here."""
        return Runner(self.function, self.grid, self.outputs, self.root, block, memory, devices)

    def attributes(self) -> dict[str, Any]:
        """What a dataset of it says of how it was made."""
        return provenance() | self.description()

    def description(self) -> dict[str, Any]:
        """The function, the root and what they are evaluated at, in words."""
        function, grid = fingerprint(self.function), self.manifest()["axes"]
        values = {name: axis["values"] for name, axis in grid.items()}
        plain = {n: [v[0] for v in rows] if "," not in n else rows for n, rows in values.items()}
        seeds = self.grid.seeds
        counted = seeds == tuple(range(len(seeds)))
        own = {"function": function, "root": self.root, "grid": str(plain)}
        own["seeds"] = f"0 to {len(seeds) - 1}" if counted else str(list(seeds))
        return own


def prepare(
    function, grid, seeds, root=0, static=None, whole=None, common=(), output_dims=None
) -> Work:
    """Check everything that can be checked before computing."""
    if isinstance(root, bool) or not isinstance(root, int) or not 0 <= root < 2**32:
        raise ValueError(f"root must be an integer from 0 to 2^32 - 1, got {root!r}")
    terms = contract(function, static, whole, output_dims)
    parsed = parse_grid(
        grid, seeds, terms.accepts, terms.requires, terms.static, terms.whole, common
    )
    return Work(function, parsed, outputs(terms, parsed), root, frozenset(terms.output_dims))


def x64() -> bool:
    """Whether numbers are float64 here."""
    return jnp.result_type(float) == jnp.float64
