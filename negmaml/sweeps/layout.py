"""The arrays that a manifest implies: metadata, chunks, and the bytes that a chunk may have.

A store is read by this description only. The metadata in the store are compared with it and never
used, so the author of a store cannot choose a codec, a shape or a fill value.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import lt
from typing import Any

import numpy as np

from negmaml.sweeps.grid import Region, SweepGrid
from negmaml.sweeps.manifest import Manifest

ROUND = 1024  # large blocks are a multiple of it along a dim
LABELS = 1024  # values of a coordinate in a chunk: most extensions fit into the first one
MAX_LABELS = 2**20  # the same for long axes, which would otherwise make many files
CHECKSUM = {"name": "crc32c"}
CHECKSUM_BYTES = 4
INDEX_BYTES = 16  # of an inner chunk in the index of its shard
# Bytes of an inner chunk, at most, unless one cell has more; part of the format, like `LABELS`.
INNER_BYTES = 2**23


@dataclass(frozen=True)
class Layout:
    """One array of a store. All chunks have the same shape, also at the far edges.

    label: whether it is a coordinate. texts: the values of a coordinate of strings; the size of its
    chunks depends on them. inner: the shape of the inner chunks, if a chunk is a shard of them.
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
    inner: tuple[int, ...] | None = None

    @property
    def floating(self) -> bool:
        """True if its fill value is NaN."""
        return self.dtype.kind in "fc"

    @cached_property
    def chunks(self) -> tuple[int, ...]:
        """Number of chunks along each dim."""
        return tuple(-(-n // size) for n, size in zip(self.shape, self.chunk, strict=True))

    @cached_property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk of numbers in memory."""
        return math.prod(self.chunk) * self.dtype.itemsize

    @property
    def inner_grid(self) -> tuple[int, ...]:
        """Number of inner chunks of a shard along each dim."""
        return tuple(
            n // size for n, size in zip(self.chunk, self.inner or self.chunk, strict=True)
        )

    @cached_property
    def num_inner(self) -> int:
        """Number of inner chunks of a shard."""
        return math.prod(self.inner_grid)

    @cached_property
    def inner_bytes(self) -> int:
        """Bytes of an inner chunk in a shard, with its checksum."""
        return self.chunk_bytes // self.num_inner + CHECKSUM_BYTES

    def region(self, at: Sequence[int]) -> Region:
        """The part of the array that a chunk holds, as slices."""
        return tuple(
            slice(i * size, min((i + 1) * size, n))
            for i, size, n in zip(at, self.chunk, self.shape, strict=True)
        )

    @cached_property
    def folder(self) -> str:
        """The folder of the chunks."""
        return f"{self.name}/c"

    def key(self, at: Sequence[int]) -> str:
        """The file of a chunk."""
        return "/".join([self.folder, *map(str, at)])

    def position(self, key: str) -> tuple[int, ...] | None:
        """The position of the chunk in a file; None if the file is not a chunk of this array."""
        if not key.startswith(self.folder):
            return None
        digits = key[len(self.folder) :].replace("/", "")
        # int() also reads digits of other scripts, and huge numbers slowly.
        if len(digits) > 11 * len(self.shape) or not (digits + "0").isdecimal():
            return None
        parts = key.split("/")[2:]
        if not digits.isascii() or len(parts) != len(self.shape) or "" in parts:
            return None
        at = tuple(map(int, parts))
        return at if all(map(lt, at, self.chunks)) and key == self.key(at) else None

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
        if self.inner is not None:
            return self.num_inner * (self.inner_bytes + INDEX_BYTES) + CHECKSUM_BYTES
        raw = self.raw_bytes(at) + CHECKSUM_BYTES * self.checksum
        return raw + raw // 64 + 1024 if self.compressed else raw

    def wrong_size(self, at: Sequence[int], size: int) -> bool:
        """True if the file of a chunk cannot have this size in bytes."""
        # Without compression the size is known exactly; with it there are only bounds.
        most = self.most_bytes(at)
        if self.compressed:
            return not CHECKSUM_BYTES * self.checksum < size <= most
        return size != most

    def metadata(self) -> dict[str, Any]:
        """The `zarr.json` of the array."""
        serializer: dict[str, Any] = {"name": "bytes"}
        if self.texts is not None:
            serializer = {"name": "vlen-utf8", "configuration": {}}
        elif self.dtype.itemsize > 1:
            serializer = {"name": "bytes", "configuration": {"endian": "little"}}
        packed = {"name": "zstd", "configuration": {"level": 0, "checksum": False}}
        codecs = [serializer, *[packed] * self.compressed, *[CHECKSUM] * self.checksum]
        if self.inner is not None:
            index = [{"name": "bytes", "configuration": {"endian": "little"}}, CHECKSUM]
            parts = {"chunk_shape": list(self.inner), "codecs": codecs, "index_codecs": index,
                     "index_location": "end"}  # fmt: skip
            codecs = [{"name": "sharding_indexed", "configuration": parts}]
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
        chunk = (*block, *(max(1, n) for n in own))
        compressed = dtype.kind not in "fc"  # random digits do not compress
        sharded = manifest.format > 4 and not compressed
        found[output.name] = Layout(
            output.name, (*grid.dims, *output.dims), (*grid.shape, *output.shape), chunk, dtype,
            compressed, True, inner=_inner_chunk(chunk, dtype, len(block)) if sharded else None,
        )  # fmt: skip
    for name, kind in (("finite", "bool"), (manifest.completed, "uint8")):
        found[name] = Layout(name, grid.dims, grid.shape, block, np.dtype(kind), True, True)
    return found


def _inner_chunk(chunk: Sequence[int], dtype: np.dtype, cell_dims: int) -> tuple[int, ...] | None:
    """The shape of the inner chunks of a shard; None if the chunk is small, or cannot be divided.

    Divides the dims over the cells only, the last ones last, as blocks do.
    """
    own = chunk[cell_dims:]
    left = max(1, INNER_BYTES // (math.prod(own) * dtype.itemsize))
    found: list[int] = []
    for size in reversed(chunk[:cell_dims]):
        fewest = -(-size // left)
        pieces = (n for n in range(fewest, 16 * fewest + 1) if size % n == 0)
        found.append(size // next(pieces, size))
        left = left // found[-1] if found[-1] == size else 1
    inner = (*reversed(found), *own)
    # Few cells in an inner chunk would make a long index and many small reads.
    small = math.prod(inner) * dtype.itemsize < INNER_BYTES // 16
    return None if small or inner == tuple(chunk) else inner


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
    wanted = layout.metadata()
    expected = [codec["name"] for codec in wanted["codecs"]]
    if layout.inner is not None and held.get("codecs") == wanted["codecs"]:
        names = expected
    else:
        names = [_codec_name(layout.name, codec) for codec in _tables(held.get("codecs"))]
    if names != expected and (layout.inner or names != expected[:-1]):
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
    return layout if layout.inner else replace(layout, checksum=names == expected)


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
