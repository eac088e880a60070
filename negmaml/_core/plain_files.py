"""Plain files of a folder: symbolic links and devices in it are errors and are never followed.

The folder itself may be reached by a link, which is its owner's choice. The files in it may come
from an archive of unknown origin, whose links could point anywhere.
"""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

LINKED = errno.ELOOP, getattr(errno, "EMLINK", errno.ELOOP)
NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
NONBLOCK = getattr(os, "O_NONBLOCK", 0)  # a pipe would wait for somebody to write to it


class LinkedError(ValueError):
    """Something in a folder is no plain file."""

    def __init__(self, path: Path | str):
        super().__init__(
            f"{str(path)!r} is a symbolic link or a device, which is not followed; put a copy of "
            "the file in its place, or remove it"
        )


def open_plain(path: Path, flags: int) -> int:
    """The descriptor of a plain file; LinkedError for anything else."""
    try:
        file = os.open(path, flags | NOFOLLOW | NONBLOCK, 0o666)
    except OSError as error:
        # O_NOFOLLOW reports a link with an errno that depends on the system.
        if error.errno in LINKED or (not NOFOLLOW and path.is_symlink()):
            raise LinkedError(path) from error
        if error.errno in (errno.ENXIO, errno.EISDIR) and path.exists():
            raise LinkedError(path) from error
        raise
    # The descriptor is checked, not the path, which could be replaced in between.
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise LinkedError(path)
    return file


def read_plain(path: Path, most: int | None = None) -> bytes | None:
    """The content of a file, at most one byte more than `most` of it; None for a missing file."""
    try:
        file = open_plain(path, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    # One byte more than allowed shows that a file is too long.
    with open(file, "rb") as opened:
        return opened.read(-1 if most is None else most + 1)


def plain_sizes(folder: Path, under: str = "") -> Iterator[tuple[str, int]]:
    """Every file below a folder as its path from there and its bytes; LinkedError for a link.

    under: a folder in it, to which the files are limited.
    """
    if under and os.path.islink(folder / under):
        raise LinkedError(folder / under)
    left = [(f"{under}/" if under else "", str(folder / under))]
    while left:
        prefix, path = left.pop()
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        left.append((f"{prefix}{entry.name}/", entry.path))
                    elif entry.is_file(follow_symlinks=False):
                        try:
                            yield prefix + entry.name, entry.stat(follow_symlinks=False).st_size
                        except FileNotFoundError:  # others that share the store removed it
                            continue
                    else:
                        raise LinkedError(entry.path)
        except (FileNotFoundError, NotADirectoryError):
            continue
