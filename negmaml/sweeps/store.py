"""The store: a zarr group of labelled arrays, with one chunk for each block.

It opens with `xarray.open_zarr` at any time. A kill never damages it, because each change is one
write of one file. The file `zarr.json` of the group holds the shapes of all arrays (consolidated
metadata) and the attribute `negmaml_sweep`, the manifest of the sweep:

- a new store exists once this file is written, which happens last; a mark tells files of an
  interrupted creation from other files;
- an extension writes longer coordinates, of which readers see the length that they know, and then
  this file, which switches readers to the new sizes; the metadata of single arrays follow;
- a chunk is one file with a checksum; chunks of fill values are written too, so that a missing
  chunk was lost;
- `completed` is written after the data of a block. It counts the levels that a cell has: one, and
  one more for each extension of a vectorized axis. Stores of format 3 call it `done`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from negmaml.sweeps.chunks import empty_chunk, encode, encoded, read_chunk
from negmaml.sweeps.description import MANIFEST, REMEDY, StoreDescription, read_description
from negmaml.sweeps.flags import BlockFlags, flags_of, read_flags
from negmaml.sweeps.grid import Region, SweepGrid
from negmaml.sweeps.guard import ROOT, group_metadata, text_of
from negmaml.sweeps.layout import Layout, coordinates, label_chunks, layouts
from negmaml.sweeps.manifest import Box, Manifest
from negmaml.sweeps.storage import PARTIAL, StoreError, storage_at
from negmaml.sweeps.untrusted import MAX_TEXT, check_manifest

CREATING = ".negmaml-creating"  # exists until the store is complete
WRITERS = 4  # threads that write the arrays of a block
SMALL = 2**20  # bytes of a block that one thread writes faster


class SweepStore:
    """An open store; obtain one from `create` or `open_store`.

    Blocks are written with `write`; `extend` adds values of axes and seeds.
    """

    def __init__(self, url: str, held: StoreDescription):
        self.url, self.storage = url, storage_at(url)
        self._take(held)

    def _take(self, held: StoreDescription) -> None:
        self.attributes, self.manifest, self.layouts = held.attributes, held.manifest, held.layouts

    @property
    def levels(self) -> list[Box]:
        """The box of vectorized axes that each level adds; level 0 computes everything."""
        return [{}, *self.manifest.extensions]

    def completed(self, region: Region) -> np.ndarray:
        """The number of levels that each cell of a block has."""
        return read_flags(self.storage, self._flags, self._block(region))

    def flags(self) -> BlockFlags:
        """The completion counts of all blocks."""
        return flags_of(self.storage, self._flags)

    @property
    def _flags(self) -> Layout:
        return self.layouts[self.manifest.completed]

    def _block(self, region: Region) -> tuple[int, ...]:
        """The position of the block of a region."""
        return tuple(
            part.start // size for part, size in zip(region, self.manifest.block, strict=True)
        )

    def write(
        self, region: Region, part: int, wanted: np.ndarray, values: Mapping[str, np.ndarray]
    ) -> None:
        """Store a level of the cells of a block where `wanted` holds, and their flag last.

        values: rows of the wanted cells, by array. Arrays are written by several threads.
        """
        box, finite, at = self.levels[part], values["finite"], self._block(region)
        level = part + 1 if part else len(self.levels)  # level 0 computes everything
        jobs: list[Callable[[], None]] = []
        for output in self.manifest.outputs:
            inside = tuple(slice(*box.get(dim, (None,))) for dim in output.dims)
            layout, rows = self.layouts[output.name], values[output.name]
            jobs += [
                partial(self._put, layout, (*at, *own), wanted, rows[(slice(None), *outer)], inner)
                for own, inner, outer in _chunks_of(layout, len(at), inside)
            ]
        try:
            if sum(rows.nbytes for rows in values.values()) > SMALL:
                with ThreadPoolExecutor(WRITERS) as writers:
                    list(writers.map(_call, jobs))
            else:
                for job in jobs:
                    job()
            if part:
                # A cell is finite only if it is in all levels.
                held = self._held(self.layouts["finite"], at)
                finite = finite & held[tuple(map(slice, wanted.shape))][wanted]
            self._put(self.layouts["finite"], at, wanted, finite)
            self._put(self._flags, at, wanted, np.full(len(finite), level, np.uint8))
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot write to the store {self.url!r} ({error.strerror or error}); what it "
                "holds is valid, and the same call resumes once this is fixed",
            ) from error

    def write_flags(self, at: tuple[int, ...], levels: np.ndarray) -> None:
        """Write the completion counts of a block."""
        self.storage.write(self._flags.key(at), encode(self._flags, levels))

    def _held(self, layout: Layout, at: tuple[int, ...]) -> np.ndarray:
        """The values of a chunk; fill values if it is missing."""
        held = read_chunk(self.url, self.storage, layout, at)
        return empty_chunk(layout) if held is None else held

    def _put(
        self, layout: Layout, at: tuple[int, ...], wanted: np.ndarray, rows: np.ndarray,
        inner: tuple[slice, ...] = (),
    ) -> None:  # fmt: skip
        """Set the wanted cells of a chunk, at `inner` along the dims of the output."""
        cells = tuple(map(slice, wanted.shape))
        own = layout.region(at)[wanted.ndim :]
        full = all(s == slice(0, p.stop - p.start) for s, p in zip(inner, own, strict=True))
        if full and wanted.all():
            values = rows.reshape(*wanted.shape, *rows.shape[1:])
        else:
            # A chunk is written as a whole, so read the cells that stay.
            if layout is self._flags:
                values = empty_chunk(layout)
                values[cells] = read_flags(self.storage, layout, at)
            else:
                values = self._held(layout, at)
            view = values[(*cells, *inner)]
            view[wanted] = rows
        self.storage.write(layout.key(at), encode(layout, values))

    def describe(self, attributes: Mapping[str, Any]) -> None:
        """Set attributes of the dataset."""
        self.attributes |= attributes
        self._write_root(self.attributes, self.layouts)

    def _write_root(self, attributes: Mapping[str, Any], arrays: Mapping[str, Layout]) -> None:
        metadata = {name: layout.metadata() for name, layout in arrays.items()}
        self.storage.write(ROOT, _checked(self.url, group_metadata(metadata, attributes)))

    def extend(self, merged: Manifest, attributes: Mapping[str, Any]) -> None:
        """Extend the store to a manifest that adds to its own, and set attributes with it."""
        _check_types(self.url, self.manifest.grid, merged.grid)
        _check_made(self.url, merged)
        # An old array without checksums keeps its chunks, so new ones have none either.
        arrays = {
            name: replace(layout, checksum=self.layouts[name].checksum)
            for name, layout in layouts(merged).items()
        }
        # Coordinates first: readers ignore values beyond the sizes that they know.
        attributes = self.attributes | {**attributes, MANIFEST: merged.to_json()}
        labels = coordinates(merged.grid)
        longer = [name for name in labels if arrays[name].shape != self.layouts[name].shape]
        # A copy made during an extension may have flags beyond the grid of its metadata.
        self._forget_beyond(arrays[merged.completed])
        for name in longer:
            for key, data in encoded(arrays[name], labels[name][1]).items():
                self.storage.write(key, data)
        self._write_root(attributes, arrays)
        self._take(StoreDescription(attributes, merged, arrays))
        self.update_array_metadata()

    def _forget_beyond(self, longer: Layout) -> None:
        """Clear flags beyond the grid, which a copy made during an extension can have."""
        flags, known = flags_of(self.storage, longer), self._flags.shape
        beyond = flags.high > len(self.levels)
        for axis, (n, size) in enumerate(zip(known, longer.chunk, strict=True)):
            # Blocks that are not wholly within the known shape.
            edge = np.arange(beyond.shape[axis]) >= n // size
            beyond |= edge.reshape([-1 if i == axis else 1 for i in range(beyond.ndim)])
        for at in map(tuple, np.argwhere(beyond & (flags.high > 0)).tolist()):
            levels = flags.cells(at)
            right = np.zeros_like(levels)
            inside = tuple(
                slice(max(0, n - part.start))
                for n, part in zip(known, longer.region(at), strict=True)
            )
            right[inside] = np.minimum(levels[inside], len(self.levels))
            if (right != levels).any():
                self.storage.write(longer.key(at), encode(longer, right))

    def update_array_metadata(self) -> None:
        """Rewrite outdated metadata of single arrays; their copies in the group change first."""
        for name, layout in self.layouts.items():
            text = text_of(layout.metadata())
            if self.storage.read(f"{name}/{ROOT}", MAX_TEXT) != text:
                self.storage.write(f"{name}/{ROOT}", text)

    def note(self, manifest: Manifest, attributes: Mapping[str, Any]) -> None:
        """Write a manifest with other programs or version, and set attributes in the same write."""
        self.manifest = manifest
        self.describe({**attributes, MANIFEST: manifest.to_json()})


def _chunks_of(
    layout: Layout, cell_dims: int, inside: Sequence[slice]
) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...], tuple[slice, ...]]]:
    """The chunks along the dims of an output that hold a part of it.

    Yields their positions, and the slices of their common part in a chunk and in the given part.
    """
    triples: list[list[tuple[int, slice, slice]]] = []
    for part, n, size in zip(
        inside, layout.shape[cell_dims:], layout.chunk[cell_dims:], strict=True
    ):
        start, stop, _ = part.indices(n)
        found = []
        for i in range(start // size, -(-stop // size)):
            a, b = max(start, i * size), min(stop, (i + 1) * size)
            found.append((i, slice(a - i * size, b - i * size), slice(a - start, b - start)))
        triples.append(found)
    for chosen in product(*triples):
        at, inner, outer = zip(*chosen, strict=True) if chosen else ((), (), ())
        yield tuple(at), tuple(inner), tuple(outer)


def _call(job: Callable[[], None]) -> None:
    job()


def open_store(url: str, tidy: bool = False, listed: bool = True) -> SweepStore | None:
    """The store at `url` for writing; None for a missing store, StoreError for other files.

    tidy: whether to remove files that interrupted writers left. listed: whether to look for
    symbolic links in it; only a process that has already done so may skip this.
    """
    storage = storage_at(url)
    held = read_description(url, storage)
    if held is None:
        left = storage.names()
        # Only our mark allows deleting files: others may belong to somebody else.
        if CREATING in left or (left and all(name.startswith(CREATING) for name in left)):
            for key in sorted(storage.sizes(), key=CREATING.__eq__):  # the mark goes last
                storage.remove(key)
        elif storage.exists():
            raise StoreError(f"store {url!r} exists and is no zarr store{REMEDY}")
        return None
    keys = storage.sizes() if listed or tidy else {}
    # Live writers have such files as well, so only a holder of the store may remove them.
    if tidy:
        for key in [key for key in keys if key.endswith(PARTIAL) or key == CREATING]:
            storage.remove(key)
    return SweepStore(url, held)


def create(url: str, manifest: Manifest, attributes: Mapping[str, Any]) -> SweepStore:
    """Create a store; its `zarr.json` is written last."""
    manifest = replace(manifest, label_chunks=label_chunks(manifest.grid))
    _check_made(url, manifest)
    storage, arrays, labels = storage_at(url), layouts(manifest), coordinates(manifest.grid)
    attributes = {
        **attributes,
        "coordinates": " ".join(name for name, (dims, _) in labels.items() if dims != (name,)),
        MANIFEST: manifest.to_json(),
    }
    held = StoreDescription(attributes, manifest, arrays)
    metadata = {name: layout.metadata() for name, layout in arrays.items()}
    # Before the first write: metadata that are too long must not leave files.
    root = _checked(url, group_metadata(metadata, attributes))
    try:
        # The mark comes first and goes last, so a kill leaves no files without it.
        storage.write(CREATING, b"")
        for name, own in metadata.items():
            storage.write(f"{name}/{ROOT}", text_of(own))
        for name, (_, values) in labels.items():
            for key, data in encoded(arrays[name], values).items():
                storage.write(key, data)
        storage.write(ROOT, root)
        storage.remove(CREATING)
    except OSError as error:
        raise OSError(
            error.errno,
            f"store {url!r} cannot be made ({error.strerror or error}); choose another path, or "
            "change its permissions or free disk space",
        ) from error
    return SweepStore(url, held)


def _check_made(url: str, manifest: Manifest) -> None:
    """Raise StoreError for a sweep whose store could not be created or opened again."""
    try:
        check_manifest(manifest)
    except ValueError as error:
        raise StoreError(f"store {url!r} cannot be made: {error}") from error


def _checked(url: str, metadata: Mapping[str, Any]) -> bytes:
    """The metadata of the group as JSON; StoreError if it is too long to be read again."""
    text = text_of(metadata)
    if len(text) > MAX_TEXT:
        raise StoreError(
            f"store {url!r}: its values and seeds take {len(text):,} bytes of text, and "
            f"{MAX_TEXT:,} are the most; sweep fewer of them into one store"
        )
    return text


def _check_types(url: str, old: SweepGrid, new: SweepGrid) -> None:
    """Raise if the new values of an axis are of another type than the old ones."""
    # An array of a store cannot change its type when it grows.
    held, longer = coordinates(old), coordinates(new)
    for name, (_, values) in held.items():
        if longer[name][1].dtype.kind != values.dtype.kind:
            raise StoreError(
                f"store {url!r}: axis {name} holds {values.dtype.name}, and cannot take values "
                f"that make it {longer[name][1].dtype.name}; sweep into another store"
            )
