"""Lost data: chunks that are missing or altered although their cells are flagged as done.

zarr reads a chunk that is missing as fill values. So cells count as done only as far as the chunks
of all outputs are there and have the bytes that they can have, which one listing of the files
tells. Reading every chunk also finds altered ones, by their checksums.
"""

import contextlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from negmaml.sweeps.exclusive import beside
from negmaml.sweeps.guard import guarded, zarr_arrays
from negmaml.sweeps.held import Held
from negmaml.sweeps.layout import Layout, cell_layouts, coordinates, sizes_at
from negmaml.sweeps.manifest import Manifest
from negmaml.sweeps.storage import StoreError, files_of
from negmaml.sweeps.store import Store, encoded, flags, write_blocks
from negmaml.sweeps.untrusted import MOST_TEXT, parsed

AT_ONCE = 2**30  # bytes that a sweep verifies before it starts: about a second
READERS = 16
MISSING = "is missing"
NOTE, NOTES = "damaged", "chunks"  # the file beside a store that says which chunks are damaged


@dataclass(frozen=True)
class Found:
    """The cells that a store has, and the chunks that it lost.

    flagged: how many parts each cell has by its flag. done: the same as far as their chunks are
    there. lost: the fault of each chunk that is not as it was written, by its file. damaged: the
    same for all files of other bytes than were written, also of cells that are not done.
    """

    flagged: np.ndarray
    done: np.ndarray
    lost: Mapping[str, str]
    damaged: Mapping[str, str] = field(default_factory=dict)


def found_in(url: str, held: Held, check: bool = False, only: Iterable[str] | None = None) -> Found:
    """Look through the store at `url`; `check` reads every chunk, or those of the files `only`."""
    manifest = held.manifest
    cells = {name: held.layouts[name] for name in cell_layouts(manifest)}
    arrays = zarr_arrays(guarded(url, cells))
    raw = flags(
        arrays[manifest.completed], cells[manifest.completed]
    )  # before the files, which are written first
    sizes = files_of(url).sizes()
    faults = _wrong_sizes(held.layouts, sizes)
    if check:
        keys = [key for key in (sizes if only is None else only) if key in sizes]
        faults |= _altered(url, held.layouts, [key for key in keys if key not in faults])
        faults |= _other_labels(url, held, faults) if only is None else {}
    there = {name: _there(layout, sizes, faults) for name, layout in cells.items()}
    _accept_fill_values(manifest, cells, arrays, raw, there)
    levels = _levels(manifest, cells, there)
    done = np.minimum(raw, _over_cells(levels, cells[manifest.completed]))
    lost = _lost_chunks(manifest, cells, raw, there, faults)
    for name in held.layouts.keys() - cells.keys():
        layout = held.layouts[name]
        for at in np.ndindex(*layout.chunks):
            if (key := layout.key(at)) not in sizes or key in faults:
                lost[key] = faults.get(key, MISSING)
    return Found(raw, done, dict(sorted(lost.items())), faults)


def _wrong_sizes(arrays: Mapping[str, Layout], sizes: Mapping[str, int]) -> dict[str, str]:
    """Chunks that have bytes that they cannot have."""
    found = {}
    for key, size in sizes.items():
        layout = arrays.get(key.partition("/")[0])
        at = layout.position(key) if layout else None
        if layout and at is not None and layout.wrong_size(at, size):
            found[key] = f"has {size:,} bytes"
    return found


def _altered(url: str, arrays: Mapping[str, Layout], keys: Iterable[str]) -> dict[str, str]:
    """The faults of those of these chunks that are not as they were written."""
    files = files_of(url)

    def fault(key: str) -> tuple[str, str]:
        layout = arrays.get(key.partition("/")[0])
        at = layout.position(key) if layout else None
        if layout is None or at is None:
            return key, ""
        data = files.read(key)
        return key, MISSING if data is None else layout.fault(at, data)

    with ThreadPoolExecutor(READERS) as readers:
        return {key: wrong for key, wrong in readers.map(fault, keys, chunksize=64) if wrong}


def _other_labels(url: str, held: Held, faults: Mapping[str, str]) -> dict[str, str]:
    """Coordinates of other values than the sweep has."""
    labels = coordinates(held.manifest.grid)
    arrays = zarr_arrays(guarded(url, {name: held.layouts[name] for name in labels}))
    found: dict[str, str] = {}
    for name, (_, values) in labels.items():
        with contextlib.suppress(StoreError):  # known by now
            if not np.array_equal(np.asarray(arrays[name][...]).astype(values.dtype), values):
                keys = map(held.layouts[name].key, np.ndindex(*held.layouts[name].chunks))
                found |= {key: "has other values" for key in keys if key not in faults}
    return found


def _there(
    layout: Layout, sizes: Mapping[str, int], faults: Mapping[str, str]
) -> np.ndarray:  # fmt: skip
    """Which chunks of an array are there."""
    found = np.zeros(layout.chunks, bool)
    prefix = f"{layout.name}/c/"
    for key in sizes:
        if key.startswith(prefix) and key not in faults:
            at = layout.position(key)
            if at is not None:
                found[at] = True
    return found


