"""The store: a zarr group of preallocated labelled arrays, one chunk a block.

It opens with `xarray.open_zarr` at any time, and no kill harms it, since each change of it is one
write. The file `zarr.json` of the group holds the shapes of all arrays (consolidated metadata) and
the attribute `negmaml_sweep`, which says what the store is a sweep of:

- a new store is there once this file is, which is written last; a mark tells what an interrupted
  beginning left from the files of others;
- an extension writes longer coordinates, of which readers see the length that they know, and then
  this file, which is all that changes for a reader; the metadata of single arrays, of which this
  file has copies, follow;
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
from negmaml.sweeps.grid import Grid, Region
from negmaml.sweeps.guard import ROOT, group_metadata, guarded, text_of, zarr_arrays
from negmaml.sweeps.held import MANIFEST, REMEDY, Held, held_at
from negmaml.sweeps.layout import Layout, coordinates, layouts
from negmaml.sweeps.manifest import Box, Manifest
from negmaml.sweeps.storage import PARTIAL, StoreError, files_of
from negmaml.sweeps.untrusted import MOST_TEXT, check_manifest

CREATING = ".negmaml-creating"  # there until the store is whole


class Store:
    """An open store; make one with `create` or `open_store`."""

    def __init__(self, url: str, held: Held):
        self.url, self.files = url, files_of(url)
        self._take(held)

    def _take(self, held: Held) -> None:
        self.attributes, self.manifest, self.layouts = held.attributes, held.manifest, held.layouts
        self.__dict__.pop("arrays", None)

    @cached_property
    def arrays(self) -> Mapping[str, Any]:
        """The arrays, to be written."""
        return zarr_arrays(guarded(self.url, self.layouts, write=True), write=True)

    @property
    def parts(self) -> list[Box]:
        """What a cell can lack: everything, or the box of each extension of a vectorized axis."""
        return [{}, *self.manifest.parts]

    def completed(self, region: Region | None = None) -> np.ndarray:
        """How many of `parts` each cell has: 0, or all of them when none was added since."""
        return flags(
            self.arrays[self.manifest.completed], self.layouts[self.manifest.completed], region
        )

    def write(
        self, region: Region, part: int, wanted: np.ndarray, values: Mapping[str, np.ndarray]
    ) -> None:
        """Store a part of the cells of a region where `wanted` holds; their flag comes last."""
        box, finite = self.parts[part], values["finite"]
        level = part + 1 if part else len(self.parts)  # the first computes everything there is
        try:
            for output in self.manifest.outputs:
                inside = tuple(slice(*box.get(dim, (None,))) for dim in output.dims)
                self._put(output.name, (*region, *inside), wanted, values[output.name])
            if part:
                finite &= np.asarray(self.arrays["finite"][region])[wanted]
            self._put("finite", region, wanted, finite)
            self._put(
                self.manifest.completed, region, wanted, np.full(len(finite), level, np.uint8)
            )
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot write to the store {self.url!r} ({error.strerror or error}); what it "
                "holds is whole, and the same command goes on from there once this is mended",
            ) from error

    def _put(self, name: str, region: Region, wanted: np.ndarray, values: np.ndarray) -> None:
        """Set the wanted cells of a region, which may be cut along the dims of the output too."""
        array = self.arrays[name]
        if wanted.all():
            array[region] = values.reshape(*wanted.shape, *values.shape[1:])
        else:
            block = np.asarray(array[region])
            block[wanted] = values
            array[region] = block

    def describe(self, attributes: Mapping[str, Any]) -> None:
        """Set attributes of the dataset."""
        self.attributes |= attributes
        self._write_root(self.attributes, self.layouts)

    def _write_root(self, attributes: Mapping[str, Any], arrays: Mapping[str, Layout]) -> None:
        metadata = {name: layout.metadata() for name, layout in arrays.items()}
        self.files.write(ROOT, _checked(self.url, group_metadata(metadata, attributes)))

    def extend(self, merged: Manifest, attributes: Mapping[str, Any]) -> None:
        """Become the store of a manifest that adds to this one, and set attributes with it."""
        _check_types(self.url, self.manifest.grid, merged.grid)
        _check_made(self.url, merged)
        arrays = {
            name: replace(layout, checksum=self.layouts[name].checksum)
            for name, layout in layouts(merged).items()
        }
        attributes = self.attributes | {**attributes, MANIFEST: merged.to_json()}
        labels = coordinates(merged.grid)
        longer = [name for name in labels if arrays[name].shape != self.layouts[name].shape]
        self._forget_beyond(arrays[merged.completed])
        for name in longer:
            for key, data in encoded(arrays[name], labels[name][1]).items():
                self.files.write(key, data)
        self._write_root(attributes, arrays)
        self._take(Held(attributes, merged, arrays))
        self.follow()

    def _forget_beyond(self, longer: Layout) -> None:
        """Clear flags of cells beyond the grid, as a copy has that was made during an extension."""
        array = zarr_arrays(guarded(self.url, {longer.name: longer}, write=True), write=True)[
            longer.name
        ]
        done = flags(array, longer)
        right = np.zeros_like(done)
        known = tuple(map(slice, self.layouts[longer.name].shape))
        right[known] = np.minimum(done[known], len(self.parts))
        write_blocks(array, right, done != right)

    def follow(self) -> None:
        """Bring the metadata of each array up to its copy in the group, which changes first."""
        for name, layout in self.layouts.items():
            text = text_of(layout.metadata())
            if self.files.read(f"{name}/{ROOT}", MOST_TEXT) != text:
                self.files.write(f"{name}/{ROOT}", text)

    def note(self, manifest: Manifest, attributes: Mapping[str, Any]) -> None:
        """Say other programs or another version in the manifest, and set attributes with it."""
        self.manifest = manifest
        self.describe({**attributes, MANIFEST: manifest.to_json()})


def flags(array, layout: Layout, region: Region | None = None) -> np.ndarray:
    """The array `completed`, or a region of it; zeros where a chunk of it cannot be read."""
    try:
        return np.asarray(array[... if region is None else region])
    except StoreError:
        if region is not None:
            return np.zeros([part.stop - part.start for part in region], np.uint8)
    found = np.zeros(layout.shape, np.uint8)
    for part in layout.blocks():
        found[part] = flags(array, layout, part)
    return found


def write_blocks(array, values: np.ndarray, where: np.ndarray) -> None:
    """Write the blocks of an array in which `where` holds anywhere."""
    corners = np.argwhere(where) // np.array(array.chunks)
    for corner in np.unique(corners, axis=0):
        region = tuple(
            slice(i * size, min((i + 1) * size, n))
            for i, size, n in zip(corner.tolist(), array.chunks, array.shape, strict=True)
        )
        array[region] = values[region]


def open_store(url: str, tidy: bool = False, listed: bool = True) -> Store | None:
    """The store at `url`, to write to; None if there is nothing yet. StoreError if it is not ours.

    tidy: whether to remove files that interrupted writers left. listed: whether to look for
    symbolic links in it, which only a process that has done so before can do without.
    """
    files = files_of(url)
    held = held_at(url, files)
    if held is None:
        left = list(files.names())
        if CREATING in left or (left and all(name.startswith(CREATING) for name in left)):
            for name in sorted(left, key=CREATING.__eq__):  # the mark goes last
                files.remove(name)
        elif files.exists():
            raise StoreError(f"store {url!r} exists and is no zarr store{REMEDY}")
        return None
    names = files.sizes() if listed or tidy else {}
    for key in [key for key in names if key.endswith(PARTIAL) or key == CREATING]:
        if tidy:
            files.remove(key)
    return Store(url, held)


def create(url: str, manifest: Manifest, attributes: Mapping[str, Any]) -> Store:
    """A new store, of which `zarr.json` is written last."""
    _check_made(url, manifest)
    files, arrays, labels = files_of(url), layouts(manifest), coordinates(manifest.grid)
    attributes = {
        **attributes,
        "coordinates": " ".join(name for name, (dims, _) in labels.items() if dims != (name,)),
        MANIFEST: manifest.to_json(),
    }
    held = Held(attributes, manifest, arrays)
    metadata = {name: layout.metadata() for name, layout in arrays.items()}
    root = _checked(url, group_metadata(metadata, attributes))
    try:
        files.write(CREATING, b"")
        for name, own in metadata.items():
            files.write(f"{name}/{ROOT}", text_of(own))
        for name, (_, values) in labels.items():
            for key, data in encoded(arrays[name], values).items():
                files.write(key, data)
        files.write(ROOT, root)
        files.remove(CREATING)
    except OSError as error:
        raise OSError(
            error.errno,
            f"store {url!r} cannot be made ({error.strerror or error}); choose another path, or "
            "mend its permissions or its disk",
        ) from error
    return Store(url, held)


def _check_made(url: str, manifest: Manifest) -> None:
    """Raise for a sweep of which no store can be made, or none that could be opened again."""
    try:
        check_manifest(manifest)
    except ValueError as error:
        raise StoreError(f"store {url!r} cannot be made: {error}") from error


def _checked(url: str, metadata: Mapping[str, Any]) -> bytes:
    """The metadata of the group as text, which has a bound."""
    text = text_of(metadata)
    if len(text) > MOST_TEXT:
        raise StoreError(
            f"store {url!r}: its values and seeds take {len(text):,} bytes of text, and "
            f"{MOST_TEXT:,} are the most; sweep fewer of them into one store"
        )
    return text


def encoded(layout: Layout, values: np.ndarray) -> dict[str, bytes]:
    """The chunks of a coordinate of these values."""
    zarr, held = require("zarr", "sweep"), {}
    metadata = {layout.name: layout.metadata()}
    buffer = zarr.core.buffer.default_buffer_prototype().buffer
    held[ROOT] = buffer.from_bytes(text_of(group_metadata(metadata, {})))
    with zarr.config.set({"array.write_empty_chunks": True}):
        store = zarr.storage.MemoryStore(held)
        group = zarr.open_group(store, mode="r+", zarr_format=3, use_consolidated=True)
        group[layout.name][...] = values
    return {key: data.to_bytes() for key, data in held.items() if key != ROOT}


def _check_types(url: str, old: Grid, new: Grid) -> None:
    """That the new values of an axis are of the type of the old ones."""
    held, longer = coordinates(old), coordinates(new)
    for name, (_, values) in held.items():
        if longer[name][1].dtype.kind != values.dtype.kind:
            raise StoreError(
                f"store {url!r}: axis {name} holds {values.dtype.name}, and cannot take values "
                f"that make it {longer[name][1].dtype.name}; sweep into another store"
            )
