"""The manifest: the identity of the sweep in a store, and the differences of two sweeps."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from negmaml._core.fingerprint import Identity, difference
from negmaml.sweeps import progressions
from negmaml.sweeps.functions import Output
from negmaml.sweeps.grid import Axis, SweepGrid
from negmaml.sweeps.reduce import Reduction
from negmaml.sweeps.values import indistinct

FORMAT = 5  # raise it too when a cell gets other random numbers
# The array that counts what each cell has, by format.
COMPLETED = {3: "done", 4: "completed", 5: "completed"}
DESCRIBED = 8  # programs whose full identity is kept, for error messages
Box = Mapping[str, tuple[int, int]]  # dim of a vectorized axis: first and one past last position


@dataclass(frozen=True)
class Manifest:
    """Everything that the numbers of a store depend on.

    function: its name. version: the version of this package. programs: the digest of the program of
    each group of static values. described: the full identities of some of these programs. block:
    cells of a chunk along each dim. extensions: for each extension of a vectorized axis, the box
    over the vectorized axes that it added. label_chunks: values of a coordinate in a chunk, by dim,
    where they are not `LABELS`. reduction: the chunks of seeds, if the outputs are moments of them.
    """

    function: str
    version: str
    root_seed: int
    x64: bool
    grid: SweepGrid
    outputs: tuple[Output, ...]
    programs: Mapping[str, str]
    described: Mapping[str, Identity]
    block: tuple[int, ...] = ()
    extensions: tuple[Box, ...] = ()
    label_chunks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    reduction: Reduction | None = None
    format: int = FORMAT

    @property
    def num_levels(self) -> int:
        """Levels of a complete cell: one, and one for each extension of a vectorized axis."""
        return 1 + len(self.extensions)

    @property
    def completed(self) -> str:
        """The name of the array that counts the levels each cell has."""
        return COMPLETED[self.format]

    def to_json(self) -> str:
        """The manifest as text."""
        grid = self.grid
        # The keys are those of format 3, under which older stores stay readable.
        return json.dumps({
            "format": self.format,
            "function": self.function,
            "version": self.version,
            "root": self.root_seed,
            "x64": self.x64,
            "axes": [_axis_json(axis, grid) for axis in grid.axes],
            "whole": [_axis_json(axis, grid) for axis in grid.vectorized],
            "seeds": progressions.to_json(grid.seeds),
            "common": sorted(grid.common),
            "outputs": [[o.name, o.dims, o.shape, o.dtype] for o in self.outputs],
            "programs": dict(self.programs),
            "described": {group: held.to_json() for group, held in self.described.items()},
            "block": self.block,
            "parts": self.extensions,
            "labels": dict(self.label_chunks),
            "reduce": self.reduction and self.reduction.to_json(),
        })  # fmt: skip

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """The manifest in a JSON text; ValueError for another format."""
        return cls.from_held(json.loads(text))

    @classmethod
    def from_held(cls, held: Mapping[str, Any]) -> "Manifest":
        """The manifest in parsed JSON; ValueError for another format."""
        if held.get("format") not in COMPLETED:
            raise ValueError(
                f"it has the layout {held.get('format')} of another version of negmaml, and this "
                f"one reads {' and '.join(map(str, COMPLETED))}"
            )
        static = {n for a in (*held["axes"], *held["whole"]) for n in a["static"]}
        grid = SweepGrid(
            tuple(map(_axis, held["axes"])), tuple(map(_axis, held["whole"])),
            progressions.from_json(held["seeds"]), frozenset(static), frozenset(held["common"]),
        )  # fmt: skip
        outputs = tuple(Output(n, tuple(d), tuple(s), t) for n, d, s, t in held["outputs"])
        extensions = tuple({dim: tuple(box[dim]) for dim in box} for box in held["parts"])
        chunks = held.get("reduce")
        reduction = None if chunks is None else Reduction.from_json(chunks)
        return cls(
            held["function"], held["version"], held["root"], held["x64"], grid, outputs,
            held["programs"],
            {group: Identity.from_json(text) for group, text in held["described"].items()},
            tuple(held["block"]), extensions, dict(held.get("labels", {})), reduction,
            held["format"],
        )  # fmt: skip


def _axis_json(axis: Axis, grid: SweepGrid) -> dict[str, Any]:
    static = [name for name in axis.names if name in grid.static]
    return {"dim": axis.dim, "names": axis.names, "static": static, "values": axis.values}


def _axis(held: Mapping[str, Any]) -> Axis:
    return Axis(held["dim"], tuple(held["names"]), tuple(map(tuple, held["values"])))


def differences(stored: Manifest, asked: Manifest) -> tuple[list[str], list[str]]:
    """(contradictions, additions) of a requested sweep relative to a stored one, as text.

    Values and seeds that only the store has are not a difference: the request is a part of it.
    """
    wrong: list[str] = []
    more: list[str] = []
    for field in ("root_seed", "x64"):
        if getattr(stored, field) != getattr(asked, field):
            wrong.append(_differ(field, getattr(stored, field), getattr(asked, field)))
    if (stored.reduction is None) != (asked.reduction is None):
        kinds = "single cells", "statistics over seeds"
        wrong.append(_differ("reduce", *(kinds[m.reduction is not None] for m in (stored, asked))))
    elif stored.reduction is not None and asked.reduction is not None:
        try:
            stored.reduction.joined(asked.reduction)
        except ValueError as error:
            wrong.append(f"seeds: {error}")
    if stored.grid.common != asked.grid.common:
        common = (sorted(m.grid.common) for m in (stored, asked))
        wrong.append(_differ("common_random_numbers", *common))
    held, wanted = _own_shapes(stored), _own_shapes(asked)
    if held != wanted:
        wrong.append(_differ("outputs", held, wanted))
    old_axes, new_axes = _axes(stored.grid), _axes(asked.grid)
    for name in [*old_axes, *(n for n in new_axes if n not in old_axes)]:
        if name not in old_axes or name not in new_axes:
            has = "no" if name not in old_axes else "an"
            wrong.append(f"axis {name}: store has {has} axis of that name")
            continue
        old, new = old_axes[name], new_axes[name]
        for field in ("role", "dim", "static"):
            if old[field] != new[field]:
                wrong.append(f"axis {name}: {field} is {old[field]}, asked {new[field]}")
        if change := _added(f"axis {name}", old["values"], new["values"]):
            # A constant has no dim that could grow, so another value contradicts the store.
            (wrong if old["dim"] is None else more).append(change)
        # Old and new values that round to one number would be one cell with two addresses.
        both = Axis(None, tuple(name.split(",")), progressions.joined(old["values"], new["values"]))
        if clash := indistinct(both, new["static"], stored.x64):
            wrong.append(f"{clash}; ask for the value that the store has")
    if change := _added("seeds", stored.grid.seeds, asked.grid.seeds):
        more.append(change)
    return wrong, more


def other_programs(stored: Manifest, now: Mapping[str, Identity]) -> list[str]:
    """The differences of programs from those of the same groups in the store, as text."""
    # A group that the store does not have yet cannot contradict it.
    return [
        f"function: at {group} it computes something else than {stored.function} did"
        + (f" ({difference(stored.described[group], new)})" if group in stored.described else "")
        for group, new in now.items()
        if stored.programs.get(group, new.digest) != new.digest
    ]


def with_programs(manifest: Manifest, function: str, now: Mapping[str, Identity]) -> Manifest:
    """The manifest with these programs added, or in place of those of the same groups."""
    described = {**manifest.described, **now}
    # The newest identities are kept, since the next comparison is probably with them.
    kept = list(dict.fromkeys([*now, *described]))[:DESCRIBED]
    return replace(
        manifest,
        function=function,
        programs={**manifest.programs, **{group: new.digest for group, new in now.items()}},
        described={group: described[group] for group in kept},
    )


def _differ(what: str, old, new) -> str:
    return f"{what}: store has {old}, asked {new}"


def _axes(grid: SweepGrid) -> dict[str, dict[str, Any]]:
    """Every axis by its names, with all that is compared."""
    return {
        ",".join(axis.names): {
            "role": role,
            "dim": axis.dim,
            "static": [name for name in axis.names if name in grid.static],
            "values": axis.values,
        }
        for role, axes in (("cell", grid.axes), ("vectorized", grid.vectorized))
        for axis in axes
    }


def _own_shapes(manifest: Manifest) -> dict[str, Any]:
    """Outputs without the sizes of vectorized axes, which may grow."""
    vectorized = _vectorized_sizes(manifest.grid)
    return {
        o.name: [
            o.dtype,
            list(o.dims),
            [None if d in vectorized else n for d, n in zip(o.dims, o.shape, strict=True)],
        ]
        for o in manifest.outputs
    }


def _vectorized_sizes(grid: SweepGrid) -> dict[str, int]:
    return {axis.dim: len(axis) for axis in grid.vectorized if axis.dim}


def _added(what: str, old: progressions.Values, new: progressions.Values) -> str:
    """A description of the values that the request adds; empty if it adds none."""
    added = progressions.missing_from(old, new)
    few = [v[0] if isinstance(v, tuple) and len(v) == 1 else v for v in added[:4]]
    shown = ", ".join(map(str, few)) + (", ..." if len(added) > 4 else "")
    return f"{what}: asked adds {len(added)} ({shown})" if added else ""


def other_vectorized_axes(stored: SweepGrid, asked: SweepGrid) -> list[str]:
    """The vectorized axes whose values differ between the store and the request."""
    # Compared as sets, since another order selects the same numbers.
    return [
        old.names[0]
        for old, new in zip(_sorted(stored.vectorized), _sorted(asked.vectorized), strict=True)
        if set(old.values) != set(new.values)
    ]


def _sorted(axes: Sequence[Axis]) -> list[Axis]:
    return sorted(axes, key=lambda axis: axis.names)


def extended(stored: Manifest, asked: Manifest) -> Manifest:
    """The stored sweep with the new values and seeds of the requested one appended.

    New values of a vectorized axis make one extension: the box over the vectorized axes that is
    still missing in cells computed before.
    """
    old, new = (
        stored.grid,
        {axis.names: axis for axis in (*asked.grid.axes, *asked.grid.vectorized)},
    )

    def longer(axis: Axis) -> Axis:
        return replace(axis, values=progressions.joined(axis.values, new[axis.names].values))

    reduction, seeds = stored.reduction, progressions.joined(old.seeds, asked.grid.seeds)
    if reduction is not None and asked.reduction is not None:
        reduction = reduction.joined(asked.reduction)
        seeds = reduction.firsts
    grid = replace(
        old, axes=tuple(map(longer, old.axes)), vectorized=tuple(map(longer, old.vectorized)),
        seeds=seeds,
    )  # fmt: skip
    # One box for each axis that grew: old cells need all values of the other axes at its new
    # values, where "all" includes those that an earlier box of this loop has just added.
    extensions, sizes = list(stored.extensions), _vectorized_sizes(old)
    for dim, size in _vectorized_sizes(grid).items():
        if size > sizes[dim]:
            box = {other: (0, held) for other, held in sizes.items()}
            extensions.append(box | {dim: (sizes[dim], size)})
            sizes[dim] = size
    outputs = tuple(_resized(output, sizes) for output in stored.outputs)
    return replace(
        stored, grid=grid, extensions=tuple(extensions), outputs=outputs, reduction=reduction
    )


def _resized(output: Output, sizes: Mapping[str, int]) -> Output:
    shape = tuple(sizes.get(d, n) for d, n in zip(output.dims, output.shape, strict=True))
    return replace(output, shape=shape)


def restricted_to(
    grid: SweepGrid, outputs: Sequence[Output], box: Box
) -> tuple[SweepGrid, tuple[Output, ...]]:
    """A grid and its outputs with the values of vectorized axes that lie in a box."""
    vectorized = tuple(
        replace(axis, values=axis.values[slice(*box.get(axis.dim or "", (None,)))])
        for axis in grid.vectorized
    )
    sizes = {dim: stop - start for dim, (start, stop) in box.items()}
    return replace(grid, vectorized=vectorized), tuple(
        _resized(output, sizes) for output in outputs
    )
