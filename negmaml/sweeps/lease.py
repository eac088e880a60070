"""Leases: the right to a store, or to one of its blocks, that one process holds at a time.

A lease is a series of files beside the store, `PREFIX00000000`, `PREFIX00000001`, ...; the process
that created the file with the highest number holds it. Creation is exclusive, so two processes
never create the same number. The holder rewrites its heartbeat while it lives. If the heartbeat
stops, another process takes over by creating the next number, and a holder that slept meanwhile
finds the higher number and stops.

Clocks of machines differ, so a heartbeat counts as stopped if it did not change while this process
watched it for `MAX_MISSED` periods of `HEARTBEAT_S` seconds.

A sweep that has a local store to itself holds a lock of the operating system instead, which frees
itself when the process dies. At a URL, and among workers that open a store, the lock is a lease.
"""

import contextlib
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from negmaml._core.display import one_line
from negmaml._core.extras import require
from negmaml.sweeps.storage import (
    LocalStorage,
    Storage,
    StoreError,
    local_path,
    storage_beside,
)

HEARTBEAT_S = 5.0  # seconds between two heartbeats
MAX_MISSED = 4  # heartbeats; after as many the holder counts as dead
FREE = "free"
OPENING = "opening"  # marks a lock that a worker holds only while it opens the store


class TakenError(StoreError):
    """Another sweep holds the store."""


def this_process() -> str:
    """This process as error messages and `status` name it."""
    return f"process {os.getpid()} on {platform.node()}"


class HeartbeatMonitor:
    """Watches files and tells which of them stopped changing.

    It compares only contents that this process has read itself, and its own clock.
    """

    def __init__(self, storage: Storage):
        self.storage = storage
        self.seen: dict[str, tuple[str, float, int]] = {}  # text, since when, number of changes

    def silent(self, key: str) -> bool:
        """True if a file has not changed for `MAX_MISSED` periods since it was first read."""
        # The system clock may jump when it is synchronised; this one cannot.
        now, text = time.monotonic(), self.storage.read_text(key)
        last, since, changes = self.seen.get(key, (text, now, 0))
        if last != text:
            since, changes = now, changes + 1
        self.seen[key] = text, since, changes
        return now - since > HEARTBEAT_S * MAX_MISSED

    def changed(self, key: str) -> bool:
        """True if a file has changed since it was first read."""
        self.silent(key)
        return self.seen[key][2] > 0


class Lease:
    """One lease, acquired, renewed and released by this process.

    text: what the holder's file says. If it is the key of another file in the same storage, that
    file has the heartbeat, else the holder's file itself has it. keep: whether `release` keeps the
    file and marks it as free. Then numbers only grow, and a process that decided to take over long
    ago cannot succeed after others have held and released the lease.
    """

    def __init__(self, monitor: HeartbeatMonitor, prefix: str, text: str, keep: bool = False):
        self.monitor, self.storage = monitor, monitor.storage
        self.prefix, self.text, self.keep = prefix, text, keep
        self.number = 0
        self.previous_owner_crashed = False
        self.lost = threading.Event()

    @property
    def key(self) -> str:
        """The file of the number that this process holds."""
        return self._key(self.number)

    def _key(self, number: int) -> str:
        return f"{self.prefix}{number:08d}"

    def _numbers(self, names: Sequence[str] | None = None) -> list[int]:
        names = self.storage.names() if names is None else names
        own = (n.removeprefix(self.prefix) for n in names if n.startswith(self.prefix))
        return sorted(int(number) for number in own if number.isdecimal() and len(number) < 16)

    def holder(self) -> tuple[str, str]:
        """(key, text) of the newest file; both are empty before the first acquisition."""
        numbers = self._numbers()
        key = self._key(numbers[-1]) if numbers else ""
        return key, self.storage.read_text(key) if key else ""

    def acquire(self) -> bool:
        """Acquire the lease if it is free or its holder is silent; return whether it was."""
        names = self.storage.names()
        earlier = self._numbers(names)
        if earlier:
            key = self._key(earlier[-1])
            holder = self.storage.read_text(key)
            # All claims of a worker have its key as text, so `holder == self.text` is a block that
            # it has claimed already.
            heartbeat = holder if holder in names else key
            if holder != FREE and (holder == self.text or not self.monitor.silent(heartbeat)):
                return False
            self.previous_owner_crashed = holder != FREE
        # Two processes that both found the lease free race for one number; creation decides.
        self.number = earlier[-1] + 1 if earlier else 0
        if not self.storage.create(self.key, self.text.encode()):
            return False
        if not self.held():  # created late, below a number that others have released meanwhile
            self.storage.discard(self.key)
            return False
        # The newest file decides, so older ones can go, also those that a crash has left.
        for older in earlier:
            self.storage.discard(self._key(older))
        return True

    def held(self) -> bool:
        """True if no other process has taken the lease over."""
        # Read anew each time: only a file with a higher number shows that another took over.
        return not self.lost.is_set() and self._numbers()[-1:] == [self.number]

    def renew(self, text: str) -> bool:
        """Rewrite the heartbeat; False if the lease was lost."""
        if not self.held():
            self.lost.set()
            return False
        self.storage.overwrite(self.key, text.encode())
        return True

    def release(self) -> None:
        """Give the lease back, unless it was lost."""
        if self.keep and not self.lost.is_set():
            with contextlib.suppress(OSError):
                self.storage.overwrite(self.key, FREE.encode())
        elif not self.keep:
            self.storage.discard(self.key)


