"""Lost data: chunks that are missing or altered although their cells are flagged as complete.

zarr reads a missing chunk as fill values. So a cell counts as complete only if the chunks of all
outputs exist and have a possible size, which one listing of the files shows. Reading every chunk
also finds altered ones by their checksums.
"""

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from negmaml.sweeps.chunks import decode, encoded, fault, read_chunk
from negmaml.sweeps.description import StoreDescription
from negmaml.sweeps.flags import BlockFlags, flags_of
from negmaml.sweeps.layout import Layout, cell_layouts, coordinates, sizes_at
from negmaml.sweeps.manifest import Manifest
from negmaml.sweeps.storage import Storage, StoreError, in_batches, storage_at, storage_beside
from negmaml.sweeps.store import SweepStore
from negmaml.sweeps.untrusted import MAX_TEXT, parsed

MAX_VERIFIED = 2**30  # bytes that a sweep verifies before it starts: about a second
FILE = 2**14  # bytes that take as long as opening a file
MISSING = "is missing"
NOTE, NOTES = "damaged", "chunks"  # the folder and file beside a store that list damaged chunks


@dataclass(frozen=True)
class Found:
    """The levels that the cells of a store have, and the chunks that it lost.

    flags: the levels of cells by their flags. possible: the highest level of each block whose
    chunks exist; a cell has the lower one of both. lost: the fault of each missing or altered chunk
    of a flagged cell, by its file. damaged: the same for all altered files, also of cells that are
    not complete.
    """

    flags: BlockFlags
    possible: np.ndarray
    lost: Mapping[str, str]
    damaged: Mapping[str, str] = field(default_factory=dict)

    def levels(self) -> np.ndarray:
        """The level of every cell of the grid."""
        layout = self.flags.layout
        found = np.empty(layout.shape, np.uint8)
        for at in np.ndindex(*layout.chunks):
            found[layout.region(at)] = np.minimum(self.flags.cells(at), self.possible[at])
        return found


def found_in(
    url: str, held: StoreDescription, check: bool = False, only: Iterable[str] | None = None
) -> Found:
    """Compare flags and files of the store at `url`.

    check: whether to read every chunk and verify its checksum; `only` limits this to some files.
    """
    manifest, files = held.manifest, storage_at(url)
    cells = {name: held.layouts[name] for name in cell_layouts(manifest)}
    # Flags are read before the other files are listed: a writer writes them last, so none of those
    # files can be missed.
    layout = cells[manifest.completed]
    flags = flags_of(files, layout)
    sizes = files.sizes()
    there, faults = _existing(held.layouts, sizes)
    if check:
        keys = [key for key in (sizes if only is None else only) if key in sizes]
        faults |= _altered(files, held.layouts, [key for key in keys if key not in faults])
        faults |= _other_labels(files, held, faults) if only is None else {}
        for key in faults:
            name = key.partition("/")[0]
            if name in there and (at := held.layouts[name].position(key)) is not None:
                there[name][at] = False
    _accept_fill_values(url, manifest, cells, flags, there)
    # A flag may claim more than the files hold, and files may exist before their flag.
    possible = _possible_levels(manifest, cells, there)
    lost = _lost_chunks(manifest, cells, flags, there, faults)
    # Coordinates have no flags: every chunk of them has to exist.
    for name in held.layouts.keys() - cells.keys():
        layout = held.layouts[name]
        for at in map(tuple, np.argwhere(~there[name]).tolist()):
            key = layout.key(at)
            lost[key] = faults.get(key, MISSING)
    return Found(flags, possible, dict(sorted(lost.items())), faults)


def _existing(
    arrays: Mapping[str, Layout], sizes: Mapping[str, int]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(masks of the chunks that exist without a fault, faults of files of impossible sizes)."""
    there = {name: np.zeros(layout.chunks, bool) for name, layout in arrays.items()}
    faults = {}
    for key, size in sizes.items():
        layout = arrays.get(key.partition("/")[0])
        at = layout.position(key) if layout else None
        if layout is None or at is None:
            continue
        if layout.wrong_size(at, size):
            faults[key] = f"has {size:,} bytes"
        else:
            there[layout.name][at] = True
    return there, faults


def _altered(files: Storage, arrays: Mapping[str, Layout], keys: Sequence[str]) -> dict[str, str]:
    """Read these chunks and return the faults of missing and altered ones."""

    def found(key: str) -> str:
        layout = arrays.get(key.partition("/")[0])
        at = layout.position(key) if layout else None
        if layout is None or at is None:
            return ""
        data = files.read(key, layout.most_bytes(at))
        return MISSING if data is None else fault(layout, at, data)

    return {k: wrong for k, wrong in zip(keys, in_batches(found, keys), strict=True) if wrong}


def _other_labels(files: Storage, held: StoreDescription, faults: Mapping[str, str]):
    """The faults of coordinates whose values differ from the grid."""
    found: dict[str, str] = {}
    for name, (_, values) in coordinates(held.manifest.grid).items():
        layout = held.layouts[name]
        for at in np.ndindex(*layout.chunks):
            key, part = layout.key(at), np.asarray(values[layout.region(at)])
            data = files.read(key, layout.most_bytes(at))
            if key in faults or data is None or fault(layout, at, data):
                continue
            stored = np.asarray(decode(layout, data)[tuple(map(slice, part.shape))])
            if not np.array_equal(stored.astype(values.dtype), part):
                found[key] = "has other values"
    return found


def _accept_fill_values(url: str, manifest: Manifest, cells, flags: BlockFlags, there) -> None:
    """Accept missing chunks of fill values in old stores, which did not write them.

    Old stores have no checksums. A chunk of floats may be missing only if none of its cells is
    finite, because its fill value is NaN.
    """
    if cells[manifest.completed].checksum:
        return
    layout = cells["finite"]
    some = np.zeros(layout.chunks, bool)
    for at in map(tuple, np.argwhere((flags.high > 0) & there["finite"]).tolist()):
        finite = read_chunk(url, storage_at(url), layout, at)
        levels = flags.cells(at)
        some[at] = finite is not None and (finite[tuple(map(slice, levels.shape))] & levels).any()
    for name, layout in cells.items():
        if name != manifest.completed:
            kept = some.reshape(*some.shape, *[1] * (there[name].ndim - some.ndim))
            there[name] |= ~kept if layout.floating else True


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


def _lost_chunks(manifest: Manifest, cells, flags: BlockFlags, there, faults) -> dict[str, str]:
    """The missing or altered chunks that flagged cells need."""
    # The most complete cell of a block decides which chunks it needs. A copy made during an
    # extension can have flags beyond the levels of its manifest.
    claimed = np.minimum(flags.high, manifest.num_levels)
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
    if check:
        sizes = store.storage.sizes().values()
        only = None if sum(max(size, FILE) for size in sizes) <= MAX_VERIFIED else noted
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
    for at in map(tuple, np.argwhere(found.flags.high > found.possible).tolist()):
        store.write_flags(at, np.minimum(found.flags.cells(at), found.possible[at]))
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
