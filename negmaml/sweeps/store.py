"""The store: a zarr group of preallocated labelled arrays, one chunk a block.

It opens with `xarray.open_zarr` at any time, and no kill harms it, since each change of it is one
write. The file `zarr.json` of the group holds the shapes of all arrays (consolidated metadata) and
the attribute `negmaml_sweep`, which says what the store is a sweep of:

- a new store is there once this file is, which is written last; a mark tells what an interrupted
  beginning left from the files of others;
- an extension writes longer coordinates, of which readers see the length that they know, and then
  this file, which is all that changes for a reader; the metadata of single arrays, of which this
  file has copies, follow;
- a chunk is one file, and `done` is written after the data it speaks of. It counts the parts that
  a cell has: one, and one more for each time that a whole axis was lengthened.
"""

import copy
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from negmaml._core.extras import require
from negmaml.sweeps.files import PARTIAL, LocalFiles, StoreError, address, files_of
from negmaml.sweeps.grid import Grid, Region
from negmaml.sweeps.manifest import Box, Manifest

MANIFEST = "negmaml_sweep"
ROOT = "zarr.json"
CREATING = ".negmaml-creating"  # there until the store is whole
LABELS = 1024  # values of a coordinate in a chunk: extensions mostly stay within
REMEDY = "; give an empty or new path, or the store of an earlier sweep"
# Those that run no code of whoever made the store, as a pickle would.
CODECS = {"bytes", "zstd", "blosc", "gzip", "crc32c", "vlen-utf8", "transpose"}


class Store:
    """An open store; make one with `create` or `open_store`."""

    def __init__(self, url: str, root: dict[str, Any]):
        self.url, self.files = url, files_of(url)
        self._take(root)

    def _take(self, root: dict[str, Any]) -> None:
        self.root = root
        self.manifest = Manifest.from_json(root["attributes"][MANIFEST])
        zarr = require("zarr", "sweep")
        self.group = zarr.open_group(
            address(self.url), mode="r+", zarr_format=3, use_consolidated=True
        )

    @property
    def attributes(self) -> Mapping[str, Any]:
        """Attributes of the dataset."""
        return self.root["attributes"]

    @property
    def parts(self) -> list[Box]:
        """What a cell can lack: everything, or the box of each extension of a whole axis."""
        return [{}, *self.manifest.parts]

    def done(self, region: Region | None = None) -> np.ndarray:
        """How many of `parts` each cell has: 0, or all of them when none was added since."""
        return np.asarray(self.group["done"][... if region is None else region])

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
                finite &= np.asarray(self.group["finite"][region])[wanted]
            self._put("finite", region, wanted, finite)
            self._put("done", region, wanted, np.full(len(finite), level, np.uint8))
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot write to the store {self.url!r} ({error.strerror or error}); what it "
                "holds is whole, and the same command goes on from there once this is mended",
            ) from error

    def _put(self, name: str, region: Region, wanted: np.ndarray, values: np.ndarray) -> None:
        """Set the wanted cells of a region, which may be cut along the dims of the output too."""
        array = self.group[name]
        if wanted.all():
            array[region] = values.reshape(*wanted.shape, *values.shape[1:])
        else:
            block = np.asarray(array[region])
            block[wanted] = values
            array[region] = block

    def describe(self, attributes: Mapping[str, Any]) -> None:
        """Set attributes of the dataset."""
        self.root["attributes"] |= attributes
        self.files.write(ROOT, _text(self.root))

    def extend(self, merged: Manifest, attributes: Mapping[str, Any]) -> None:
        """Become the store of a manifest that adds to this one, and set attributes with it."""
        _check_types(self.url, self.manifest.grid, merged.grid)
        root = copy.deepcopy(self.root)
        arrays = root["consolidated_metadata"]["metadata"]
        labels = coordinates(merged.grid)
        shapes = merged.array_shapes() | {
            name: values.shape for name, (_, values) in labels.items()
        }
        longer = [name for name in labels if arrays[name]["shape"] != list(shapes[name])]
        for name, shape in shapes.items():
            arrays[name]["shape"] = list(shape)
        for name in longer:
            for key, data in _encoded(name, arrays[name], labels[name][1]).items():
                self.files.write(key, data)
        root["attributes"] |= {**attributes, MANIFEST: merged.to_json()}
        self.files.write(ROOT, _text(root))
        self._take(root)
        self.follow()

    def follow(self) -> None:
        """Bring the metadata of each array up to its copy in the group, which changes first."""
        for name, metadata in self.root["consolidated_metadata"]["metadata"].items():
            held = self.files.read(f"{name}/{ROOT}")
            if held is None or json.loads(held) != metadata:
                self.files.write(f"{name}/{ROOT}", _text(metadata))

    def note(self, manifest: Manifest, attributes: Mapping[str, Any]) -> None:
        """Say other programs or another version in the manifest, and set attributes with it."""
        self.manifest = manifest
        self.describe({**attributes, MANIFEST: manifest.to_json()})


def open_store(url: str, tidy: bool = False) -> Store | None:
    """The store at `url`, to write to; None if there is nothing yet. StoreError if it is not ours.

    tidy: whether to remove what writers left that were cut off.
    """
    files = files_of(url)
    root = read_root(url, files)
    if root is None:
        left = list(files.names())
        if CREATING in left or (left and all(name.startswith(CREATING) for name in left)):
            for name in sorted(left, key=CREATING.__eq__):  # the mark goes last
                files.remove(name)
        elif files.exists():
            raise StoreError(f"store {url!r} exists and is no zarr store{REMEDY}")
        return None
    if tidy:
        for key in [key for key in files.names() if key.endswith(PARTIAL) or key == CREATING]:
            files.remove(key)
    return Store(url, root)


