"""One writer at a time: on a disk, and at URLs."""

import os
import threading
import time

import fsspec
import pytest

import negmaml as nm
from negmaml.sweeps import StoreError
from tests.internals import lease
from tests.sweeps.script import GRID, SEEDS, function


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.05)


@pytest.mark.parametrize("url", ["{path}/x.zarr", "memory://{path}/x.zarr"])
def test_a_second_writer_is_told_who_writes(tmp_path, url):
    url = url.format(path=tmp_path)
    with lease.locked(url), pytest.raises(StoreError, match=f"process {os.getpid()} on"):
        nm.sweep(function, GRID, SEEDS, store=url)
    nm.sweep(function, GRID, SEEDS, store=url)


def test_a_lock_at_a_url_whose_holder_is_gone_is_taken_over():
    files = fsspec.filesystem("memory")
    files.pipe_file("/gone.zarr.lock/00000003", b"process 1 on another, beat 3")
    with lease.locked("memory://gone.zarr") as held:
        assert held.previous_owner_crashed
        assert files.ls("/gone.zarr.lock", detail=False) == ["/gone.zarr.lock/00000004"]
        assert f"process {os.getpid()}" in files.cat_file("/gone.zarr.lock/00000004").decode()
    with lease.locked("memory://gone.zarr") as held:  # at once: the last holder was done
        assert not held.previous_owner_crashed


def holders(url, count):
    """Let `count` threads ask for the lock at once; return how many get it and how many raise."""
    held, refused, start, end = [], [], threading.Barrier(count), threading.Event()

    def come(number):
        start.wait()
        try:
            with lease.locked(url):
                held.append(number)
                end.wait(10)
        except StoreError:
            refused.append(number)
            if len(refused) == count - 1:
                end.set()

    threads = [threading.Thread(target=come, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(held), len(refused)


@pytest.mark.parametrize("before", ["", "process 1 on another, beat 3", "free"])
def test_of_many_that_come_at_once_to_a_url_one_gets_the_lock(before, tmp_path):
    """Over no lock, one whose holder is gone, and one that is free."""
    url = f"memory://{tmp_path}/x.zarr"
    if before:
        fsspec.filesystem("memory").pipe_file(f"{tmp_path}/x.zarr.lock/00000000", before.encode())
    assert holders(url, 6) == (1, 5)


def test_a_holder_that_slept_too_long_learns_that_it_lost_the_lock(tmp_path):
    url = f"memory://{tmp_path}/x.zarr"
    with lease.locked(url) as held:
        held.check()
        fsspec.filesystem("memory").pipe_file(f"{tmp_path}/x.zarr.lock/00000001", b"another")
        for _ in range(100):
            try:
                held.check()
            except StoreError as lost:
                assert "taken over by another sweep" in str(lost)
                break
            threading.Event().wait(0.02)
        else:
            pytest.fail("not noticed")
    content = fsspec.filesystem("memory").cat_file(f"{tmp_path}/x.zarr.lock/00000001")
    assert content == b"another"


def test_who_lost_the_lock_leaves_what_the_next_holder_wrote(tmp_path):
    url, files = f"memory://{tmp_path}/x.zarr", fsspec.filesystem("memory")
    written = []

    def lose(done, cells):
        if done == 9:
            files.pipe_file(f"{tmp_path}/x.zarr.lock/00000001", b"another")
            time.sleep(0.3)
            written.append(files.cat_file(f"{tmp_path}/x.zarr/zarr.json"))

    with pytest.raises(StoreError, match="taken over by another sweep"):
        nm.sweep(function, GRID, SEEDS, store=url, block=3, progress=lose)
    assert files.cat_file(f"{tmp_path}/x.zarr/zarr.json") == written[0]


class Overwriting(type(fsspec.filesystem("memory"))):
    """A file system that takes the mode for exclusive creation, and overwrites all the same."""

    protocol = "overwriting"
    cachable = False

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        super().pipe_file(path, value)


class Unable(fsspec.AbstractFileSystem):
    """A file system that looks whether there is a file, and writes then."""

    protocol = "unable"


@pytest.mark.parametrize("files", [Overwriting, Unable])
def test_where_no_file_can_be_created_exclusively_the_store_is_refused(files, tmp_path):
    fsspec.register_implementation(files.protocol, files, clobber=True)
    with (
        pytest.raises(StoreError, match="cannot create a file exclusively"),
        lease.locked(f"{files.protocol}://{tmp_path}/x.zarr"),
    ):
        pass


@pytest.mark.parametrize("url", ["{path}/x.zarr", "memory://{path}/x.zarr"])
def test_a_holder_that_was_cut_off_is_noticed(url, tmp_path):
    url = url.format(path=tmp_path)
    with pytest.raises(KeyboardInterrupt), lease.locked(url):
        raise KeyboardInterrupt
    with lease.locked(url) as held:
        assert held.previous_owner_crashed
    with pytest.raises(ValueError), lease.locked(url) as held:
        assert not held.previous_owner_crashed
        raise ValueError
    with lease.locked(url) as held:
        assert not held.previous_owner_crashed


def test_a_worker_waits_while_the_file_of_the_holder_is_replaced(tmp_path, monkeypatch):
    """A holder's file may vanish between its name and its text: the next holder removes it."""
    texts = iter(["process 1 on a, opening", ""])
    acquire = lease.Lease.acquire
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(lease.Lease, "holder", lambda self: ("00000000", next(texts, lease.FREE)))
    monkeypatch.setattr(lease.HeartbeatMonitor, "changed", lambda *_: True)
    turns = iter([False, False])
    monkeypatch.setattr(lease.Lease, "acquire", lambda self: next(turns, True) and acquire(self))
    with lease.locked(str(tmp_path / "x.zarr"), opening=True) as lock:
        lock.check()
