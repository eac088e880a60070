"""One sweep at a time writes to a store, or workers share it, who take turns to open it.

A sweep that has the store to itself holds a lock of the operating system on a disk, which goes with
a process that is killed. At a URL, and among workers everywhere, the lock is a file that is created
exclusively: the store `x.zarr` has beside it `x.zarr.lock/N`, and whoever creates the next number
holds the lock. The holder keeps rewriting its file while it lives, and marks it free when it is
done. Numbers only grow, so that a lock whose holder is gone is taken over by creating the next one,
which one process alone can do; a holder that slept for so long that it lost the lock finds a higher
number, and stops.
"""

import contextlib
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from negmaml._core.display import one_line
from negmaml._core.extras import require
from negmaml._core.plain_files import LinkedError, read_plain
from negmaml.sweeps.exclusive import MOST, LocalNotes, RemoteNotes, beside
from negmaml.sweeps.storage import StoreError, local_path

BEAT = 5.0  # seconds between two signs of life of who holds a lock at a URL
BEATS_TO_LOSE = 4  # a lock silent for longer is of a process that is gone
FREE = "free"
OPENING = "opening"  # what a worker holds the lock for, who is soon done
Notes = LocalNotes | RemoteNotes


@dataclass(frozen=True)
class Lock:
    """A lock that is held.

    check: raises StoreError if it was lost meanwhile. left: whether the last holder was cut off.
    """

    check: Callable[[], None]
    left: bool


class TakenError(StoreError):
    """Another sweep holds the store."""


@contextmanager
def locked(url: str, opening: bool = False) -> Iterator[Lock]:
    """Hold the store for writing; raises StoreError when another sweep has it.

    opening: for a worker, who shares the store: waits for others that do the same.
    """
    path, what = local_path(url), OPENING if opening else ""
    with ExitStack() as stack:
        lock: Lock | None = None
        if path is None or opening:
            notes = beside(url, "lock" if path is None else OPENING)
            lock = stack.enter_context(_held_by_files(url, notes, opening))
        if path is not None:
            lock = stack.enter_context(_held_locally(url, path, what))
        assert lock is not None
        yield lock


def _taken(url: str, holder: str) -> TakenError:
    by = one_line(holder) or "that just began"
    return TakenError(
        f"store {url!r} is being written by another sweep ({by}); wait for it, or choose another "
        "store"
    )


def this_process() -> str:
    """As others are told of it."""
    return f"process {os.getpid()} on {platform.node()}"


@contextmanager
def _held_locally(url: str, path: Path, what: str) -> Iterator[Lock]:
    filelock = require("filelock", "sweep")
    held = path.with_name(f".{path.name}.lock")
    writer = held.with_suffix(".writer")  # names the writer; left behind after a kill
    if held.is_symlink():  # of whoever made the store: the file it leads to would be emptied
        raise StoreError(f"store {url!r}: its lock {str(held)!r} is a symbolic link; remove it")
    lock = filelock.FileLock(held)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        patience = time.monotonic() + BEAT
        while not _acquired(lock):
            holder = _text(writer)
            patience = time.monotonic() + BEAT if holder else patience
            unsaid = not holder and time.monotonic() < patience  # it has just begun, or just ends
            if not (what and (what in holder or unsaid)):
                raise _taken(url, holder)
            time.sleep(BEAT / 50)  # one that only opens it, and was slow to say that it lives
        left = os.path.lexists(writer)
        writer.unlink(missing_ok=True)  # which may be a link to a file of others
        with open(writer, "x") as file:
            file.write(f"{this_process()}{what and ', '}{what}")
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


def _text(path: Path) -> str:
    """Of a file that its writer may remove at any time."""
    try:
        return (read_plain(path, MOST) or b"").decode(errors="replace")
    except LinkedError:
        return ""


