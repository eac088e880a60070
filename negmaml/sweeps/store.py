"""The store: a zarr group of preallocated labelled arrays, one chunk a block.

It opens with `xarray.open_zarr` at any time. What makes that safe: a new store is built aside and
renamed into place; every chunk is one file, written aside and renamed; `done` is written after the
data it speaks of, and counts the parts that a cell has (one, and one more for each time that a
whole axis was lengthened); and the attribute `negmaml_sweep` says what the store is a sweep of, so
that another sweep is refused.
"""

import json
import os
import shutil
import uuid
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from negmaml._core.extras import require
from negmaml.sweeps.grid import Grid, Region
from negmaml.sweeps.lock import StoreError, local_path
from negmaml.sweeps.manifest import Box, array_shapes, extended, grid_of

MANIFEST = "negmaml_sweep"


class Store:
    """An open store; make one with `create` or `open_store`."""

    def __init__(self, url: str, group):
        self.url, self.group = url, group
        self.manifest: dict[str, Any] = json.loads(group.attrs[MANIFEST])
        self.block: tuple[int, ...] = tuple(self.manifest["block"])

    @property
    def parts(self) -> list[Box]:
        """What a cell can lack: everything, or the box of each extension of a whole axis."""
        return [{}, *self.manifest["parts"]]

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
            for name, (_, dims, _) in self.manifest["outputs"].items():
                inside = tuple(slice(*box.get(dim, (None,))) for dim in dims)
                self._put(name, (*region, *inside), wanted, values[name])
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
        self.group.attrs.update(dict(attributes))
        _consolidate(self.group)

    def repair(self) -> None:
        """Undo an extension that was cut off: the manifest is what it changes last."""
        stored = grid_of(self.manifest)
        labels = {name: values for name, (_, values) in coordinates(stored).items()}
        if any(n not in self.group or self.group[n].shape != v.shape for n, v in labels.items()):
            _write_coordinates(self.group, stored)
        for name, shape in array_shapes(stored, self.manifest["outputs"]).items():
            if self.group[name].shape != shape:
                self.group[name].resize(shape)

    def extend(self, asked: Mapping[str, Any]) -> Grid:
        """Append seeds and values of axes; returns the grid in the order of the store."""
        merged = extended(self.manifest, asked)
        grid = grid_of(merged)
        for name, shape in array_shapes(grid, merged["outputs"]).items():
            self.group[name].resize(shape)
        _write_coordinates(self.group, grid)
        self.describe({MANIFEST: json.dumps(merged)})
        self.manifest = merged
        return grid

    def accept(self, asked: Mapping[str, Any], note: str) -> None:
        """Take on the asked function and version, leaving a note."""
        changed = {field: asked[field] for field in ("function", "version")}
        notes = [*self.group.attrs.get("history", []), note]
        self.manifest |= changed
        self.describe({MANIFEST: json.dumps(self.manifest), "history": notes})

    def grid(self) -> Grid:
        """The grid in the order of the store."""
        return grid_of(self.manifest)


def open_store(url: str) -> Store | None:
    """The store at `url`; None if there is nothing yet. Raises StoreError if it is not ours."""
    zarr = require("zarr", "sweep")
    path = local_path(url)
    if path is not None and (not path.exists() or (path.is_dir() and not any(path.iterdir()))):
        return None
    remedy = "; give an empty or new path, or the store of an earlier sweep"
    if path is not None and not (path / "zarr.json").is_file():
        raise StoreError(f"store {url!r} exists and is no zarr store{remedy}")
    try:
        group = zarr.open_group(str(path or url), mode="r+", zarr_format=3, use_consolidated=False)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"store {url!r} cannot be read as zarr ({error}){remedy}") from error
    if MANIFEST not in group.attrs:
        if group.attrs.get("negmaml_sweep_creating"):
            return None  # a remote store whose making was interrupted
        raise StoreError(f"store {url!r} is a zarr store, but of no sweep{remedy}")
    return Store(url, group)


def create(
    url: str, manifest: Mapping[str, Any], grid: Grid, block: Sequence[int], attributes: Mapping
) -> Store:
    """A new store: built aside and renamed into place, or marked until it is whole (URLs)."""
    zarr = require("zarr", "sweep")
    path = local_path(url)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial") if path else None
    try:
        group = zarr.open_group(str(aside or url), mode="w", zarr_format=3)
        group.attrs["negmaml_sweep_creating"] = True
        _write_arrays(group, manifest, grid, block)
        whole = {**attributes, MANIFEST: json.dumps({**manifest, "block": list(block)})}
        group.attrs.put({**whole, "coordinates": " ".join(_labels(grid))})
        _consolidate(group)
        if path is not None and aside is not None:
            if path.is_dir():
                path.rmdir()  # empty: `open_store` has looked
            os.rename(aside, path)
    except OSError as error:
        raise OSError(
            error.errno,
            f"store {url!r} cannot be made ({error.strerror or error}); choose another path, or "
            "mend its permissions or its disk",
        ) from error
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
    opened = zarr.open_group(str(path or url), mode="r+", zarr_format=3, use_consolidated=False)
    return Store(url, opened)


def _consolidate(group) -> None:
    """Copy the metadata of all arrays to one place, where readers find a consistent set."""
    zarr = require("zarr", "sweep")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that version 3 of zarr has yet to adopt this officially
        zarr.consolidate_metadata(group.store)


def _write_arrays(group, manifest: Mapping[str, Any], grid: Grid, block: Sequence[int]) -> None:
    for name, (dtype, dims, shape) in manifest["outputs"].items():
        inexact = np.dtype(dtype).kind in "fc"
        group.create_array(
            name,
            shape=(*grid.shape, *shape),
            chunks=(*block, *(max(1, n) for n in shape)),
            dtype=dtype,
            fill_value=np.nan if inexact else 0,
            compressors=None if inexact else "auto",  # random digits do not compress
            dimension_names=(*grid.dims, *dims),
        )
    for name, dtype in (("finite", "bool"), ("done", "uint8")):
        group.create_array(
            name, shape=grid.shape, chunks=tuple(block), dtype=dtype, fill_value=0,
            dimension_names=grid.dims,
        )  # fmt: skip
    _write_coordinates(group, grid)


def _write_coordinates(group, grid: Grid) -> None:
    for name, (dims, values) in coordinates(grid).items():
        array = group.create_array(
            name, shape=values.shape, chunks=tuple(max(1, n) for n in values.shape),
            dtype=values.dtype if values.dtype.kind != "U" else str,
            dimension_names=dims, overwrite=True,
        )  # fmt: skip
        array[...] = values


def coordinates(grid: Grid) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """(dims, values) of every name of the grid, and of the seed."""
    found = {}
    for axis in (*grid.axes, *grid.whole):
        for name in axis.names:
            column = np.array(axis.column(name))
            found[name] = ((axis.dim,), column) if axis.dim else ((), column[0])
    return {**found, "seed": (("seed",), np.array(grid.seeds, np.int64))}


def _labels(grid: Grid) -> list[str]:
    """Coordinates that index no dim of their own name."""
    return [name for name, (dims, _) in coordinates(grid).items() if dims != (name,)]
