"""What a store is a sweep of, and how two sweeps differ."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from negmaml.sweeps.contract import Output
from negmaml.sweeps.grid import Axis, Grid

FORMAT = 2
Box = dict[str, list[int]]  # whole axis: its first and one past its last position


def manifest(
    function: str, version: str, root: int, grid: Grid, outputs: Sequence[Output], x64: bool
) -> dict[str, Any]:
    """What a store is a sweep of, as JSON: everything that its numbers depend on."""
    axes = [(axis, role) for role, axes in (("cell", grid.axes), ("whole", grid.whole))
            for axis in axes]  # fmt: skip
    return {
        "format": FORMAT,
        "function": function,
        "version": version,
        "root": root,
        "x64": x64,
        "axes": {
            ",".join(axis.names): {
                "role": role,
                "dim": axis.dim,
                "static": [name for name in axis.names if name in grid.static],
                "values": [list(row) for row in axis.values],
            }
            for axis, role in axes
        },
        "parts": [],
        "common": sorted(grid.common),
        "seeds": list(grid.seeds),
        "outputs": {o.name: [o.dtype, list(o.dims), list(o.shape)] for o in outputs},
    }


def differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(what cannot be reconciled, what can be added), each in words."""
    wrong: list[str] = []
    more: list[str] = []
    for field in ("format", "root", "x64", "common"):
        if stored[field] != asked[field]:
            wrong.append(f"{field}: store has {stored[field]}, asked {asked[field]}")
    held, wanted = _own_shapes(stored), _own_shapes(asked)
    if held != wanted:
        wrong.append(f"outputs: store has {held}, asked {wanted}")
    for name in [*stored["axes"], *(n for n in asked["axes"] if n not in stored["axes"])]:
        old, new = (m["axes"].get(name) for m in (stored, asked))
        if old is None or new is None:
            has = "no" if old is None else "an"
            wrong.append(f"axis {name}: store has {has} axis of that name")
            continue
        for field in ("role", "dim", "static"):
            if old[field] != new[field]:
                wrong.append(f"axis {name}: {field} is {old[field]}, asked {new[field]}")
        change, loses = _change(f"axis {name}", old["values"], new["values"])
        if change:
            (wrong if loses or old["dim"] is None else more).append(change)
    change, loses = _change("seeds", stored["seeds"], asked["seeds"])
    if change:
        (wrong if loses else more).append(change)
    return wrong, more


def _own_shapes(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Outputs, with no sizes of whole axes, which may grow."""
    whole = _whole_sizes(manifest)
    return {
        name: [dtype, dims, [None if d in whole else n for d, n in zip(dims, shape, strict=True)]]
        for name, (dtype, dims, shape) in manifest["outputs"].items()
    }


def _whole_sizes(manifest: Mapping[str, Any]) -> dict[str, int]:
    axes = manifest["axes"].values()
    return {a["dim"]: len(a["values"]) for a in axes if a["role"] == "whole" and a["dim"]}


def _change(what: str, old: list, new: list) -> tuple[str, bool]:
    """How two lists of values differ beyond their order, and whether the new one has less."""

    def text(values):
        shown = [v[0] if isinstance(v, list) and len(v) == 1 else v for v in values]
        return f"{len(shown)} ({', '.join(map(str, shown[:4]))}{', ...' if len(shown) > 4 else ''})"

    added, lost = [v for v in new if v not in old], [v for v in old if v not in new]
    parts = [f"{word} {text(v)}" for word, v in (("adds", added), ("lacks", lost)) if v]
    return (f"{what}: asked {' and '.join(parts)}" if parts else ""), bool(lost)


def longer_whole_axes(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Whole axes to which the asked sweep adds values."""
    return [
        name
        for name, axis in stored["axes"].items()
        if axis["role"] == "whole" and _change("", axis["values"], asked["axes"][name]["values"])[0]
    ]


def extended(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """The stored sweep with what the asked one adds to it, appended.

    New values of whole axes make one part for each such axis: a box over the whole axes that
    cells computed before have yet to get.
    """
    axes = {
        name: axis | {"values": _append(axis["values"], asked["axes"][name]["values"])}
        for name, axis in stored["axes"].items()
    }
    parts = list(stored["parts"])
    sizes, new_sizes = _whole_sizes(stored), _whole_sizes({"axes": axes})
    for dim in sizes:
        if new_sizes[dim] > sizes[dim]:
            box = {other: [0, size] for other, size in sizes.items()}
            parts.append(box | {dim: [sizes[dim], new_sizes[dim]]})
            sizes[dim] = new_sizes[dim]
    outputs = {
        name: [dtype, dims, [sizes.get(d, n) for d, n in zip(dims, shape, strict=True)]]
        for name, (dtype, dims, shape) in stored["outputs"].items()
    }
    seeds = _append(stored["seeds"], asked["seeds"])
    return {**stored, "axes": axes, "parts": parts, "outputs": outputs, "seeds": seeds}


def _append(old: list, new: list) -> list:
    return [*old, *(value for value in new if value not in old)]


def part_of(grid: Grid, outputs: Sequence[Output], box: Box) -> tuple[Grid, tuple[Output, ...]]:
    """A grid and its outputs with the values of whole axes that lie in a box."""
    whole = tuple(
        replace(axis, values=axis.values[slice(*box[axis.dim])]) if axis.dim in box else axis
        for axis in grid.whole
    )
    sizes = {dim: stop - start for dim, (start, stop) in box.items()}
    shapes = [
        replace(o, shape=tuple(sizes.get(d, n) for d, n in zip(o.dims, o.shape, strict=True)))
        for o in outputs
    ]
    return replace(grid, whole=whole), tuple(shapes)


def grid_of(stored: Mapping[str, Any]) -> Grid:
    axes: dict[str, list[Axis]] = {"cell": [], "whole": []}
    static = set()
    for names, axis in stored["axes"].items():
        rows = tuple(tuple(row) for row in axis["values"])
        axes[axis["role"]].append(Axis(axis["dim"], tuple(names.split(",")), rows))
        static |= set(axis["static"])
    return Grid(
        tuple(axes["cell"]), tuple(axes["whole"]), tuple(stored["seeds"]), frozenset(static),
        frozenset(stored["common"]),
    )  # fmt: skip


def array_shapes(grid: Grid, outputs: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every array with the dims of the cells."""
    shapes = {name: (*grid.shape, *shape) for name, (_, _, shape) in outputs.items()}
    return shapes | {"finite": grid.shape, "done": grid.shape}
