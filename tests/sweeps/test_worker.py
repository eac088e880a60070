"""Several processes share one store: claims, kills, takeovers and errors."""

import os
import shutil
import signal
import threading
import time

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

import negmaml as nm
from negmaml.sweeps import StoreError
from tests.internals import lease, members, storage_beside
from tests.internals import worker as shared
from tests.sweeps.script import GRID, SEEDS, chunk_count, function
from tests.sweeps.test_store import run_script

OPTIONS = {"block": 3}
BLOCKS = 16


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.2)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The store of one process."""
    path = str(tmp_path_factory.mktemp("alone") / "x.zarr")
    nm.sweep(function, GRID, SEEDS, store=path, **OPTIONS)
    return xr.open_zarr(path).load()


@pytest.fixture(params=["disk", "url"])
def url(request, tmp_path):
    return f"memory:/{tmp_path}/x.zarr" if request.param == "url" else str(tmp_path / "x.zarr")


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "x.zarr")


def work(url, worker=(1, 1), **options):
    return nm.sweep(function, GRID, SEEDS, store=url, worker=worker, **(OPTIONS | options))


def assert_whole(url, expected):
    """Bit for bit, with nothing left beside it."""
    found = xr.open_zarr(url).load()
    xr.testing.assert_identical(found.drop_attrs(), expected.drop_attrs())
    assert not storage_beside(url, members.FOLDER).names()


def together(calls):
    """Run calls in threads; returns the errors they raised."""
    raised, start = [], threading.Barrier(len(calls))

    def run(call):
        start.wait()
        try:
            call()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_workers_that_start_at_once_on_no_store_compute_each_block_once(
    url, alone, computed, monkeypatch
):
    monkeypatch.setattr(lease, "HEARTBEAT_S", 2.0)
    told = []
    calls = [
        lambda k=k: work(url, (k, 3), progress=lambda *counts: told.append(counts))
        for k in (1, 2, 3)
    ]
    assert not together(calls)
    assert_whole(url, alone)
    assert sum(computed) == alone["finite"].size
    assert max(told) == (48, 48)
    assert xr.open_zarr(url).attrs["wall_seconds"] > 0


def test_a_worker_killed_is_taken_over_and_an_exclusive_sweep_waits_for_no_dead(tmp_path, alone):
    path = tmp_path / "x.zarr"
    process = run_script(path, WORKER="1/2")
    while process.poll() is None and chunk_count(path, "completed") < 4:
        time.sleep(0.003)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = os.listdir(tmp_path / ".x.zarr.workers")
    assert any(name.startswith("worker-") for name in left)
    state = nm.sweeps.status(path)
    assert (len(state.workers), state.blocks) == (1, BLOCKS)
    assert 4 <= state.blocks_done < BLOCKS
    assert f"process {process.pid} on" in repr(state)
    shutil.copytree(tmp_path, tmp_path / "copy")
    work(str(path), (2, 2))
    assert_whole(str(path), alone)
    copy = str(tmp_path / "copy" / "x.zarr")
    nm.sweep(function, GRID, SEEDS, store=copy)
    assert_whole(copy, alone)


@pytest.mark.slow
def test_workers_killed_at_random_and_sent_again(tmp_path, alone):
    random, path = np.random.default_rng(0), tmp_path / "x.zarr"
    for _ in range(5):
        processes = [run_script(path, WORKER=f"{k}/4", BEAT="0.2") for k in (1, 2, 3, 4)]
        time.sleep(random.uniform(3, 9))
        for i in random.permutation(4):
            processes[i].kill()
            time.sleep(random.uniform(0, 0.5))
        for process in processes:
            process.communicate()
        if (path / "zarr.json").exists():
            xr.open_zarr(path).load()
    processes = [run_script(path, WORKER=f"{k}/3", BEAT="0.2") for k in (1, 2, 3)]
    for process in processes:
        out, error = process.communicate()
        assert "finished" in out, error
    found = xr.open_zarr(path).load()
    xr.testing.assert_identical(found.drop_attrs(), alone.drop_attrs())
    nm.sweep(function, GRID, SEEDS, store=str(path))  # removes what the dead left
    assert_whole(str(path), alone)


def test_a_worker_that_was_taken_for_gone_joins_again(path, alone):
    removed = []

    def forget(done, cells):
        notes = storage_beside(path, members.FOLDER)
        if done == 12 and not removed:
            for name in notes.names():
                removed.append(name)
                notes.remove(name)
            time.sleep(3 * lease.HEARTBEAT_S)

    work(path, progress=forget)
    assert removed
    assert_whole(path, alone)


def test_a_block_is_taken_over_by_one_of_many(url):
    first = members.Membership(url, (1, 9), members.monitor_of(url))
    assert first.claim("0.1")  # and never joins, nor shows that it lives
    others = [members.Membership(url, (k, 9), members.monitor_of(url)) for k in range(2, 8)]
    assert not any(other.claim("0.1") for other in others)
    time.sleep(lease.HEARTBEAT_S * (lease.MAX_MISSED + 1))
    taken = []
    together([lambda other=other: taken.append(other.claim("0.1")) for other in others])
    assert sum(taken) == 1
    assert not first.holds("0.1")
    assert others[taken.index(True)].claims or any(other.claims for other in others)


def test_one_cannot_have_a_store_to_itself_that_others_share(path, alone):
    refused = []

    def others(done, cells):
        if done == 9:
            for call in (
                lambda: nm.sweep(function, GRID, SEEDS, store=path),
                lambda: nm.sweep(function, GRID, 9, store=path, worker=(2, 2), extend=True),
            ):
                with pytest.raises(
                    StoreError, match=r"shared by workers|workers share it"
                ) as error:
                    call()
                refused.append(str(error.value))

    work(path, progress=others)
    assert f"process {os.getpid()} on" in refused[0]
    assert "seeds: asked adds 3" in refused[1]
    assert_whole(path, alone)


def test_a_worker_is_told_of_a_sweep_that_has_the_store_to_itself(url):
    with lease.locked(url), pytest.raises(StoreError, match=f"process {os.getpid()} on"):
        work(url)


@pytest.mark.slow
def test_workers_extend_a_store_that_nobody_uses(path):
    work(path)
    longer = GRID | {"scale": [-1.0, 0.25, 0.0, 0.5, 2.0]}
    calls = [
        lambda k=k: nm.sweep(function, longer, 8, store=path, worker=(k, 2), extend=True)
        for k in (1, 2)
    ]
    raised = together(calls)
    assert not raised or "cannot be changed while" in str(raised[0])
    result = nm.sweep(function, longer, 8, store=path, worker=(1, 1), extend=True).load()
    xr.testing.assert_identical(
        result.drop_attrs(), nm.sweep(function, longer, 8).drop_attrs().load()
    )


@given(st.integers(0, 30), st.integers(1, 9), st.data())
def test_the_order_of_a_worker_has_every_block_once(blocks, count, data):
    number = data.draw(st.integers(1, count))
    listed = [(slice(i, i + 1),) for i in range(blocks)]
    order = shared.in_order(listed, (number, count))
    assert sorted(region[0].start for region in order) == list(range(blocks))
    own = listed[blocks * (number - 1) // count : blocks * number // count]
    assert order[: len(own)] == own


@pytest.mark.parametrize(
    ("worker", "error", "said"),
    [
        (
            (0, 4),
            ValueError,
            r"worker must be \(k, n\) with k from 1 to n, .*, got \(0, 4\)",
        ),
        ((5, 4), ValueError, "k from 1 to n"),
        ((1,), TypeError, "worker must be a pair"),
        ("3/16", TypeError, r"worker must be a pair such as \(3, 16\), or 'slurm'"),
        (3, TypeError, "worker must be a pair"),
        ((True, 2), TypeError, "worker must be a pair"),
        ((1.0, 2), TypeError, "worker must be a pair"),
        ("slurm", ValueError, "SLURM_ARRAY_TASK_ID"),
    ],
)
def test_wrong_workers_are_refused_in_our_words(worker, error, said, tmp_path, monkeypatch):
    for name in ("SLURM_ARRAY_TASK_ID", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(error, match=said):
        work(tmp_path / "x.zarr", worker)
    assert not list(tmp_path.iterdir())


def test_a_part_needs_a_store_and_no_client(tmp_path):
    with pytest.raises(ValueError, match="worker is for a sweep that processes share"):
        work(None)
    with pytest.raises(ValueError, match="pass either worker or client"):
        work(tmp_path / "x.zarr", client="tcp://localhost:1")


def test_an_array_job_says_its_part(monkeypatch):
    for count, tasks in ((16, range(1, 17)), (16, range(16)), (3, (4, 8, 9))):
        monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", str(count))
        parts = []
        for task in tasks:
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
            parts.append(members.parse_worker("slurm"))
        assert {n for _, n in parts} == {count}
        assert all(1 <= k <= count for k, _ in parts)
        assert count == 3 or len(set(parts)) == count


def test_processes_of_srun_are_workers_within_an_array_and_without(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "8")
    for array in (False, True):
        if array:
            monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
        parts = set()
        for task in range(1 + array):
            if array:
                monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
            for process in range(8):
                monkeypatch.setenv("SLURM_PROCID", str(process))
                parts.add(members.parse_worker("slurm"))
        count = 16 if array else 8
        assert parts == {(k, count) for k in range(1, count + 1)}


def test_status_of_no_store_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no store at"):
        nm.sweeps.status(str(tmp_path / "x.zarr"))


def test_a_worker_that_cannot_note_its_time_leaves_all_the_same(path, alone, monkeypatch):
    def taken(url):
        raise lease.TakenError("another sweep")

    right = shared._leave

    def leave(url, own, seconds):
        monkeypatch.setattr(shared, "locked", lambda url, opening: taken(url))
        right(url, own, seconds)

    monkeypatch.setattr(shared, "_leave", leave)
    work(path)
    assert_whole(path, alone)


def test_who_opens_a_store_waits_for_one_that_has_not_yet_said_so(path):
    """A process holds the lock of the disk and has not yet written its name."""
    filelock = pytest.importorskip("filelock")
    held = filelock.FileLock(f"{os.path.dirname(path)}/.x.zarr.lock", thread_local=False)
    held.acquire()
    timer = threading.Timer(lease.HEARTBEAT_S / 4, held.release)
    timer.start()
    with lease.locked(path, opening=True) as own:
        assert not own.previous_owner_crashed
    timer.join()
    held.acquire()
    with pytest.raises(lease.TakenError, match="just began"), lease.locked(path, opening=True):
        pass
    held.release()
