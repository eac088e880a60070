"""A store as zarr sees it: with our own metadata, and every chunk checked before it is decoded.

zarr reads a missing chunk as fill values, and unpacks a chunk to any size. The class here stands
between zarr and the files, has the interface of a zarr store, and raises an error instead.
"""

import json
import posixpath
from collections.abc import Mapping
from functools import cache
from typing import Any

from negmaml._core.extras import require
from negmaml.sweeps.layout import Layout
from negmaml.sweeps.storage import StoreError, local_path

ROOT = "zarr.json"


def text_of(metadata: Mapping[str, Any]) -> bytes:
    """Metadata as JSON."""
    return json.dumps(metadata, indent=1).encode()


def group_metadata(arrays: Mapping[str, Any], attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The `zarr.json` of a group, with the consolidated metadata of its arrays."""
    # One read of this one file shows readers the sizes of all arrays at the same moment.
    return {
        "attributes": dict(attributes),
        "zarr_format": 3,
        "consolidated_metadata": {
            "kind": "inline", "must_understand": False, "metadata": dict(arrays)
        },
        "node_type": "group",
    }  # fmt: skip


def damaged(url: str, key: str, fault: str) -> StoreError:
    """The error of a chunk that cannot be used."""
    return StoreError(
        f"store {url!r}: {key} {fault}; `negmaml status --check` names everything that is lost, "
        "and the same call of nm.sweep computes it again"
    )


def guarded(
    url: str,
    arrays: Mapping[str, Layout],
    attributes: Mapping[str, Any] | None = None,
    write: bool = False,
    complete: bool = False,
):
    """The store at `url` for zarr and xarray.

    write: whether it can be written. complete: whether all cells are, so that a missing chunk is an
    error.
    """
    zarr = require("zarr", "sweep")
    path = local_path(url)
    if path is None:
        held = zarr.storage.FsspecStore.from_url(url.rstrip("/"), read_only=not write)
    else:
        held = zarr.storage.LocalStore(path, read_only=not write)
    return _class()(held, url, dict(arrays), dict(attributes or {}), complete)


def zarr_arrays(store, write: bool = False) -> dict[str, Any]:
    """The arrays of an opened store; chunks of fill values are written like all others."""
    zarr = require("zarr", "sweep")
    # zarr reads this setting when an array is opened, not when a chunk is written.
    with zarr.config.set({"array.write_empty_chunks": True}):
        mode = "r+" if write else "r"
        group = zarr.open_group(store, mode=mode, zarr_format=3, use_consolidated=True)
        return {name: group[name] for name in store.arrays}


@cache
def _class():
    """The class, made when it is first used because it needs zarr."""
    zarr = require("zarr", "sweep")
    ranges = require("zarr.abc.store", "sweep")

    class Guarded(zarr.storage.WrapperStore):  # type: ignore[name-defined]
        """The files of a store with the interface of a zarr store."""

        def __init__(self, store, url="", arrays=None, attributes=None, complete=False):
            super().__init__(store)
            self.url, self.arrays, self.complete = url, arrays or {}, complete
            self.attributes = attributes or {}

        # zarr copies a store, for example as read-only; the copy has to check chunks as well.
        def _with_store(self, store):
            return type(self)(store, self.url, self.arrays, self.attributes, self.complete)

        # Dask pickles the lazy arrays of a dataset, and this store with them.
        def __reduce__(self):
            given = self._store, self.url, self.arrays, self.attributes, self.complete
            return _make, given

        def _metadata(self, key: str) -> dict[str, Any] | None:
            folder, _ = posixpath.split(key)
            if not folder:
                arrays = {name: layout.metadata() for name, layout in self.arrays.items()}
                return group_metadata(arrays, self.attributes)
            return self.arrays[folder].metadata() if folder in self.arrays else None

        async def get(self, key, prototype, byte_range=None):
            # Metadata never come from the files: they could name codecs that run code.
            if key == ROOT or key.endswith(f"/{ROOT}"):
                held = self._metadata(key)
                return None if held is None else prototype.buffer.from_bytes(text_of(held))
            # `byte_range` is ignored: only sharded arrays ask for parts, and a checksum needs the
            # whole chunk.
            layout = self.arrays.get(key.partition("/")[0])
            at = layout.position(key) if layout else None
            if layout is None or at is None:
                return None
            # One byte more than allowed is enough to see that the file is too long.
            most = ranges.RangeByteRequest(0, layout.most_bytes(at) + 1)
            data = await self._store.get(key, prototype, most)
            if data is None:
                # Old stores, which have no checksums, left out chunks of fill values.
                if self.complete and layout.checksum:
                    raise damaged(self.url, key, "is missing")
                return None
            if fault := layout.fault(at, data.to_bytes()):
                raise damaged(self.url, key, fault)
            return data

        # Every way in which zarr reads has to pass through `get`, or its chunks escape the check.
        async def get_partial_values(self, prototype, key_ranges):
            return [await self.get(key, prototype, part) for key, part in key_ranges]

        async def _get_many(self, requests):
            for key, prototype, part in requests:
                yield key, await self.get(key, prototype, part)

        async def exists(self, key):
            if key == ROOT or key.endswith(f"/{ROOT}"):
                return self._metadata(key) is not None
            return await self._store.exists(key)

    return Guarded


def _make(*given):
    """Unpickle a store: the class has no importable name."""
    return _class()(*given)
