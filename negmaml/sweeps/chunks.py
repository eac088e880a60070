"""The bytes of a chunk: encoded and decoded here, and their faults found before they are used.

A chunk of floating-point numbers can be a shard of zarr's sharding codec: inner chunks one after
another, each with its checksum, and an index of their places. Inner chunks are not compressed, so
the layout determines the index. It is compared and never used, so that no store determines the
bytes that are read. A reader of a few cells reads the inner chunks with these cells only.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from negmaml._core.extras import require
from negmaml.sweeps.layout import CHECKSUM_BYTES, Layout
from negmaml.sweeps.storage import Storage, StoreError

ZSTD = b"\x28\xb5\x2f\xfd"


def damaged(url: str, key: str, fault: str) -> StoreError:
    """The error of a chunk that cannot be used."""
    return StoreError(
        f"store {url!r}: {key} {fault}; `negmaml status --check` names everything that is lost, "
        "and the same call of nm.sweep computes it again"
    )


def encode(layout: Layout, values: np.ndarray) -> bytes:
    """The file of a chunk; values at the edge of an array are padded to a whole chunk."""
    if layout.texts is not None:
        # Coordinates have at most one dim.
        texts = np.full(math.prod(layout.chunk), "", object)
        texts[: np.size(values)] = np.ravel(values).tolist()
        return _finished(layout, bytes(require("numcodecs", "sweep").VLenUTF8().encode(texts)))
    if values.shape != layout.chunk:
        padded = empty_chunk(layout)
        padded[tuple(map(slice, values.shape))] = values
        values = padded
    values = np.ascontiguousarray(values, layout.dtype.newbyteorder("<"))
    if layout.inner is None:
        return _finished(layout, values.tobytes())
    rows = _split(values, layout).reshape(layout.num_inner, -1).view(np.uint8)
    sums = np.array([_checksum(row.tobytes()) for row in rows], "<u4").view(np.uint8).reshape(-1, 4)
    return np.concatenate([rows, sums], axis=1).tobytes() + shard_index(layout)


def _finished(layout: Layout, data: bytes) -> bytes:
    if layout.compressed:
        data = require("numcodecs.zstd", "sweep").compress(data, 0)
    return b"".join([data, _checksum(data).to_bytes(4, "little")] if layout.checksum else [data])


def decode(layout: Layout, data: bytes) -> np.ndarray:
    """The values of a chunk, writable, from the bytes of its file, which have no fault."""
    body = memoryview(data)[: len(data) - CHECKSUM_BYTES * layout.checksum]
    if layout.compressed:
        body = require("numcodecs.zstd", "sweep").decompress(body)
    if layout.texts is not None:
        return require("numcodecs", "sweep").VLenUTF8().decode(body).reshape(layout.chunk)
    if layout.inner is None:
        return np.frombuffer(bytearray(body), layout.dtype).reshape(layout.chunk)
    rows = np.frombuffer(data, np.uint8, layout.num_inner * layout.inner_bytes)
    rows = rows.reshape(layout.num_inner, -1)[:, :-CHECKSUM_BYTES]
    return _joined(np.ascontiguousarray(rows).view(layout.dtype), layout)


def empty_chunk(layout: Layout) -> np.ndarray:
    """A chunk of fill values."""
    return np.full(layout.chunk, np.nan if layout.floating else 0, layout.dtype)


def _split(values: np.ndarray, layout: Layout) -> np.ndarray:
    """The inner chunks of a chunk, one after another."""
    pairs = zip(layout.inner_grid, layout.inner or (), strict=True)
    apart = values.reshape([n for pair in pairs for n in pair])
    order = [*range(0, apart.ndim, 2), *range(1, apart.ndim, 2)]
    return np.ascontiguousarray(apart.transpose(order))


def _joined(rows: np.ndarray, layout: Layout) -> np.ndarray:
    """The chunk of its inner chunks: the inverse of `_split`."""
    assert layout.inner is not None
    apart = rows.reshape(*layout.inner_grid, *layout.inner)
    half = len(layout.inner)
    order = [axis for pair in zip(range(half), range(half, 2 * half), strict=True) for axis in pair]
    return np.ascontiguousarray(apart.transpose(order)).reshape(layout.chunk)


def shard_index(layout: Layout) -> bytes:
    """The index at the end of a shard: the place and the size of each inner chunk."""
    return _shard_index(layout.num_inner, layout.inner_bytes)


@lru_cache(64)
def _shard_index(number: int, size: int) -> bytes:
    pairs = np.full((number, 2), size, "<u8")
    pairs[:, 0] = size * np.arange(number, dtype=np.uint64)
    return pairs.tobytes() + _checksum(pairs.tobytes()).to_bytes(4, "little")


def _checksum(data: bytes) -> int:
    return require("google_crc32c", "sweep").value(data)  # comes with zarr


def fault(layout: Layout, at: Sequence[int], data: bytes) -> str:
    """The fault of the file of a chunk as text; empty if none can be detected."""
    if layout.wrong_size(at, len(data)):
        return f"has {len(data):,} bytes"
    if layout.inner is not None:
        index = shard_index(layout)
        if data[-len(index) :] != index:
            return "was altered: its index is another"
        return inner_fault(layout, data[: -len(index)])
    body = data
    if layout.checksum:
        body = data[:-CHECKSUM_BYTES]
        if _checksum(body) != int.from_bytes(data[-CHECKSUM_BYTES:], "little"):
            return "was altered: its checksum is another"
    # A small file could unpack to any size: the header says which, before any memory is used.
    if layout.compressed and _unpacked_bytes(body) != layout.raw_bytes(at):
        return "does not unpack to the bytes of a chunk"
    return ""


def inner_fault(layout: Layout, data: bytes) -> str:
    """The fault of whole inner chunks of a shard, one after another."""
    size = layout.inner_bytes
    if len(data) % size:
        return f"has {len(data):,} bytes"
    for start in range(0, len(data), size):
        stop = start + size - CHECKSUM_BYTES
        if _checksum(data[start:stop]) != int.from_bytes(data[stop : start + size], "little"):
            return "was altered: its checksum is another"
    return ""


def _unpacked_bytes(data: bytes) -> int | None:
    """The size that the header of a zstd frame gives (RFC 8878, 3.1.1.1); None without one."""
    if len(data) < 5 or data[:4] != ZSTD:
        return None
    # Byte 4 says how many bytes the content size has, and whether a window size comes first.
    descriptor = data[4]
    flag, single = descriptor >> 6, bool(descriptor & 32)
    width = (1 if single else 0, 2, 4, 8)[flag]
    start = 5 + (not single) + (0, 1, 2, 4)[descriptor & 3]
    if not width or len(data) < start + width:
        return None
    return int.from_bytes(data[start : start + width], "little") + (256 if width == 2 else 0)


def read_chunk(url: str, files: Storage, layout: Layout, at: Sequence[int]) -> np.ndarray | None:
    """The values of a chunk; None if its file is missing, StoreError if it is damaged."""
    data = files.read(layout.key(at), layout.most_bytes(at))
    if data is None:
        return None
    if text := fault(layout, at, data):
        raise damaged(url, layout.key(at), text)
    return decode(layout, data)


def encoded(layout: Layout, values: np.ndarray) -> dict[str, bytes]:
    """The files of an array with these values."""
    found = {}
    for at in np.ndindex(*layout.chunks):
        found[layout.key(at)] = encode(layout, np.asarray(values[layout.region(at)]))
    return found
