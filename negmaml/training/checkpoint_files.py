"""Checks of a checkpoint's files before they are read, since they can be of unknown origin.

Orbax and tensorstore run no code of a checkpoint. But they follow symbolic links, and unpack chunks
whatever they unpack to, so a file of some kilobytes could take all memory.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from negmaml._core.plain_files import plain_sizes

MOST_TEXT = 2**26  # bytes of a file of metadata
TEXTS = ("metadata", "_METADATA", "_CHECKPOINT_METADATA", "_sharding")


def check_files(directory: Path) -> None:
    """Raise ValueError for a symbolic link or a device among the files, or too large metadata."""
    for name, size in plain_sizes(directory):
        if size > MOST_TEXT and (Path(name).name in TEXTS or "array_metadatas" in name):
            raise ValueError(
                f"{name} in {str(directory)!r} has {size:,} bytes, and {MOST_TEXT:,} are the most"
            )


def check_arrays(folder: Path, like: Sequence[Any]) -> None:
    """Raise ValueError for arrays or chunks that are not of the size of their leaves.

    folder: the leaves of a checkpoint, each an array of zarr in a key-value store of tensorstore.
    """
    import tensorstore  # comes with orbax

    if not (folder / "manifest.ocdbt").is_file():
        raise ValueError(f"{str(folder)!r} is not how `fit` writes leaves")
    held = tensorstore.KvStore.open({"driver": "ocdbt", "base": folder.as_uri() + "/"}).result()
    for key in held.list().result():
        name, _, kind = key.decode(errors="replace").partition("/")
        if kind not in (".zarray", "zarr.json"):
            continue
        shape, chunk = _sizes(json.loads(held.read(key).result().value))
        leaf = like[int(name)]
        least = math.prod(np.shape(leaf))
        most = 8 * max(1, least)  # a key of random numbers has several words
        fits = least <= math.prod(shape) <= most and math.prod(chunk) <= most
        if not fits or min((*shape, *chunk), default=1) < 0:
            raise ValueError(f"leaf {name} has the shape {shape} in chunks of {chunk}")


def _sizes(metadata: dict[str, Any]) -> tuple[list[int], list[int]]:
    """(shape, shape of a chunk) of an array of either format of zarr."""
    if "chunks" in metadata:
        return metadata["shape"], metadata["chunks"]
    return metadata["shape"], metadata["chunk_grid"]["configuration"]["chunk_shape"]
