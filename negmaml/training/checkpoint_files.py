"""Checks of a checkpoint's files before they are read, since their origin may be unknown.

Orbax and tensorstore run no code of a checkpoint. But they follow symbolic links, and decompress
chunks without a limit on the size, so a file of a few kilobytes could take all memory.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from negmaml._core.plain_files import plain_sizes

MAX_METADATA = 2**26  # bytes of a file of metadata
METADATA = ("metadata", "_METADATA", "_CHECKPOINT_METADATA", "_sharding")


def check_files(directory: Path) -> None:
    """Raise ValueError for a symbolic link or a device among the files, or too large metadata."""
    for name, size in plain_sizes(directory):
        is_metadata = Path(name).name in METADATA or "array_metadatas" in name
        if size > MAX_METADATA and is_metadata:
            raise ValueError(
                f"{name} in {str(directory)!r} has {size:,} bytes, at most {MAX_METADATA:,} are "
                "allowed"
            )


def check_arrays(folder: Path, like: Sequence[Any]) -> None:
    """Raise ValueError for arrays or chunks whose size is not that of their leaf.

    folder: the leaves of a checkpoint, each an array of zarr in a key-value store of tensorstore.
    like: the leaves that are expected.
    """
    import tensorstore  # comes with orbax

    if not (folder / "manifest.ocdbt").is_file():
        raise ValueError(f"{str(folder)!r} is not in the format in which `fit` writes leaves")
    held = tensorstore.KvStore.open({"driver": "ocdbt", "base": folder.as_uri() + "/"}).result()
    for key in held.list().result():
        name, _, kind = key.decode(errors="replace").partition("/")
        if kind not in (".zarray", "zarr.json"):
            continue
        shape, chunk = _shapes(json.loads(held.read(key).result().value))
        leaf = like[int(name)]
        least = math.prod(np.shape(leaf))
        most = 8 * max(1, least)  # a random key has several words of data for one entry
        fits = least <= math.prod(shape) <= most and math.prod(chunk) <= most
        if not fits or min((*shape, *chunk), default=1) < 0:
            raise ValueError(f"leaf {name} has the shape {shape} in chunks of {chunk}")


def _shapes(metadata: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Return (shape, shape of a chunk) from the metadata of an array, of zarr 2 or zarr 3."""
    if "chunks" in metadata:
        return metadata["shape"], metadata["chunks"]
    return metadata["shape"], metadata["chunk_grid"]["configuration"]["chunk_shape"]
