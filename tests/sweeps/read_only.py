"""Folders that nobody can write to, not even the superuser that tests may run as."""

import contextlib
import errno
import os
import sys

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate")
_closed: list[str] = []
_watching: list[bool] = []


def _refuse(event, arguments):
    """An audit hook, which Python calls before every access to a file."""
    if not _closed or (event != "open" and event not in CHANGES):
        return
    flags = arguments[2] or 0 if event == "open" else os.O_WRONLY
    if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return
    for path in arguments[:2]:
        if isinstance(path, str | bytes | os.PathLike):
            place = os.path.realpath(os.fsdecode(path))
            if any(place == folder or place.startswith(folder + os.sep) for folder in _closed):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), place)


@contextlib.contextmanager
def read_only(folder):
    """Every attempt to change something under a folder fails, as on a disk mounted read-only."""
    if not _watching:
        sys.addaudithook(_refuse)
        _watching.append(True)
    _closed.append(os.path.realpath(folder))
    try:
        yield
    finally:
        _closed.remove(os.path.realpath(folder))