def _accept_fill_values(manifest: Manifest, cells, arrays, raw, there) -> None:
    """In stores without checksums, chunks that hold only fill values were not written."""
    if cells[manifest.completed].checksum:
        return
    finite = np.asarray(arrays["finite"][...]) & (raw > 0)
    some = _over_blocks(finite.astype(np.uint8), cells[manifest.completed]) > 0
    for name, layout in cells.items():
        if name != manifest.completed:
            kept = some.reshape(*some.shape, *[1] * (there[name].ndim - some.ndim))
            there[name] |= ~kept if layout.floating else True


def _over_blocks(values: np.ndarray, layout: Layout) -> np.ndarray:
    """The largest value in each block."""
    for axis, (n, size) in enumerate(zip(layout.shape, layout.chunk, strict=True)):
        values = np.maximum.reduceat(values, np.arange(0, n, size), axis)
    return values


def _over_cells(values: np.ndarray, layout: Layout) -> np.ndarray:
    """The value of its block at each cell."""
    at = (np.arange(n) // size for n, size in zip(layout.shape, layout.chunk, strict=True))
    return values[np.ix_(*at)]


def _needed(manifest: Manifest, layout: Layout, level: int) -> tuple[slice, ...]:
    """The chunks over the dims of an output that cells of a level have."""
    sizes, cells = sizes_at(manifest, level), len(manifest.grid.shape)
    dims, chunk, shape = layout.dims[cells:], layout.chunk[cells:], layout.shape[cells:]
    triples = zip(dims, shape, chunk, strict=True)
    return tuple(slice(-(-sizes.get(dim, n) // size)) for dim, n, size in triples)


def _levels(manifest: Manifest, cells: Mapping[str, Layout], there) -> np.ndarray:
    """How many parts the chunks of each block can hold."""
    found = np.zeros(cells[manifest.completed].chunks, np.uint8)
    inner = tuple(range(found.ndim, found.ndim + 64))
    for level in range(1, 2 + len(manifest.parts)):
        right = np.ones(found.shape, bool)
        for name, layout in cells.items():
            part = there[name][(..., *_needed(manifest, layout, level))]
            right &= part.all(inner[: part.ndim - found.ndim])
        found[right] = level
    return found


def _lost_chunks(manifest: Manifest, cells, raw, there, faults) -> dict[str, str]:
    """The chunks that flagged cells need and that are not there."""
    claimed = np.minimum(_over_blocks(raw, cells[manifest.completed]), 1 + len(manifest.parts))
    lost = {key: text for key, text in faults.items() if key.startswith(f"{manifest.completed}/c/")}
    for level in np.unique(claimed[claimed > 0]):
        for name, layout in cells.items():
            part = there[name][(..., *_needed(manifest, layout, int(level)))]
            blocks = (claimed == level).reshape(*claimed.shape, *[1] * (part.ndim - claimed.ndim))
            for at in np.argwhere(blocks & ~part).tolist():
                key = layout.key(at)
                lost[key] = faults.get(key, MISSING)
    return lost


def mend(store: Store, check: bool) -> list[str]:
    """Clear the flags of lost cells, so that they are computed again; no worker may be active.

    check: whether to verify the whole store first, unless it is large. Chunks that `status` found
    are always looked at. Returns the lost chunks in words.
    """
    held = Held(store.attributes, store.manifest, store.layouts)
    noted, notes = _noted(store.url)
    only: Iterable[str] | None = noted
    if check and sum(store.files.sizes().values()) <= AT_ONCE:
        only = None
    found = found_in(store.url, held, check or bool(noted), only)
    for key in found.damaged:
        if found.damaged[key] != MISSING:
            store.files.remove(key)
    for name, (_, values) in coordinates(store.manifest.grid).items():
        if any(key.startswith(f"{name}/c") for key in found.lost):
            for key, data in encoded(store.layouts[name], values).items():
                store.files.write(key, data)
    write_blocks(store.arrays[store.manifest.completed], found.done, found.flagged != found.done)
    if noted:
        notes.remove(NOTES)
        notes.clear()
    return [f"{key} {fault}" for key, fault in found.lost.items()]


def note(url: str, damaged: Mapping[str, str]) -> None:
    """Say beside a store which chunks are damaged, for the next sweep, if that can be written."""
    with contextlib.suppress(OSError, StoreError):
        notes = beside(url, NOTE)
        if notes.names():
            notes.remove(NOTES)
        if damaged:
            notes.create(NOTES, json.dumps(list(damaged)))


def _noted(url: str) -> tuple[list[str], Any]:
    """The files that were found damaged, and where that is written."""
    notes = beside(url, NOTE)
    held: Any = []
    with contextlib.suppress(ValueError):
        held = parsed(notes.read(NOTES, MOST_TEXT) or "[]", "the note of damaged chunks")
    return [key for key in held if isinstance(key, str)] if isinstance(held, list) else [], notes
