"""Lost data: chunks that are missing or altered although their cells are flagged as complete.

zarr reads a missing chunk as fill values. So a cell counts as complete only if the chunks of all
outputs exist and have a possible size, which one listing of the files shows. Reading every chunk
also finds altered ones by their checksums.
"""

import contextlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from negmaml.sweeps.description import StoreDescription
from negmaml.sweeps.guard import guarded, zarr_arrays
from negmaml.sweeps.layout import Layout, cell_layouts, coordinates, sizes_at
from negmaml.sweeps.manifest import Manifest
from negmaml.sweeps.storage import StoreError, storage_at, storage_beside
from negmaml.sweeps.store import SweepStore, encoded, flags, write_blocks
from negmaml.sweeps.untrusted import MAX_TEXT, parsed

MAX_VERIFIED = 2**30  # bytes that a sweep verifies before it starts: about a second
READERS = 16
MISSING = "is missing"
NOTE, NOTES = "damaged", "chunks"  # the folder and file beside a store that list damaged chunks


@dataclass(frozen=True)
class Found:
    """The levels that the cells of a store have, and the chunks that it lost.

    flagged: the levels of each cell by its flag. levels: the levels whose chunks exist. lost: the
    fault of each missing or altered chunk of a flagged cell, by its file. damaged: the same for all
    altered files, also of cells that are not complete.
    """

    flagged: np.ndarray
    levels: np.ndarray
    lost: Mapping[str, str]
    damaged: Mapping[str, str] = field(default_factory=dict)


def found_in(
    url: str, held: StoreDescription, check: bool = False, only: Iterable[str] | None = None
) -> Found:
    """Compare flags and files of the store at `url`.

    check: whether to read every chunk and verify its checksum; `only` limits this to some files.
    """
    manifest = held.manifest
    cells = {name: held.layouts[name] for name in cell_layouts(manifest)}
    arrays = zarr_arrays(guarded(url, cells))
    raw = flags(arrays[manifest.completed], cells[manifest.completed])
    # The files are listed after the flags: a writer writes them first, so none can be missed.
    sizes = storage_at(url).sizes()
    faults = _wrong_sizes(held.layouts, sizes)
    if check:
        keys = [key for key in (sizes if only is None else only) if key in sizes]
        faults |= _altered(url, held.layouts, [key for key in keys if key not in faults])
        faults |= _other_labels(url, held, faults) if only is None else {}
    there = {name: _there(layout, sizes, faults) for name, layout in cells.items()}
    _accept_fill_values(manifest, cells, arrays, raw, there)
    possible = _possible_levels(manifest, cells, there)
    # A flag may claim more than the files hold, and files may exist before their flag.
    levels = np.minimum(raw, _over_cells(possible, cells[manifest.completed]))
    lost = _lost_chunks(manifest, cells, raw, there, faults)
    # Coordinates have no flags: every chunk of them has to exist.
    for name in held.layouts.keys() - cells.keys():
        layout = held.layouts[name]
        for at in np.ndindex(*layout.chunks):
            if (key := layout.key(at)) not in sizes or key in faults:
                lost[key] = faults.get(key, MISSING)
    return Found(raw, levels, dict(sorted(lost.items())), faults)


def _wrong_sizes(arrays: Mapping[str, Layout], sizes: Mapping[str, int]) -> dict[str, str]:
    """The faults of chunks whose files have an impossible size."""
    found = {}
    for key, size in sizes.items():
        layout = arrays.get(key.partition("/")[0])
        at = layout.position(key) if layout else None
        if layout and at is not None and layout.wrong_size(at, size):
            found[key] = f"has {size:,} bytes"
    return found


def _altered(url: str, arrays: Mapping[str, Layout], keys: Iterable[str]) -> dict[str, str]:
    """Read these chunks and return the faults of missing and altered ones."""
    files = storage_at(url)

    def fault(key: str) -> tuple[str, str]:
        layout = arrays.get(key.partition("/")[0])
        at = layout.position(key) if layout else None
        if layout is None or at is None:
            return key, ""
        data = files.read(key)
        return key, MISSING if data is None else layout.fault(at, data)

    # Reading in parallel hides the latency of a disk or an object store.
    with ThreadPoolExecutor(READERS) as readers:
        return {key: wrong for key, wrong in readers.map(fault, keys, chunksize=64) if wrong}


def _other_labels(url: str, held: StoreDescription, faults: Mapping[str, str]) -> dict[str, str]:
    """The faults of coordinates whose values differ from the grid."""
    labels = coordinates(held.manifest.grid)
    arrays = zarr_arrays(guarded(url, {name: held.layouts[name] for name in labels}))
    found: dict[str, str] = {}
    for name, (_, values) in labels.items():
        with contextlib.suppress(StoreError):  # its fault is in `faults` already
            if not np.array_equal(np.asarray(arrays[name][...]).astype(values.dtype), values):
                keys = map(held.layouts[name].key, np.ndindex(*held.layouts[name].chunks))
                found |= {key: "has other values" for key in keys if key not in faults}
    return found


def _there(
    layout: Layout, sizes: Mapping[str, int], faults: Mapping[str, str]
) -> np.ndarray:  # fmt: skip
    """A mask of the chunks of an array that exist without a fault."""
    found = np.zeros(layout.chunks, bool)
    prefix = f"{layout.name}/c/"
    for key in sizes:
        if key.startswith(prefix) and key not in faults:
            at = layout.position(key)
            if at is not None:
                found[at] = True
    return found


