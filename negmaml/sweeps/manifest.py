"""What a store is a sweep of, and how two sweeps differ."""

from collections.abc import Mapping, Sequence
from typing import Any

from negmaml.sweeps.contract import Output
from negmaml.sweeps.grid import Axis, Grid

FORMAT = 1


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
        "common": sorted(grid.common),
        "seeds": list(grid.seeds),
        "outputs": {o.name: [o.dtype, list(o.dims), list(o.shape)] for o in outputs},
    }


def differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(what cannot be reconciled, what can be added), each in words."""
    wrong, more = [], []
    for field in ("format", "root", "x64", "common", "outputs"):
        if stored[field] != asked[field]:
            wrong.append(f"{field}: store has {stored[field]}, asked {asked[field]}")
    for name in [*stored["axes"], *(n for n in asked["axes"] if n not in stored["axes"])]:
        old, new = (m["axes"].get(name) for m in (stored, asked))
        if old is None or new is None:
            has = "no" if old is None else "an"
            wrong.append(f"axis {name}: store has {has} axis of that name")
            continue
        for field in ("role", "dim", "static"):
            if old[field] != new[field]:
                wrong.append(f"axis {name}: {field} is {old[field]}, asked {new[field]}")
        if old["values"] == new["values"]:
            continue
        change = _change(f"axis {name}", old["values"], new["values"])
        if change[1] and old["role"] == "whole":
            wrong.append(
                f"{change[0]}, an axis handled whole; sweep the new values into a store of "
                "their own and join both with xarray.concat: they share their random numbers"
            )
        elif change[1] and old["dim"] is not None:
            more.append(change[0])
        else:
            wrong.append(change[0])
    if stored["seeds"] != asked["seeds"]:
        change = _change("seeds", stored["seeds"], asked["seeds"])
        (more if change[1] else wrong).append(change[0])
    return wrong, more


def _change(what: str, old: list, new: list) -> tuple[str, bool]:
    """How two lists of values differ, and whether the new one has all of the old."""

    def text(values):
        shown = [v[0] if isinstance(v, list) and len(v) == 1 else v for v in values]
        return f"{len(shown)} ({', '.join(map(str, shown[:4]))}{', ...' if len(shown) > 4 else ''})"

    added, lost = [v for v in new if v not in old], [v for v in old if v not in new]
    if not added and not lost:
        return f"{what}: the same values in another order; keep the order of the store", False
    parts = [f"{word} {text(v)}" for word, v in (("adds", added), ("lacks", lost)) if v]
    return f"{what}: asked {' and '.join(parts)}", not lost


def append(old: list, new: list) -> list:
    return [*old, *(value for value in new if value not in old)]


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
