"""Checks of the description of a store, which anybody may have written.

New stores pass the same checks, so that they can be opened again.
"""

import json
import math
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np

from negmaml.sweeps.layout import LABELS, MAX_LABELS, ROUND, Layout, layouts
from negmaml.sweeps.manifest import COMPLETED, Manifest
from negmaml.sweeps.reduce import MOMENTS

MAX_TEXT = 2**26  # bytes of JSON
MAX_CELLS = 10**9
MAX_BLOCKS = 2**18
MAX_CHUNK = 2**30  # bytes
MAX_EXTENSIONS = 254  # the completion counts are bytes
MAX_NAME = 200  # characters
FORBIDDEN = ("", "zarr.json")


def parsed(text: bytes | str, what: str) -> Any:
    """Parse JSON of unknown origin; ValueError if it is invalid, too long or too deep."""

    # json accepts NaN and Infinity, which JSON does not have.
    def constant(name: str):
        raise ValueError(f"{what} holds {name}, which is no JSON")

    if len(text) > MAX_TEXT:
        raise ValueError(f"{what} is larger than {MAX_TEXT:,} bytes")
    try:
        return json.loads(text, parse_constant=constant)
    except RecursionError as error:
        raise ValueError(f"{what} is nested too deeply") from error


def parse_manifest(text: Any) -> Manifest:
    """The manifest in a text, with every bound checked; ValueError that names the fault."""
    if not isinstance(text, str):
        raise ValueError("its manifest is no text")
    held = parsed(text, "its manifest")
    if not isinstance(held, dict):
        raise ValueError("its manifest is no table")
    manifest = Manifest.from_held(held)
    check_manifest(manifest)
    return manifest


def check_manifest(manifest: Manifest) -> None:
    """Raise ValueError for a manifest that no store can have."""
    for field in ("function", "version"):
        _require(_text(getattr(manifest, field)), field, getattr(manifest, field))
    _require(_whole_number(manifest.root_seed, 2**32), "root_seed", manifest.root_seed)
    _require(isinstance(manifest.x64, bool), "x64", manifest.x64)
    # In this order: the arrays in `_check_block` follow from a valid grid and valid outputs.
    _check_grid(manifest)
    _check_outputs(manifest)
    _check_extensions(manifest)
    _check_label_chunks(manifest)
    _check_block(manifest)
    _check_programs(manifest)


def _require(right: bool, what: str, value: Any) -> None:
    if not right:
        text = repr(value)
        raise ValueError(f"{what} cannot be {text if len(text) < 100 else text[:100] + '...'}")


def _bound(what: str, number: int, most: int, remedy: str) -> None:
    if number > most:
        raise ValueError(f"it has {number:,} {what}, and {most:,} are the most; {remedy}")


def _whole_number(value: Any, below: int, least: int = 0) -> bool:
    # isinstance would accept True, which is an int.
    return type(value) is int and least <= value < below


def _text(value: Any) -> bool:
    """True if it is a printable string of bounded length."""
    # Texts appear in messages, where control characters could steer a terminal.
    return isinstance(value, str) and len(value) <= MAX_TEXT and value.isprintable()


def is_name(value: Any) -> bool:
    """True if an array or dim can have the name: one path component, and not a file of zarr."""
    return (
        # Names become folders: separators and leading dots could lead out of the store.
        _text(value)
        and len(value) <= MAX_NAME
        and value not in FORBIDDEN
        and not value.startswith(("__", "."))
        and not set(value) & set("/\\")
    )


def _check_grid(manifest: Manifest) -> None:
    grid = manifest.grid
    names: list[str] = []
    for axis in (*grid.axes, *grid.vectorized):
        _require(axis.dim is None or is_name(axis.dim), "a dim", axis.dim)
        _require(bool(axis.names) and all(map(is_name, axis.names)), "the names of an axis", axis)
        _require(len(axis) > 0, "the values of an axis", axis.values)
        _require(axis.dim is not None or len(axis) == 1, "the values of a constant", axis.values)
        for row in axis.values:
            _require(len(row) == len(axis.names), f"a row of {axis.names}", row)
            _require(all(map(_value, row)), f"a value of {axis.names}", row)
        _require(len(set(axis.values)) == len(axis), f"values of {axis.names}, twice", axis.values)
        texts = [value for row in axis.values for value in row if isinstance(value, str)]
        # NumPy pads all strings of an axis to the longest one.
        longest = max(map(len, texts), default=0)
        _require(4 * longest * len(axis) <= MAX_CHUNK, f"texts of {axis.names}, too long", longest)
        names += axis.names
    _require(len(set(names)) == len(names), "names, twice,", names)
    for kind in (grid.static, grid.common):
        _require(kind <= set(names), "static and common axes", sorted(map(str, kind)))
    dims = [axis.dim for axis in (*grid.axes, *grid.vectorized) if axis.dim]
    _require(len(set(dims)) == len(dims) and "seed" not in dims, "dims, twice,", dims)
    _check_seeds(grid.seeds)
    if (reduction := manifest.reduction) is not None:
        _check_seeds(reduction.seeds)
        _require(reduction.firsts == grid.seeds, "the chunks of seeds", reduction.bounds)
        held = {output.name for output in manifest.outputs}
        bases = {name.removesuffix("_m2") for name in held if name.endswith("_m2")}
        moments = {f"{base}_{moment}" for base in bases for moment in MOMENTS}
        _require(moments == held, "the moments over seeds", sorted(held))
    _bound("cells", grid.cells, MAX_CELLS, "spread them over several stores")


