"""A run that stops at any storage operation of its checkpoints resumes with the same call.

Python's audit hook reports the operations of all libraries: a file opened for writing, a new
directory, a rename, a removal. A run is stopped before each of them, and within it, when half of
the file is written. Files that a library writes without Python are in directories that do not have
their final name yet. Instead, the files of complete checkpoints are truncated, emptied, garbled and
removed one by one.
"""

import gc
import os
import shutil
import sys
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import negmaml as nm
from tests.crash import Operations
from tests.training.test_checkpoint import EVERY, TASKS, run, same, undisturbed

pytest.importorskip("orbax.checkpoint")
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
STEPS = 6
BY_NAME = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink")
watching: list["Watched"] = []  # a hook cannot be removed from a process


class Watched(Operations):
    """The operations of this process below a folder."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = str(folder)
        self.written: dict[str, bytes] = {}  # the last content of each file

    def remember(self):
        """Record the content of the files, to write halves of them."""
        for path in Path(self.folder).rglob("*"):
            if path.is_file():
                self.written[path.name] = path.read_bytes()

    def hear(self, event, arguments):
        if event == "open":
            path, _, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and self.below(path):
                self.step(Path(path), self.written.get(Path(path).name, b"{}"))
        elif event in BY_NAME and (self.below(arguments[0]) or self.relative(event, arguments)):
            self.step()

    def below(self, path) -> bool:
        return isinstance(path, str | Path) and str(path).startswith(self.folder)

    def relative(self, event, arguments) -> bool:
        """True for an operation in an open directory, as in the removal of a tree."""
        return event in ("os.remove", "os.rmdir") and arguments[-1] >= 0


@sys.addaudithook
def _hear(event, arguments):
    if watching and (event == "open" or event in BY_NAME):
        within = list(watching)
        watching.clear()  # its own writes are no operations
        try:
            for watched in within:
                watched.hear(event, arguments)
        finally:
            watching.extend(within)


@pytest.fixture
def operations(tmp_path):
    watched = Watched(tmp_path / "run")
    watching.append(watched)
    yield watched
    watching.clear()
    gc.collect()  # stopped event loops warn when they are deleted


def call(folder, steps=STEPS):
    """The run, resumed if it has checkpoints; a warning of a damaged checkpoint is fine."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="checkpoint .* is damaged")
        return run(steps=steps, checkpoint=folder, checkpoint_every=EVERY)


def settle(folder: Path):
    """Wait for writers without Python, which a kill would have ended."""
    before, now = None, set(folder.rglob("*"))
    while before != now:
        time.sleep(0.02)
        before, now = now, set(folder.rglob("*"))


def stop_everywhere(operations, before: int, every: int) -> int:
    """Stop a run that has taken `before` steps everywhere in the rest; returns the points tried."""
    folder, expected = Path(operations.folder), undisturbed(STEPS)
    kept = folder.with_name("kept")
    if before:
        call(folder, before)
        shutil.copytree(folder, kept)
    same(operations.run(lambda: call(folder)), expected)
    count, points = operations.count, 0
    operations.remember()
    assert count > 30
    for at in range(1, count + 2, every):
        for within in (False, True):
            shutil.rmtree(folder, ignore_errors=True)
            if before:
                shutil.copytree(kept, folder)
            stopped = operations.run(lambda: call(folder), at, within)
            assert (stopped is None) == (at <= operations.count)
            settle(folder)
            same(call(folder), expected)
            assert not [p for p in folder.rglob("*") if "tmp" in p.name]
            points += 1
    return points


@pytest.mark.parametrize("before", (0, pytest.param(4, marks=pytest.mark.slow)))
def test_a_run_stopped_at_some_operations_resumes(before, operations):
    assert stop_everywhere(operations, before, every=37) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("before", (0, pytest.param(4, marks=pytest.mark.slow)))
def test_a_run_stopped_at_any_operation_resumes(before, operations):
    print(f"after {before} steps: {stop_everywhere(operations, before, every=1)} points")


def garbled(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


DAMAGES = {
    "cut": lambda content: content[: len(content) // 2],
    "emptied": lambda content: b"",
    "garbled": lambda content: garbled(content) if content else b"x",
    "removed": None,
}


def damage_everywhere(folder: Path, every: int) -> int:
    """Damage each file of the latest checkpoint in turn; the run comes out the same every time."""
    expected = undisturbed(STEPS)
    call(folder, 4)
    kept = folder.with_name("kept")
    shutil.copytree(folder, kept)
    files = sorted(p.relative_to(folder) for p in (folder / "4").rglob("*") if p.is_file())
    assert len(files) > 8
    cases = [(name, kind) for name in files for kind in DAMAGES][::every]
    for name, kind in cases:
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
        change = DAMAGES[kind]
        if change is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(change((folder / name).read_bytes()))
        same(call(folder), expected)
    return len(cases)


def test_a_damaged_file_of_a_checkpoint_changes_no_result(tmp_path):
    assert damage_everywhere(tmp_path / "run", every=7) > 3


@pytest.mark.slow
def test_no_damaged_file_of_a_checkpoint_changes_a_result(tmp_path):
    print(f"{damage_everywhere(tmp_path / 'run', every=1)} damages")


def square(w, key):
    return jnp.sum(w**2), 2 * w


def test_a_changed_bit_that_orbax_does_not_notice_is_found(tmp_path):
    def go(steps, **options):
        args = jax.random.normal(jax.random.key(1), (5000,)), square, TASKS, optax.sgd(0.1), steps
        return nm.fit(jax.random.key(0), *args, **options)

    go(4, checkpoint=tmp_path, checkpoint_every=2)
    data = max((tmp_path / "4").rglob("*"), key=lambda path: path.stat().st_size)
    data.write_bytes(garbled(data.read_bytes()))
    with pytest.warns(UserWarning, match="other numbers than written.*resuming from checkpoint 2"):
        result = go(6, checkpoint=tmp_path, checkpoint_every=2)
    same(result, go(6, callback=lambda *_: None, callback_every=2))