def _accept_fill_values(manifest: Manifest, cells, arrays, raw, there) -> None:
    """Accept missing chunks of fill values in old stores, which did not write them.

    Old stores have no checksums. A chunk of floats may be missing only if none of its cells is
    finite, because its fill value is NaN.
    """
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
        # reduceat includes the last block, which may be smaller than the others.
        values = np.maximum.reduceat(values, np.arange(0, n, size), axis)
    return values


def _over_cells(values: np.ndarray, layout: Layout) -> np.ndarray:
    """The value of each cell's block, at the cell."""
    at = (np.arange(n) // size for n, size in zip(layout.shape, layout.chunk, strict=True))
    return values[np.ix_(*at)]


def _needed(manifest: Manifest, layout: Layout, level: int) -> tuple[slice, ...]:
    """The chunks over the dims of an output that cells of a level need."""
    sizes, cells = sizes_at(manifest, level), len(manifest.grid.shape)
    dims, chunk, shape = layout.dims[cells:], layout.chunk[cells:], layout.shape[cells:]
    triples = zip(dims, shape, chunk, strict=True)
    return tuple(slice(-(-sizes.get(dim, n) // size)) for dim, n, size in triples)


def _possible_levels(manifest: Manifest, cells: Mapping[str, Layout], there) -> np.ndarray:
    """The highest level for which each block has all chunks."""
    found = np.zeros(cells[manifest.completed].chunks, np.uint8)
    # The axes over the chunks of an output; NumPy allows at most 64 dims in all.
    inner = tuple(range(found.ndim, found.ndim + 64))
    for level in range(1, 1 + manifest.num_levels):
        right = np.ones(found.shape, bool)
        for name, layout in cells.items():
            part = there[name][(..., *_needed(manifest, layout, level))]
            right &= part.all(inner[: part.ndim - found.ndim])
        # Chunks of a level include those of all levels below, so the last match is the highest.
        found[right] = level
    return found


def _lost_chunks(manifest: Manifest, cells, raw, there, faults) -> dict[str, str]:
    """The missing or altered chunks that flagged cells need."""
    # The most complete cell of a block decides which chunks it needs. A copy made during an
    # extension can have flags beyond the levels of its manifest.
    claimed = np.minimum(_over_blocks(raw, cells[manifest.completed]), manifest.num_levels)
    # A damaged chunk of flags does not show which cells it held, so it always counts as lost.
    lost = {key: text for key, text in faults.items() if key.startswith(f"{manifest.completed}/c/")}
    for level in np.unique(claimed[claimed > 0]):
        for name, layout in cells.items():
            part = there[name][(..., *_needed(manifest, layout, int(level)))]
            blocks = (claimed == level).reshape(*claimed.shape, *[1] * (part.ndim - claimed.ndim))
            for at in np.argwhere(blocks & ~part).tolist():
                key = layout.key(at)
                lost[key] = faults.get(key, MISSING)
    return lost


def clear_lost(store: SweepStore, check: bool) -> list[str]:
    """Clear the flags of lost cells, so that they are computed again; no worker may be active.

    check: whether to verify the whole store first, unless it is large. Chunks that `status` found
    damaged are always verified. Returns a description of each lost chunk.
    """
    held = StoreDescription(store.attributes, store.manifest, store.layouts)
    noted, notes = _noted(store.url)
    only: Iterable[str] | None = noted
    # A larger store is verified by `status --check`, whose list of damaged chunks is read above.
    if check and sum(store.storage.sizes().values()) <= MAX_VERIFIED:
        only = None
    found = found_in(store.url, held, check or bool(noted), only)
    # A damaged chunk could not be read when other cells of its block are written.
    for key in found.damaged:
        if found.damaged[key] != MISSING:
            store.storage.remove(key)
    for name, (_, values) in coordinates(store.manifest.grid).items():
        if any(key.startswith(f"{name}/c") for key in found.lost):
            for key, data in encoded(store.layouts[name], values).items():
                store.storage.write(key, data)
    # A kill before this line does no harm: the removed chunks are found missing again.
    write_blocks(
        store.arrays[store.manifest.completed], found.levels, found.flagged != found.levels
    )
    # The note goes last, so that after a kill the next sweep still verifies its chunks.
    if noted:
        notes.discard(NOTES)
        notes.remove_if_empty()
    return [f"{key} {fault}" for key, fault in found.lost.items()]


def note(url: str, damaged: Mapping[str, str]) -> None:
    """List damaged chunks in a file beside the store for the next sweep, if it can be written."""
    with contextlib.suppress(OSError, StoreError):
        notes = storage_beside(url, NOTE)
        # `create` never replaces a file, so an old note has to go first.
        if notes.names():
            notes.discard(NOTES)
        if damaged:
            notes.create(NOTES, json.dumps(list(damaged)).encode())


def _noted(url: str) -> tuple[list[str], Any]:
    """The damaged files that `status` listed, and the storage of the list."""
    notes = storage_beside(url, NOTE)
    held: Any = []
    # Anybody may write beside a store; a malformed note only means that nothing is verified.
    with contextlib.suppress(ValueError):
        held = parsed(notes.read_text(NOTES, MAX_TEXT) or "[]", "the note of damaged chunks")
    return [key for key in held if isinstance(key, str)] if isinstance(held, list) else [], notes