def _check_seeds(seeds: range | tuple[int, ...]) -> None:
    # Both ends of a range bound all of it.
    tested = [seeds[i] for i in (0, -1) if seeds] if isinstance(seeds, range) else seeds
    wrong = [seed for seed in tested if not _whole_number(seed, 2**32)]
    _require(bool(seeds) and not wrong, "seeds", wrong[:1])
    distinct = isinstance(seeds, range) or len(set(seeds)) == len(seeds)
    _require(distinct, "seeds, twice,", seeds)


def _value(value: Any) -> bool:
    """True if it is a valid value of a grid: a number, truth value or string."""
    if isinstance(value, str):
        return len(value) <= MAX_TEXT
    if isinstance(value, float):
        return math.isfinite(value)
    # Labels are stored as int64.
    return isinstance(value, bool) or (type(value) is int and abs(value) < 2**63)


def _check_outputs(manifest: Manifest) -> None:
    grid = manifest.grid
    sizes = {axis.dim: len(axis) for axis in grid.vectorized}
    taken = {
        *COMPLETED.values(),
        "finite",
        "seed",
        *(n for a in (*grid.axes, *grid.vectorized) for n in a.names),
    }
    for output in manifest.outputs:
        _require(is_name(output.name) and output.name not in taken, "an output", output.name)
        taken.add(output.name)
        _require(all(map(is_name, output.dims)), f"dims of {output.name}", output.dims)
        dims = (*grid.dims, *output.dims)
        _require(len(set(dims)) == len(dims), f"dims of {output.name}, twice,", dims)
        fits = len(output.dims) == len(output.shape) and all(
            _whole_number(n, 2**31) and n == sizes.get(d, n)
            for d, n in zip(output.dims, output.shape, strict=True)
        )
        _require(fits, f"shape of {output.name}", output.shape)
        _require(_plain_dtype(output.dtype), f"dtype of {output.name}", output.dtype)


def _plain_dtype(name: Any) -> bool:
    """True if it is the name of a NumPy dtype of numbers."""
    try:
        # np.dtype also reads structures such as "i4,f8"; only plain names may pass.
        dtype = np.dtype(name) if isinstance(name, str) and name.isalnum() else None
    except TypeError:
        return False
    return (
        dtype is not None and dtype.kind in "biufc" and dtype.name == name and dtype.itemsize < 17
    )


def _check_extensions(manifest: Manifest) -> None:
    sizes = {axis.dim: len(axis) for axis in manifest.grid.vectorized if axis.dim}
    _require(
        len(manifest.extensions) <= MAX_EXTENSIONS, "number of extensions", len(manifest.extensions)
    )
    for box in manifest.extensions:
        # A box with other bounds would index outside of the arrays.
        right = set(box) == set(sizes) and all(
            len(pair) == 2 and all(_whole_number(n, sizes[dim] + 1) for n in pair)
            and pair[0] < pair[1] for dim, pair in box.items()
        )  # fmt: skip
        _require(right, "an extension", dict(box))


def _check_label_chunks(manifest: Manifest) -> None:
    dims = {"seed", *(a.dim for a in (*manifest.grid.axes, *manifest.grid.vectorized) if a.dim)}
    for dim, size in manifest.label_chunks.items():
        right = dim in dims and _whole_number(size, MAX_LABELS + 1, least=LABELS)
        _require(right, "a chunk of labels", (dim, size))


def _check_block(manifest: Manifest) -> None:
    shape, block = manifest.grid.shape, manifest.block
    right = len(block) == len(shape) and all(
        _whole_number(size, n + ROUND + 1, least=1) for size, n in zip(block, shape, strict=True)
    )
    _require(right, f"block of cells of the shape {shape}", block)
    blocks = math.prod(-(-n // size) for n, size in zip(shape, block, strict=True))
    _bound("blocks", blocks, MAX_BLOCKS, "choose a larger block")
    for layout in layouts(manifest).values():
        check_chunks(layout)


def check_chunks(layout: Layout) -> None:
    """Raise ValueError for an array with too many or too large chunks."""
    size, number = layout.chunk_bytes, math.prod(layout.chunks)
    if layout.texts is None and size > MAX_CHUNK:
        raise ValueError(
            f"{layout.name} has chunks of {size:,} bytes, and {MAX_CHUNK:,} are the most; choose "
            "a smaller block, or smaller outputs"
        )
    _bound(f"chunks of {layout.name}", number, 4 * MAX_BLOCKS, "choose a larger block")


def _check_programs(manifest: Manifest) -> None:
    held = manifest.programs
    right = isinstance(held, Mapping) and all(map(_text, chain(held.keys(), held.values())))
    _require(right, "programs", held)
    for group, identity in manifest.described.items():
        _require(_text(group), "a group", group)
        for field, value in identity.to_json().items():
            _require(all(map(_plain, _leaves(value))), f"{field} of a program", value)


def _leaves(value: Any) -> Iterator[Any]:
    """All values in nested tables and lists, and all keys."""
    if isinstance(value, Mapping):
        value = chain(value.keys(), value.values())
    elif not isinstance(value, list | tuple):
        yield value
        return
    for one in value:
        yield from _leaves(one)


def _plain(value: Any) -> bool:
    return _text(value) or value is None or isinstance(value, bool | int | float)


def check_attributes(attributes: Mapping[str, Any]) -> None:
    """Raise ValueError for attributes of other types than a sweep writes."""
    seconds = attributes.get("wall_seconds", 0.0)
    _require(isinstance(seconds, int | float) and 0 <= seconds < 1e12, "wall_seconds", seconds)
    history = attributes.get("history", [])
    _require(isinstance(history, list) and all(map(_text, history)), "history", history)
