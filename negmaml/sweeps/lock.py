"""One sweep at a time writes to a store.

Locally by a lock of the operating system, which goes with a process that is killed. At a URL by a
file that is created exclusively: the store `x.zarr` has beside it `x.zarr.lock/N`, and whoever
creates the next number holds the lock. The holder keeps rewriting its file while it lives, and
marks it free when it is done. Numbers only grow, so that a lock whose holder is gone is taken over
by creating the next one, which one process alone can do; a holder that slept for so long that it
lost the lock finds a higher number, and stops.
"""

import contextlib
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from negmaml._core.extras import require
from negmaml.sweeps.files import StoreError, local_path

BEAT = 5.0  # seconds between two signs of life of who holds a lock at a URL
BEATS_TO_LOSE = 4  # a lock silent for longer is of a process that is gone
FREE = "free"


@dataclass(frozen=True)
class Lock:
    """A lock that is held.

    check: raises StoreError if it was lost meanwhile. left: whether the last holder was cut off.
    """

    check: Callable[[], None]
    left: bool


@contextmanager
def locked(url: str) -> Iterator[Lock]:
    """Hold the store for writing; raises StoreError when another sweep has it."""
    path = local_path(url)
    with _held_locally(url, path) if path is not None else _held_by_files(url) as lock:
        yield lock


def _taken(url: str, holder: str) -> StoreError:
    return StoreError(
        f"store {url!r} is being written by another sweep ({holder or 'that just began'}); wait "
        "for it, or choose another store"
    )


def _this_process() -> str:
    return f"process {os.getpid()} on {platform.node()}"


@contextmanager
def _held_locally(url: str, path: Path) -> Iterator[Lock]:
    filelock = require("filelock", "sweep")
    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"))
    writer = path.with_name(
        f".{path.name}.writer"
    )  # says who writes; one that is cut off leaves it
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        left = writer.exists()
        writer.write_text(_this_process())
    except filelock.Timeout as error:
        holder = writer.read_text() if writer.exists() else ""
        raise _taken(url, holder) from error
    except OSError as error:
        lock.release()
        raise OSError(
            error.errno,
            f"store {url!r} cannot be written ({error.strerror}); choose another path, or mend "
            "its permissions",
        ) from error
    try:
        with _left_by_what_is_cut_off(lambda: writer.unlink(missing_ok=True)):
            yield Lock(lambda: None, left)
    finally:
        lock.release()


@contextmanager
def _left_by_what_is_cut_off(end: Callable[[], None]) -> Iterator[None]:
    """Call `end` after success and errors, not after an interruption, which can leave litter."""
    try:
        yield
    except Exception:
        end()
        raise
    end()


@contextmanager
def _held_by_files(url: str) -> Iterator[Lock]:
    """Clocks of machines differ, so what counts is whether a file changes while we look."""
    files = _LockFiles(url)
    newest = files.newest()
    left = newest is not None and _wait_until_silent(files, newest)
    number = 0 if newest is None else newest + 1
    own = f"{_this_process()}, {uuid.uuid4().hex[:8]}"
    if not files.create(number, own):
        raise _taken(url, files.read(number))
    if files.create(number, own, again=True):
        files.remove(number)
        raise files.not_exclusive()
    if files.newest() != number:  # created late, over one that others had freed long ago
        files.remove(number)
        raise _taken(url, files.read(files.newest() or 0))
    for older in files.numbers():
        if older < number:
            files.remove(older)
    lost = threading.Event()

    def check() -> None:
        if lost.is_set():
            raise StoreError(
                f"store {url!r} went to another sweep, which took this one for gone after "
                f"{BEAT * BEATS_TO_LOSE:.0f} s of silence; run the same call again"
            )

    with (
        _left_by_what_is_cut_off(lambda: files.free(number, lost)),
        _beating(files, number, own, lost),
    ):
        yield Lock(check, left)


def _wait_until_silent(files: "_LockFiles", number: int) -> bool:
    """Whether the holder of the newest file is gone without a word; raises if it lives."""
    first = files.read(number)
    for _ in range(BEATS_TO_LOSE):
        if first == FREE:
            return False
        time.sleep(BEAT)
        if (now := files.read(number)) not in (first, FREE):
            raise _taken(files.url, now)
        first = now
    return True


@contextmanager
def _beating(files: "_LockFiles", number: int, own: str, lost: threading.Event) -> Iterator[None]:
    """Rewrite the file of a number as long as the block runs; `lost` is set if it is lost."""
    ended = threading.Event()

    def beat() -> None:
        count = 0
        while not ended.wait(BEAT):
            count += 1
            with contextlib.suppress(OSError):  # a beat that fails is followed by another
                if files.newest() != number:
                    lost.set()
                    return
                files.write(number, f"{own}, beat {count}")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class _LockFiles:
    """The numbered files beside a store at a URL."""

    def __init__(self, url: str):
        fsspec = require("fsspec", "sweep")
        self.url = url
        self.files, self.folder = fsspec.core.url_to_fs(f"{url.rstrip('/')}.lock")
        write = getattr(type(self.files), "_pipe_file", type(self.files).pipe_file)
        if write is fsspec.spec.AbstractFileSystem.pipe_file:  # looks first, and writes then
            raise self.not_exclusive()

    def not_exclusive(self) -> StoreError:
        return StoreError(
            f"store {self.url!r} is on a file system that cannot create a file exclusively, so two "
            "sweeps could write to it at once; use a path, or S3, Google Cloud Storage or Azure"
        )

    def path(self, number: int) -> str:
        return f"{self.folder}/{number:08d}"

    def numbers(self) -> list[int]:
        self.files.invalidate_cache(self.folder)
        try:
            found = self.files.ls(self.folder, detail=False)
        except FileNotFoundError:
            return []
        names = [name.rsplit("/", 1)[-1] for name in found]
        return sorted(int(name) for name in names if name.isdecimal())

    def newest(self) -> int | None:
        return max(self.numbers(), default=None)

    def read(self, number: int) -> str:
        try:
            return self.files.cat_file(self.path(number)).decode()
        except FileNotFoundError:
            return ""

    def write(self, number: int, text: str) -> None:
        self.files.pipe_file(self.path(number), text.encode())

    def create(self, number: int, text: str, again: bool = False) -> bool:
        """Whether the file could be made, because there was none."""
        try:
            self.files.pipe_file(self.path(number), text.encode(), mode="create")
        except FileExistsError:
            held = True
        except OSError:  # what stores answer that have no word for it
            held = bool(self.read(number))
            if not held:
                raise
        else:
            return True
        return not again and held and self.read(number) == text  # sent twice by the client

    def remove(self, number: int) -> None:
        with contextlib.suppress(OSError):
            self.files.rm_file(self.path(number))

    def free(self, number: int, lost: threading.Event) -> None:
        if not lost.is_set():
            with contextlib.suppress(OSError):
                self.write(number, FREE)
