"""One sweep at a time writes to a store."""

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from negmaml._core.extras import require

BEAT = 5.0  # seconds between two signs of life of who holds a lock at a URL
BEATS_TO_LOSE = 4  # a lock silent for longer is of a process that is gone


class StoreError(ValueError):
    """The store is not one that this sweep can write to."""


def local_path(url: str) -> Path | None:
    """The path of a local store, None for a URL."""
    if "://" not in url:
        return Path(url)
    return Path(url.removeprefix("file://")) if url.startswith("file://") else None


@contextmanager
def locked(url: str) -> Iterator[None]:
    """Hold the store for writing; raises StoreError when another sweep has it.

    Locally by a lock of the operating system, which goes with a process that is killed; at a URL by
    a file beside the store that its holder keeps rewriting.
    """
    path = local_path(url)
    with _flock(url, path) if path is not None else _heartbeat(url):
        yield


def _taken(url: str, holder: str) -> StoreError:
    return StoreError(
        f"store {url!r} is being written by another sweep ({holder}); wait for it, or choose "
        "another store"
    )


def _this_process() -> str:
    return f"process {os.getpid()} on {os.uname().nodename}"


@contextmanager
def _flock(url: str, path: Path) -> Iterator[None]:
    import fcntl  # not on every system, and only needed here

    lock = path.with_name(f".{path.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = open(lock, "a+")  # noqa: SIM115
    except OSError as error:
        raise OSError(
            error.errno,
            f"store {url!r} cannot be written ({error.strerror}); choose another path, or mend "
            "its permissions",
        ) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.seek(0)
            raise _taken(url, handle.read().strip()) from error
        handle.truncate(0)
        handle.write(_this_process())
        handle.flush()
        yield


@contextmanager
def _heartbeat(url: str) -> Iterator[None]:
    """Clocks of machines differ, so what counts is whether the file changes while we look."""
    files, path = require("fsspec", "sweep").core.url_to_fs(f"{url.rstrip('/')}.lock")
    own = f"{_this_process()}, {uuid.uuid4().hex[:8]}"

    def read() -> str:
        try:
            return files.cat_file(path).decode()
        except FileNotFoundError:
            return ""

    def beat(count: int) -> None:
        files.pipe_file(path, f"{own}, beat {count}".encode())

    first = read()
    for _ in range(BEATS_TO_LOSE if first else 0):
        time.sleep(BEAT)
        now = read()
        if now and now != first:
            raise _taken(url, now)
    beat(0)
    if not read().startswith(own):  # two came at once, and the other was later
        raise _taken(url, read())
    ended = threading.Event()

    def keep_beating() -> None:
        count = 0
        while not ended.wait(BEAT):
            count += 1
            with contextlib.suppress(OSError):  # a beat that fails is followed by another
                beat(count)

    beating = threading.Thread(target=keep_beating, daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        with contextlib.suppress(OSError):
            files.rm_file(path)