@contextmanager
def heartbeats(beat: Callable[[int], bool]) -> Iterator[None]:
    """Call beat(1), beat(2), ... in a thread while the block runs, or until it returns False."""
    ended = threading.Event()

    def run() -> None:
        count = 0
        # Waiting on the event instead of sleeping lets the thread end as soon as the block does.
        while not ended.wait(HEARTBEAT_S):
            count += 1
            with contextlib.suppress(OSError):  # the next heartbeat may succeed
                if not beat(count):
                    return

    # A daemon does not keep a process alive whose main thread has ended, so its lease expires.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@dataclass(frozen=True)
class StoreLock:
    """A lock on a store that this process holds.

    check: raises StoreError if the lock was lost. previous_owner_crashed: whether the last holder
    ended without releasing it, so that it may have left unfinished files.
    """

    check: Callable[[], None]
    previous_owner_crashed: bool


@contextmanager
def locked(url: str, opening: bool = False) -> Iterator[StoreLock]:
    """Hold the store for writing; raise TakenError if another sweep holds it.

    opening: for a worker that shares the store; it waits for other workers that open it.
    """
    path = local_path(url)
    with ExitStack() as stack:
        lock: StoreLock | None = None
        # Workers run on several machines, where locks of the operating system may not hold.
        if path is None or opening:
            storage = storage_beside(url, "lock" if path is None else OPENING)
            lock = stack.enter_context(_locked_by_lease(url, storage, opening))
        if path is not None:
            lock = stack.enter_context(_locked_by_system(url, path, opening))
        assert lock is not None
        yield lock


def _taken(url: str, holder: str) -> TakenError:
    by = one_line(holder) or "that just began"
    return TakenError(
        f"store {url!r} is being written by another sweep ({by}); wait for it, or choose another "
        "store"
    )


@contextmanager
def _locked_by_lease(url: str, storage: Storage, opening: bool) -> Iterator[StoreLock]:
    # The random part tells two holders apart when a process number is used again.
    owner = f"{this_process()}, {uuid.uuid4().hex[:8]}{f', {OPENING}' if opening else ''}"
    lease = Lease(HeartbeatMonitor(storage), "", owner, keep=True)
    while True:
        key, holder = lease.holder()
        if lease.acquire():
            break
        # A worker waits for others that only open the store. Everybody waits until it is clear
        # whether the holder lives, and gives up if it does. A file without text was removed by the
        # next holder since its name was read, or is just being written: that says nothing yet.
        if not (opening and (OPENING in holder or not holder)) and (
            lease.monitor.changed(key) if key and holder != FREE else not opening
        ):
            raise _taken(url, lease.holder()[1])
        time.sleep(HEARTBEAT_S / 50 if opening else HEARTBEAT_S)
    # On a file system that creates a file twice, no lease would protect anything.
    storage.check_exclusive(lease.key, owner.encode())

    def check() -> None:
        if lease.lost.is_set():
            raise StoreError(
                f"store {url!r} was taken over by another sweep, after this process showed no "
                f"heartbeat for {HEARTBEAT_S * MAX_MISSED:.0f} s; run the same call again"
            )

    def beat(count: int) -> bool:
        return lease.renew(f"{owner}, beat {count}")

    with cleanup_unless_interrupted(lease.release), heartbeats(beat):
        yield StoreLock(check, lease.previous_owner_crashed)


@contextmanager
def _locked_by_system(url: str, path: Path, opening: bool) -> Iterator[StoreLock]:
    filelock = require("filelock", "sweep")
    locked_file = path.with_name(f".{path.name}.lock")
    # It names the holder. It remains after a kill, and so tells that the holder crashed.
    writer = locked_file.with_suffix(".writer")
    if locked_file.is_symlink():  # filelock would empty the file that it leads to
        raise StoreError(
            f"store {url!r}: its lock {str(locked_file)!r} is a symbolic link; remove it"
        )
    lock = filelock.FileLock(locked_file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A holder writes its name just after it acquires the lock; wait that long before judging.
        patience = time.monotonic() + HEARTBEAT_S
        while not _acquired(lock):
            holder = LocalStorage(path.parent).read_text(writer.name)
            patience = time.monotonic() + HEARTBEAT_S if holder else patience
            unnamed = not holder and time.monotonic() < patience  # it just begins, or just ends
            if not (opening and (OPENING in holder or unnamed)):
                raise _taken(url, holder)
            time.sleep(HEARTBEAT_S / 50)  # the holder only opens the store
        crashed = os.path.lexists(writer)
        writer.unlink(missing_ok=True)  # not truncated: it may be a link to another file
        with open(writer, "x") as file:
            file.write(f"{this_process()}{f', {OPENING}' if opening else ''}")
    except OSError as error:
        lock.release()
        raise OSError(
            error.errno,
            f"store {url!r} cannot be written ({error.strerror}); choose another path, or change "
            "its permissions",
        ) from error
    try:
        with cleanup_unless_interrupted(lambda: writer.unlink(missing_ok=True)):
            yield StoreLock(lambda: None, crashed)
    finally:
        # Released after an interrupt too; the writer's file stays and tells the next holder.
        lock.release()


def _acquired(lock) -> bool:
    """Try to acquire a lock of the operating system without waiting."""
    try:
        lock.acquire(timeout=0)
    except TimeoutError:  # the Timeout of filelock is a subclass
        return False
    return True


@contextmanager
def cleanup_unless_interrupted(clean: Callable[[], None]) -> Iterator[None]:
    """Call `clean` after success and after errors, but not after an interrupt or exit.

    An interrupt can leave unfinished files, and the next holder has to notice that.
    """
    try:
        yield
    except Exception:
        clean()
        raise
    clean()
