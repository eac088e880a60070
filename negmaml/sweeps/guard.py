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
from negmaml.sweeps.chunks import damaged, fault, inner_fault, shard_index
from negmaml.sweeps.layout import Layout
from negmaml.sweeps.storage import local_path

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


def guarded(
    url: str,
    arrays: Mapping[str, Layout],
    attributes: Mapping[str, Any] | None = None,
    complete: bool = False,
):
    """The store at `url` for zarr and xarray, to be read.

    complete: whether all cells are, so that a missing chunk is an error.
    """
    zarr = require("zarr", "sweep")
    path = local_path(url)
    if path is None:
        held = zarr.storage.FsspecStore.from_url(url.rstrip("/"), read_only=True)
    else:
        held = zarr.storage.LocalStore(path, read_only=True)
    return _class()(held, url, dict(arrays), dict(attributes or {}), complete)


def zarr_arrays(store) -> dict[str, Any]:
    """The arrays of an opened store."""
    zarr = require("zarr", "sweep")
    group = zarr.open_group(store, mode="r", zarr_format=3, use_consolidated=True)
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
            layout = self.arrays.get(key.partition("/")[0])
            at = layout.position(key) if layout else None
            if layout is None or at is None:
                return None
            # A checksum needs the whole chunk, or the whole inner chunk of a shard. One byte more
            # than allowed is enough to see that the file is too long.
            part = byte_range if layout.inner is not None else None
            asked = part or ranges.RangeByteRequest(0, layout.most_bytes(at) + 1)
            data = await self._store.get(key, prototype, asked)
            if data is None:
                # Old stores, which have no checksums, left out chunks of fill values.
                if self.complete and layout.checksum:
                    raise damaged(self.url, key, "is missing")
                return None
            content = data.to_bytes()
            wrong = _part_fault(layout, part, content) if part else fault(layout, at, content)
            if wrong:
                raise damaged(self.url, key, wrong)
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

    def _part_fault(layout, part, content: bytes) -> str:
        """The fault of a part of a shard: of its index, or of whole inner chunks."""
        # zarr reads the index from the end, and then the inner chunks that it lists.
        if isinstance(part, ranges.SuffixByteRequest):
            index = shard_index(layout)
            right = part.suffix == len(index) and content == index
            return "" if right else "was altered: its index is another"
        size = layout.inner_bytes
        whole = isinstance(part, ranges.RangeByteRequest) and not part.start % size
        if not whole or len(content) != part.end - part.start:
            return "does not have the inner chunks that were asked for"
        return inner_fault(layout, content)

    return Guarded


def _make(*given):
    """Unpickle a store: the class has no importable name."""
    return _class()(*given)