def _acquired(lock) -> bool:
    """Whether a lock of the operating system could be had at once."""
    try:
        lock.acquire(timeout=0)
    except TimeoutError:  # that of filelock is one
        return False
    return True


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
def _held_by_files(url: str, notes: Notes, opening: bool) -> Iterator[Lock]:
    """Clocks of machines differ, so what counts is whether a file changes while we look."""
    files = _Numbered(notes)
    own = f"{this_process()}, {uuid.uuid4().hex[:8]}{', ' + OPENING if opening else ''}"
    number, left = _turn(url, files, own) if opening else _at_once(url, files, own)
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

    def beat(count: int) -> bool:
        if files.newest() != number:
            lost.set()
            return False
        files.write(number, f"{own}, beat {count}")
        return True

    with _left_by_what_is_cut_off(lambda: files.free(number, lost)), beating(beat):
        yield Lock(check, left)


def _at_once(url: str, files: "_Numbered", own: str) -> tuple[int, bool]:
    """(number, whether the last holder was cut off); raises if another has the lock."""
    newest = files.newest()
    left = newest is not None and _wait_until_silent(url, files, newest)
    number = 0 if newest is None else newest + 1
    if not files.take(number, own):
        raise _taken(url, files.read(files.newest() or 0))
    return number, left


def _turn(url: str, files: "_Numbered", own: str) -> tuple[int, bool]:
    """The same, after others that open the store; raises if a sweep has it to itself."""
    watch = Watch(files.notes)
    while True:
        newest = files.newest()
        text = "" if newest is None else files.read(newest)
        silent = newest is not None and text != FREE and watch.silent(files.name(newest))
        if newest is None or text == FREE or silent:
            number = 0 if newest is None else newest + 1
            if files.take(number, own):
                return number, silent
        elif OPENING not in text and watch.moved(files.name(newest)):
            raise _taken(url, text)
        time.sleep(BEAT / 50)


def _wait_until_silent(url: str, files: "_Numbered", number: int) -> bool:
    """Whether the holder of the newest file is gone without a word; raises if it lives."""
    first = files.read(number)
    for _ in range(BEATS_TO_LOSE):
        if first == FREE:
            return False
        time.sleep(BEAT)
        if (now := files.read(number)) not in (first, FREE):
            raise _taken(url, now)
        first = now
    return True


class Watch:
    """Who has been silent while we looked, for longer than one that lives would be."""

    def __init__(self, notes: Notes):
        self.notes = notes
        self.seen: dict[str, tuple[str, float, int]] = {}  # text, since when, changes

    def silent(self, name: str) -> bool:
        """Whether a file did not change for long."""
        now, text = time.monotonic(), self.notes.read(name)
        held, since, changes = self.seen.get(name, (text, now, 0))
        if held != text:
            since, changes = now, changes + 1
        self.seen[name] = text, since, changes
        return now - since > BEAT * BEATS_TO_LOSE

    def moved(self, name: str) -> bool:
        """Whether a file changed since it was first looked at."""
        self.silent(name)
        return self.seen[name][2] > 0


@contextmanager
def beating(beat: Callable[[int], bool]) -> Iterator[None]:
    """Call beat(1), beat(2), ... as long as the block runs, or until it says False."""
    ended = threading.Event()

    def run() -> None:
        count = 0
        while not ended.wait(BEAT):
            count += 1
            with contextlib.suppress(OSError):  # a beat that fails is followed by another
                if not beat(count):
                    return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class _Numbered:
    """Files that are named by numbers."""

    def __init__(self, notes: Notes):
        self.notes = notes

    def name(self, number: int) -> str:
        return f"{number:08d}"

    def numbers(self) -> list[int]:
        return [int(name) for name in self.notes.names() if name.isdecimal() and len(name) < 16]

    def newest(self) -> int | None:
        return max(self.numbers(), default=None)

    def read(self, number: int) -> str:
        return self.notes.read(self.name(number))

    def write(self, number: int, text: str) -> None:
        self.notes.write(self.name(number), text)

    def take(self, number: int, own: str) -> bool:
        """Whether the next number could be created."""
        if not self.notes.create(self.name(number), own):
            return False
        if isinstance(self.notes, RemoteNotes):
            self.notes.check(self.name(number), own)
        if self.newest() != number:  # created late, over one that others had freed long ago
            self.remove(number)
            return False
        return True

    def remove(self, number: int) -> None:
        self.notes.remove(self.name(number))

    def free(self, number: int, lost: threading.Event) -> None:
        if not lost.is_set():
            with contextlib.suppress(OSError):
                self.write(number, FREE)
