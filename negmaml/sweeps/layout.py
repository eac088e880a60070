"""The arrays that a manifest implies: metadata, chunks, and the bytes that a chunk may have.

A store is read by this description only. The metadata in the store are compared with it and never
used, so the author of a store cannot choose a codec, a shape or a fill value.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np

from negmaml.sweeps.grid import Region, SweepGrid
from negmaml.sweeps.manifest import Manifest

LABELS = 1024  # values of a coordinate in a chunk: most extensions fit into the first one
MAX_LABELS = 2**20  # the same for long axes, which would otherwise make many files
ZSTD = b"\x28\xb5\x2f\xfd"
CHECKSUM = {"name": "crc32c"}
CHECKSUM_BYTES = 4


@dataclass(frozen=True)
class Layout:
    """One array of a store. All chunks have the same shape, also at the far edges.

    label: whether it is a coordinate. texts: the values of a coordinate of strings; the size of its
    chunks depends on them.
    """

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: np.dtype
    compressed: bool
    checksum: bool
    label: bool = False
    texts: tuple[str, ...] | None = None

    @property
    def floating(self) -> bool:
        """True if its fill value is NaN."""
        return self.dtype.kind in "fc"

    @property
    def chunks(self) -> tuple[int, ...]:
        """Number of chunks along each dim."""
        return tuple(-(-n // size) for n, size in zip(self.shape, self.chunk, strict=True))

    @cached_property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk of numbers in memory."""
        return math.prod(self.chunk) * self.dtype.itemsize

    def blocks(self) -> Iterator[Region]:
        """Every chunk as slices."""
        for at in product(*map(range, self.chunks)):
            yield tuple(
                slice(i * size, min((i + 1) * size, n))
                for i, size, n in zip(at, self.chunk, self.shape, strict=True)
            )

    def key(self, at: Sequence[int]) -> str:
        """The file of a chunk."""
        return "/".join([self.name, "c", *map(str, at)])

    def position(self, key: str) -> tuple[int, ...] | None:
        """The position of the chunk in a file; None if the file is not a chunk of this array."""
        name, _, rest = key.partition("/")
        parts = rest.split("/")
        if name != self.name or parts[0] != "c" or len(parts) != 1 + len(self.shape):
            return None
        # int() also reads digits of other scripts, and huge numbers slowly.
        if not all(part.isdecimal() and part.isascii() and len(part) < 12 for part in parts[1:]):
            return None
        at = tuple(map(int, parts[1:]))
        inside = all(i < n for i, n in zip(at, self.chunks, strict=True))
        return at if inside and key == self.key(at) else None

    def raw_bytes(self, at: Sequence[int]) -> int:
        """Bytes of a chunk before it is compressed."""
        # vlen-utf8: a count, a length for each text, and the texts.
        if self.texts is None:
            return self.chunk_bytes
        size = math.prod(self.chunk)
        start = at[0] * size if at else 0
        texts = self.texts[start : start + size]
        return 4 + 4 * math.prod(self.chunk) + sum(len(text.encode()) for text in texts)

    def most_bytes(self, at: Sequence[int]) -> int:
        """The largest possible size of the file of a chunk, in bytes."""
        # zstd adds at most raw / 256 bytes and a header to data that do not compress.
        raw = self.raw_bytes(at) + CHECKSUM_BYTES * self.checksum
        return raw + raw // 64 + 1024 if self.compressed else raw

    def wrong_size(self, at: Sequence[int], size: int) -> bool:
        """True if the file of a chunk cannot have this size in bytes."""
        # Without compression the size is known exactly; with it there are only bounds.
        most = self.most_bytes(at)
        if self.compressed:
            return not CHECKSUM_BYTES * self.checksum < size <= most
        return size != most

    def fault(self, at: Sequence[int], data: bytes) -> str:
        """The fault of the file of a chunk as text; empty if none can be detected."""
        if self.wrong_size(at, len(data)):
            return f"has {len(data):,} bytes"
        body = data
        if self.checksum:
            import google_crc32c  # comes with zarr

            body = data[:-CHECKSUM_BYTES]
            if google_crc32c.value(body) != int.from_bytes(data[-CHECKSUM_BYTES:], "little"):
                return "was altered: its checksum is another"
        # A small file could unpack to any size: the header says which, before any memory is used.
        if self.compressed and _unpacked_bytes(body) != self.raw_bytes(at):
            return "does not unpack to the bytes of a chunk"
        return ""

    def metadata(self) -> dict[str, Any]:
        """The `zarr.json` of the array."""
        serializer: dict[str, Any] = {"name": "bytes"}
        if self.texts is not None:
            serializer = {"name": "vlen-utf8", "configuration": {}}
        elif self.dtype.itemsize > 1:
            serializer = {"name": "bytes", "configuration": {"endian": "little"}}
        packed = {"name": "zstd", "configuration": {"level": 0, "checksum": False}}
        codecs = [serializer, *[packed] * self.compressed, *[CHECKSUM] * self.checksum]
        return {
            "shape": list(self.shape),
            "data_type": "string" if self.texts is not None else self.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunk)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": _fill_value(self),
            "codecs": codecs,
            "attributes": {},
            "dimension_names": list(self.dims),
            "zarr_format": 3,
            "node_type": "array",
            "storage_transformers": [],
        }


def _fill_value(layout: Layout) -> Any:
    if layout.texts is not None:
        return ""
    # NaN marks cells that are not computed; labels have no missing values.
    numbers = {} if layout.label else {"f": "NaN", "c": ["NaN", 0.0]}
    return {"b": False, **numbers}.get(layout.dtype.kind, 0)


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