def manifest_of(url: str) -> Manifest:
    """What the store at `url` is a sweep of; FileNotFoundError if there is none."""
    root = read_root(url, files_of(url))
    if root is None:
        raise FileNotFoundError(f"there is no store at {url!r}")
    return Manifest.from_json(root["attributes"][MANIFEST])


def read_root(url: str, files) -> dict[str, Any] | None:
    """The metadata of the group, checked; None if there is none."""
    text = files.read(ROOT)
    if text is None:
        return None
    try:
        root = json.loads(text)
        arrays = root.get("consolidated_metadata")
        if MANIFEST not in root.get("attributes", {}) or not arrays:
            raise StoreError(f"store {url!r} is a zarr store, but of no sweep{REMEDY}")
        for name, metadata in arrays["metadata"].items():
            for codec in metadata["codecs"]:
                if codec["name"] not in CODECS:
                    raise StoreError(
                        f"store {url!r}: {name} has the codec {codec['name']!r}, which no sweep "
                        f"writes and which could run code of whoever made it; allowed are "
                        f"{', '.join(sorted(CODECS))}"
                    )
        Manifest.from_json(root["attributes"][MANIFEST])
    except StoreError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"store {url!r} cannot be read ({error}){REMEDY}") from error
    return root


def create(url: str, manifest: Manifest, attributes: Mapping[str, Any]) -> Store:
    """A new store, of which `zarr.json` is written last."""
    files = files_of(url)
    try:
        files.write(CREATING, b"")
        contents = _new(manifest)
        for key, data in contents.items():
            files.write(key, data)
        arrays = {k.split("/")[0]: json.loads(contents[k]) for k in contents if k.endswith(ROOT)}
        labels = coordinates(manifest.grid).items()
        root = {
            "attributes": {
                **attributes,
                "coordinates": " ".join(name for name, (dims, _) in labels if dims != (name,)),
                MANIFEST: manifest.to_json(),
            },
            "zarr_format": 3,
            "consolidated_metadata": {
                "kind": "inline", "must_understand": False, "metadata": arrays
            },
            "node_type": "group",
        }  # fmt: skip
        files.write(ROOT, _text(root))
        files.remove(CREATING)
    except OSError as error:
        raise OSError(
            error.errno,
            f"store {url!r} cannot be made ({error.strerror or error}); choose another path, or "
            "mend its permissions or its disk",
        ) from error
    return Store(url, root)


def _text(metadata: Mapping[str, Any]) -> bytes:
    return json.dumps(metadata, indent=1).encode()


def _new(manifest: Manifest) -> dict[str, bytes]:
    """The files of a store with nothing computed, but for that of the group."""
    grid, block = manifest.grid, manifest.block
    with tempfile.TemporaryDirectory() as folder:
        group = require("zarr", "sweep").open_group(folder, mode="w", zarr_format=3)
        for output in manifest.outputs:
            inexact = np.dtype(output.dtype).kind in "fc"
            group.create_array(
                output.name,
                shape=(*grid.shape, *output.shape),
                chunks=(*block, *(max(1, n) for n in output.shape)),
                dtype=output.dtype,
                fill_value=np.nan if inexact else 0,
                compressors=None if inexact else "auto",  # random digits do not compress
                dimension_names=(*grid.dims, *output.dims),
            )
        for name, dtype in (("finite", "bool"), ("done", "uint8")):
            group.create_array(
                name, shape=grid.shape, chunks=block, dtype=dtype, fill_value=0,
                dimension_names=grid.dims,
            )  # fmt: skip
        for name, (dims, values) in coordinates(grid).items():
            array = group.create_array(
                name, shape=values.shape, chunks=tuple(LABELS for _ in values.shape),
                dtype=values.dtype if values.dtype.kind != "U" else str, dimension_names=dims,
            )  # fmt: skip
            array[...] = values
        return _contents(folder, but=ROOT)


def _encoded(name: str, metadata: Mapping[str, Any], values: np.ndarray) -> dict[str, bytes]:
    """The chunks of a coordinate of these values."""
    with tempfile.TemporaryDirectory() as folder:
        aside = LocalFiles(Path(folder))
        aside.write(f"{name}/{ROOT}", _text(metadata))
        array = require("zarr", "sweep").open_array(f"{folder}/{name}", mode="r+", zarr_format=3)
        array[...] = values
        return _contents(folder, but=f"{name}/{ROOT}")


def _contents(folder: str, but: str) -> dict[str, bytes]:
    files = LocalFiles(Path(folder))
    return {key: files.read(key) or b"" for key in files.names() if key != but}


def _check_types(url: str, old: Grid, new: Grid) -> None:
    """That the new values of an axis are of the type of the old ones."""
    held, longer = coordinates(old), coordinates(new)
    for name, (_, values) in held.items():
        if longer[name][1].dtype.kind != values.dtype.kind:
            raise StoreError(
                f"store {url!r}: axis {name} holds {values.dtype.name}, and cannot take values "
                f"that make it {longer[name][1].dtype.name}; sweep into another store"
            )


def coordinates(grid: Grid) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """(dims, values) of every name of the grid, and of the seed."""
    found = {}
    for axis in (*grid.axes, *grid.whole):
        for name in axis.names:
            column = np.array(axis.column(name))
            found[name] = ((axis.dim,), column) if axis.dim else ((), column[0])
    return {**found, "seed": (("seed",), np.array(grid.seeds, np.int64))}
