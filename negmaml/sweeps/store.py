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

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from negmaml._core.extras import require
from negmaml.sweeps.description import MANIFEST, REMEDY, StoreDescription, read_description
from negmaml.sweeps.grid import Region, SweepGrid
from negmaml.sweeps.guard import ROOT, group_metadata, guarded, text_of, zarr_arrays
from negmaml.sweeps.layout import Layout, coordinates, label_chunks, layouts
from negmaml.sweeps.manifest import Box, Manifest
from negmaml.sweeps.storage import PARTIAL, StoreError, storage_at
from negmaml.sweeps.untrusted import MAX_TEXT, check_manifest

CREATING = ".negmaml-creating"  # exists until the store is complete


class SweepStore:
    """An open store; obtain one from `create` or `open_store`.

    Blocks are written with `write`; `extend` adds values of axes and seeds.
    """

    def __init__(self, url: str, held: StoreDescription):
        self.url, self.storage = url, storage_at(url)
        self._take(held)

    def _take(self, held: StoreDescription) -> None:
        self.attributes, self.manifest, self.layouts = held.attributes, held.manifest, held.layouts
        # Arrays that were opened before an extension have the old shapes.
        self.__dict__.pop("arrays", None)

    @cached_property
    def arrays(self) -> Mapping[str, Any]:
        """The arrays, writable."""
        return zarr_arrays(guarded(self.url, self.layouts, write=True), write=True)

    @property
    def levels(self) -> list[Box]:
        """The box of vectorized axes that each level adds; level 0 computes everything."""
        return [{}, *self.manifest.extensions]

    def completed(self, region: Region | None = None) -> np.ndarray:
        """The number of levels that each cell has: 0, or all of them if none was added since."""
        return flags(
            self.arrays[self.manifest.completed], self.layouts[self.manifest.completed], region
        )

    def write(
        self, region: Region, part: int, wanted: np.ndarray, values: Mapping[str, np.ndarray]
    ) -> None:
        """Store a level of the cells of a region where `wanted` holds, and their flag last."""
        box, finite = self.levels[part], values["finite"]
        level = part + 1 if part else len(self.levels)  # level 0 computes everything
        try:
            for output in self.manifest.outputs:
                inside = tuple(slice(*box.get(dim, (None,))) for dim in output.dims)
                self._put(output.name, (*region, *inside), wanted, values[output.name])
            if part:
                # A cell is finite only if it is in all levels.
                finite &= np.asarray(self.arrays["finite"][region])[wanted]
            self._put("finite", region, wanted, finite)
            self._put(
                self.manifest.completed, region, wanted, np.full(len(finite), level, np.uint8)
            )
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot write to the store {self.url!r} ({error.strerror or error}); what it "
                "holds is valid, and the same call resumes once this is fixed",
            ) from error

    def _put(self, name: str, region: Region, wanted: np.ndarray, values: np.ndarray) -> None:
        """Set the wanted cells of a region, which may be sliced along dims of the output, too."""
        array = self.arrays[name]
        if wanted.all():
            array[region] = values.reshape(*wanted.shape, *values.shape[1:])
        else:
            # A chunk is written as a whole, so read the cells that stay.
            block = np.asarray(array[region])
            block[wanted] = values
            array[region] = block

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
        array = zarr_arrays(guarded(self.url, {longer.name: longer}, write=True), write=True)[
            longer.name
        ]
        done = flags(array, longer)
        right = np.zeros_like(done)
        known = tuple(map(slice, self.layouts[longer.name].shape))
        right[known] = np.minimum(done[known], len(self.levels))
        write_blocks(array, right, done != right)

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


def flags(array, layout: Layout, region: Region | None = None) -> np.ndarray:
    """The completion counts of a region, or of all cells; zeros in chunks that cannot be read."""
    try:
        return np.asarray(array[... if region is None else region])
    except StoreError:
        # A damaged chunk of counts: count its cells as missing.
        if region is not None:
            return np.zeros([part.stop - part.start for part in region], np.uint8)
    found = np.zeros(layout.shape, np.uint8)
    for part in layout.blocks():
        found[part] = flags(array, layout, part)
    return found


def write_blocks(array, values: np.ndarray, where: np.ndarray) -> None:
    """Write the blocks of an array in which `where` holds anywhere."""
    # Every chunk once, however many of its cells changed.
    corners = np.argwhere(where) // np.array(array.chunks)
    for corner in np.unique(corners, axis=0):
        region = tuple(
            slice(i * size, min((i + 1) * size, n))
            for i, size, n in zip(corner.tolist(), array.chunks, array.shape, strict=True)
        )
        array[region] = values[region]


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


def encoded(layout: Layout, values: np.ndarray) -> dict[str, bytes]:
    """The encoded chunks of a coordinate with these values, by file."""
    zarr, held = require("zarr", "sweep"), {}
    metadata = {layout.name: layout.metadata()}
    buffer = zarr.core.buffer.default_buffer_prototype().buffer
    held[ROOT] = buffer.from_bytes(text_of(group_metadata(metadata, {})))
    with zarr.config.set({"array.write_empty_chunks": True}):
        # zarr encodes the chunks in memory; they are then written one by one.
        store = zarr.storage.MemoryStore(held)
        group = zarr.open_group(store, mode="r+", zarr_format=3, use_consolidated=True)
        group[layout.name][...] = values
    return {key: data.to_bytes() for key, data in held.items() if key != ROOT}


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