def layouts(manifest: Manifest) -> dict[str, Layout]:
    """Every array of a new store of this manifest; each chunk has a checksum."""
    return cell_layouts(manifest) | coordinate_layouts(manifest.grid, manifest.label_chunks)


def cell_layouts(manifest: Manifest) -> dict[str, Layout]:
    """The arrays over the cells: outputs, `finite` and the completion counts."""
    grid, block = manifest.grid, manifest.block
    found = {}
    first = sizes_at(manifest, 1)
    for output in manifest.outputs:
        dtype = np.dtype(output.dtype)
        # Chunks keep the size that the axes had first, so an extension adds chunks beside them.
        own = (first.get(d, n) for d, n in zip(output.dims, output.shape, strict=True))
        found[output.name] = Layout(
            output.name, (*grid.dims, *output.dims), (*grid.shape, *output.shape),
            (*block, *(max(1, n) for n in own)), dtype,
            dtype.kind not in "fc",  # random digits do not compress
            True,
        )  # fmt: skip
    for name, kind in (("finite", "bool"), (manifest.completed, "uint8")):
        found[name] = Layout(name, grid.dims, grid.shape, block, np.dtype(kind), True, True)
    return found


def sizes_at(manifest: Manifest, level: int) -> dict[str, int]:
    """Sizes of the vectorized axes in cells of a level; level 1 is before any extension."""
    if level < manifest.num_levels:
        # The box of an extension is (0, n) along all dims but its own, which starts at the old
        # size.
        return {dim: start or stop for dim, (start, stop) in manifest.extensions[level - 1].items()}
    return {axis.dim: len(axis) for axis in manifest.grid.vectorized if axis.dim}


def label_chunks(grid: SweepGrid) -> dict[str, int]:
    """Values of a coordinate in a chunk of a new store, by dim, for axes longer than `LABELS`."""
    sizes = {"seed": len(grid.seeds)}
    sizes |= {axis.dim: len(axis) for axis in (*grid.axes, *grid.vectorized) if axis.dim}
    # The next power of two leaves room for an extension.
    return {
        dim: min(MAX_LABELS, 1 << n.bit_length()) for dim, n in sizes.items() if n > LABELS
    }  # fmt: skip


def coordinate_layouts(grid: SweepGrid, chunks: Mapping[str, int]) -> dict[str, Layout]:
    """The arrays of the coordinates; `chunks` has the sizes of their chunks that are not usual."""
    found = {}
    for name, (dims, values) in coordinates(grid).items():
        texts = tuple(map(str, values.ravel())) if values.dtype.kind == "U" else None
        # Fixed, so that an extension rewrites only the last chunk of labels.
        chunk = tuple(chunks.get(dim, LABELS) for dim in dims)
        found[name] = Layout(name, dims, values.shape, chunk, values.dtype, True, True, True, texts)
    return found


def coordinates(grid: SweepGrid) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """(dims, values) of every name of the grid, and of the seed."""
    found = {}
    for axis in (*grid.axes, *grid.vectorized):
        for name in axis.names:
            column = np.array(axis.column(name))
            found[name] = ((axis.dim,), column) if axis.dim else ((), np.array(column[0]))
    return {**found, "seed": (("seed",), np.array(grid.seeds, np.int64))}


def match_metadata(layout: Layout, held: Mapping[str, Any]) -> Layout:
    """The layout with or without checksums, as the metadata of a store have it.

    Stores of earlier versions have no checksums. Raises ValueError for any other difference.
    """
    if not isinstance(held, Mapping):
        raise ValueError(f"{layout.name} has no metadata")
    names = [_codec_name(layout.name, codec) for codec in _tables(held.get("codecs"))]
    wanted = layout.metadata()
    expected = [codec["name"] for codec in wanted["codecs"]]
    if names not in (expected, expected[:-1]):
        raise ValueError(
            f"{layout.name} has the codecs {names}, and a sweep writes {expected}; others could "
            "alter values or use up memory"
        )
    # zarr omits these fields in some versions.
    optional: dict[str, Any] = {"attributes": {}, "storage_transformers": []}
    for field in sorted(wanted.keys() | held.keys(), key=str):
        value = held.get(field, optional.get(field))
        if field != "codecs" and value != wanted.get(field):
            raise ValueError(
                f"{layout.name} has {str(field)!r} {_short(value)}, and the sweep of this store "
                f"has {_short(wanted.get(field))}"
            )
    return replace(layout, checksum=names == expected)


def _tables(held: Any) -> list[Mapping[str, Any]]:
    """The value if it is a list of tables, else an empty list."""
    tables = isinstance(held, list) and all(isinstance(one, Mapping) for one in held)
    return held if tables else []


def _codec_name(array: str, codec: Mapping[str, Any]) -> str:
    """The name of a codec; ValueError for a codec or parameter that no sweep writes."""
    name, parameters = str(codec.get("name")), codec.get("configuration", {})
    # A codec is code that runs when a chunk is read, so only known ones are accepted.
    allowed: dict[str, dict[str, Any]] = {
        "bytes": {"endian": ("little",)},
        "zstd": {"level": range(-131072, 23), "checksum": (False, True)},
        "vlen-utf8": {},
        "crc32c": {},
    }
    if name not in allowed:
        raise ValueError(
            f"{array} has the codec {_short(name)}, which no sweep writes and which could run code "
            f"of whoever made it; allowed are {', '.join(sorted(allowed))}"
        )
    known = allowed[name]
    if not isinstance(parameters, Mapping) or not all(
        key in known and value in known[key] for key, value in parameters.items()
    ):
        raise ValueError(f"{array} has the codec {name} with {_short(parameters)}")
    return name


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 100 else f"{text[:100]}..."
