"""An interrupted run resumes with the result of the uninterrupted one, and other files are kept."""

import functools
import json
import re
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import negmaml as nm
from tests.helpers import mostly_slow
from tests.internals import progress

pytest.importorskip("orbax.checkpoint")
OPTIMIZER = optax.adam(0.05)
EVERY = 3  # steps of a segment, so that most runs share one program


def square_loss(w, target):
    return jnp.mean((w - target) ** 2) / 2


def run(steps=9, rate=-0.2, start=0.0, seed=0, **options):
    """A run of parameters of shape (3,), whose program depends on the number of steps."""
    value_and_grad = nm.maml_value_and_grad(square_loss, nm.GradientDescent(rate))
    evaluate = nm.maml(square_loss, nm.GradientDescent(0.2))
    if options.get("checkpoint") is not None:
        options.setdefault("checkpoint_every", EVERY)
    return nm.fit(
        jax.random.key(seed), jnp.full(3, start), value_and_grad, TASKS, OPTIMIZER, steps,
        evaluate=evaluate, evaluate_every=3, **options,
    )  # fmt: skip


def TASKS(key):
    target = jax.random.uniform(key, (2, 2, 1))
    return nm.Tasks(target, target + 1)


@functools.cache
def undisturbed(steps=9):
    """The result of `run` without checkpoints, in segments of the same program."""
    return run(steps, callback=lambda *_: None, callback_every=EVERY)


def same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def contents(directory):
    return {str(p): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("every", "progress"),
    mostly_slow([(3, False), (None, True), (1, False), (50, True), (None, False)], 0),
)
def test_a_run_with_checkpoints_is_the_run_without(every, progress, tmp_path):
    checkpointed = run(checkpoint=tmp_path / "run", checkpoint_every=every, progress=progress)
    same(checkpointed, undisturbed())


def test_progress_changes_no_result_and_shows_the_loss(capsys, monkeypatch):
    monkeypatch.setattr(progress, "FIRST_LINE", 0.0)
    same(run(progress=True), undisturbed())
    assert re.search(r"fit: 9 of 9 steps \(100%\), loss [\d.e-]+, ", capsys.readouterr().err)


def test_a_run_in_segments_is_the_run_in_one_program():
    jax.tree.map(np.testing.assert_allclose, run(), undisturbed())


@pytest.mark.parametrize("cut", mostly_slow((3, 4, 9), 1))
def test_an_interrupted_run_resumes(cut, tmp_path):
    run(steps=cut, checkpoint=tmp_path)
    same(run(checkpoint=tmp_path), undisturbed())
    same(run(checkpoint=tmp_path), undisturbed())  # complete: only read


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from tests.training.test_checkpoint import run
print("ready", flush=True)
run(steps=100_000, checkpoint={directory!r}, checkpoint_every=5)
"""


@pytest.mark.slow
def test_a_killed_run_resumes(tmp_path):
    """After kill -9 while checkpoints are written, those that exist are complete."""
    from pathlib import Path

    root, directory = str(Path(__file__).parents[2]), tmp_path / "run"
    script = SCRIPT.format(root=root, directory=str(directory))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        try:
            process.stdout.readline()
            while not any(p.name.isdigit() for p in directory.glob("*")):
                assert process.poll() is None
        finally:
            process.send_signal(signal.SIGKILL)
    done = max(int(p.name) for p in directory.glob("*") if p.name.isdigit())
    same(run(steps=done + 7, checkpoint=directory), undisturbed(done + 7))


def test_a_run_that_stopped_stays_stopped(tmp_path):
    def exploding(params, _):
        return jnp.where(params > 3.5, jnp.nan, -params), jnp.asarray(-1.0)

    def go(steps, **options):
        key = jax.random.key(0)
        with pytest.warns(RuntimeWarning, match="not finite"):
            return nm.fit(key, 0.0, exploding, lambda key: key, optax.sgd(1.0), steps, **options)

    go(6, checkpoint=tmp_path, checkpoint_every=2)
    result = go(9, checkpoint=tmp_path)
    assert float(result.params) == 3.0 and not bool(result.finite) and result.loss.shape == (9,)


@pytest.mark.parametrize(
    ("change", "word"),
    (
        ({"seed": 1}, "key"),
        ({"start": 0.5}, "params"),
        ({"rate": 0.2}, r"value_and_grad \(numbers: -0.2 became 0.2"),
    ),
)
def test_a_checkpoint_of_another_run_raises_and_is_kept(change, word, tmp_path):
    run(steps=3, checkpoint=tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"belongs to another run, which differs in {word}"):
        run(checkpoint=tmp_path, **change)
    assert contents(tmp_path) == before


def small(directory=None, scale=1.0, optimizer=OPTIMIZER, steps=2, **options):
    """A run of another loss, optimizer or schedule; its functions are made anew each time."""

    def value_and_grad(w, target):
        return scale * w**2, 2 * scale * w

    def sample(key):
        return jax.random.key_data(key)

    return nm.fit(
        jax.random.key(0), 1.0, value_and_grad, sample, optimizer, steps, checkpoint=directory,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "word"),
    mostly_slow(
        (
            ({"scale": 3.0}, r"value_and_grad \(numbers: .* became 3.0"),
            ({"optimizer": optax.adam(0.1)}, r"optimizer \(numbers: "),
            ({"optimizer": optax.adam(0.05, b1=0.8)}, r"optimizer \(numbers: .*0.8"),
            ({"optimizer": optax.sgd(0.05)}, r"optimizer \("),
            ({"optimizer": optax.adam(optax.cosine_decay_schedule(0.05, 9))}, r"optimizer \("),
        ),
        0,
        2,
    ),
)
def test_another_computation_raises_with_the_differences(change, word, tmp_path):
    small(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"which differs in {word}"):
        small(tmp_path, steps=4, **change)
    assert contents(tmp_path) == before
    small(tmp_path, steps=3)  # the same functions made anew


def test_another_computation_resumes_with_resume_any(tmp_path):
    small(tmp_path)
    slower = optax.adam(0.01)
    with pytest.warns(UserWarning, match="resuming from a checkpoint as asked.*optimizer"):
        further = small(tmp_path, optimizer=slower, steps=4, resume="any")
    expected = small(optimizer=slower, state=small())
    np.testing.assert_allclose(further.params, expected.params)


def test_a_computation_with_a_callback_cannot_be_compared(tmp_path):
    def value_and_grad(w, _):
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return w**2, jax.pure_callback(lambda w: w, shape, w)

    def go(**options):
        args = value_and_grad, TASKS, OPTIMIZER, 2
        return nm.fit(jax.random.key(0), 1.0, *args, checkpoint=tmp_path, **options)

    with pytest.raises(ValueError, match=r'value_and_grad holds an object .*resume="any"'):
        go()
    assert int(go(resume="any").step) == 2


def test_fewer_steps_than_in_the_checkpoint_raise(tmp_path):
    run(steps=6, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="holds 6 steps already, more than steps=4"):
        run(steps=4, checkpoint=tmp_path)


def test_a_directory_with_other_files_raises_and_is_kept(tmp_path):
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(ValueError, match=r"did not write .*thesis.tex.*nothing was changed"):
        run(checkpoint=tmp_path)
    assert contents(tmp_path) == {str(tmp_path / "thesis.tex"): b"all of it"}
    with pytest.raises(ValueError, match="is a file"):
        run(checkpoint=tmp_path / "thesis.tex")


def damage(directory):
    for path in directory.rglob("*"):
        if path.is_file():
            path.write_bytes(b"\x00garbage")


@pytest.mark.parametrize("part", mostly_slow(("meta", "leaves"), 1))
def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(part, tmp_path):
    run(steps=6, checkpoint=tmp_path)
    damage(tmp_path / "6" / part)
    with pytest.warns(
        UserWarning, match=r"checkpoint 6 in .* is damaged.*resuming from checkpoint 3"
    ):
        same(run(checkpoint=tmp_path), undisturbed())
    same(run(checkpoint=tmp_path), undisturbed())  # the damaged one is gone
    for step in tmp_path.glob("*"):
        damage(step / part)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"is damaged.*no earlier one; nothing was changed"):
        run(checkpoint=tmp_path)
    assert contents(tmp_path) == before


def test_a_directory_of_another_program_with_a_number_for_a_name_raises(tmp_path):
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "data").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="damaged or not of `fit`"):
        run(checkpoint=tmp_path)
    assert contents(tmp_path) == before


def test_missing_extras_raise_with_their_names(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"negmaml\[checkpoint\]"):
        run(checkpoint=tmp_path)


@pytest.mark.parametrize(
    "spelling", mostly_slow(["link", "{path}", "{path}/../run", "~/run", "./run/"], 0)
)
def test_a_second_run_in_a_directory_raises(spelling, tmp_path, monkeypatch):
    """The path by which it is given does not matter, and the first run is undisturbed."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    other = spelling.format(path=tmp_path / "run")

    def second(step, metrics, params):
        with pytest.raises(ValueError, match=r"run' is in use by another run; wait for it, or"):
            small(other)
        return True

    small(tmp_path / "run", steps=4, checkpoint_every=1, callback=second)
    same(small(other, steps=4), small(steps=4, callback=lambda *_: True))
    assert not (tmp_path / "~").exists()


def test_the_home_of_an_unknown_user_raises():
    with pytest.raises(ValueError, match="checkpoint must be a path, got '~nobody-of-this-name/a'"):
        small("~nobody-of-this-name/a")


@pytest.mark.slow
def test_the_directory_of_a_run_that_was_killed_is_free(tmp_path):
    code = f"""
import os, signal
from tests.training.test_checkpoint import small
small({str(tmp_path / "run")!r}, 1.0, steps=4, checkpoint_every=1,
      callback=lambda *_: os.kill(os.getpid(), signal.SIGKILL), callback_every=2)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    same(small(tmp_path / "run", steps=4), small(steps=4))


def test_a_checkpoint_of_another_precision_is_converted_or_refused_by_name(tmp_path):
    """In float64 the numbers are those that were written in float32, and the other way round."""
    single = small(tmp_path / "a")
    said = r"arrays of checkpoint 2 .* are converted: float32 to float64"
    with jax.enable_x64(True):
        with pytest.raises(ValueError, match="belongs to another run, which differs in"):
            small(tmp_path / "a")
        with pytest.warns(UserWarning, match=said), pytest.warns(UserWarning, match="as asked"):
            found = small(tmp_path / "a", resume="any")
        assert found.params.dtype == found.loss.dtype == jnp.float64
        double = small(tmp_path / "b", steps=4)
    np.testing.assert_array_equal(found.params, np.float64(single.params))
    np.testing.assert_array_equal(found.loss, np.float64(single.loss))
    said = "are converted: float64 to float32"
    with pytest.warns(UserWarning, match=said), pytest.warns(UserWarning, match="as asked"):
        found = small(tmp_path / "b", steps=4, resume="any")
    np.testing.assert_array_equal(found.params, np.float32(double.params))


def test_a_checkpoint_of_other_shapes_is_not_called_damaged(tmp_path):
    run(steps=3, checkpoint=tmp_path)
    before = contents(tmp_path)
    with (
        pytest.warns(UserWarning, match="as asked"),
        pytest.raises(ValueError, match=r"float32\[3\] then, float32\[\] now.*nothing was changed"),
    ):
        small(tmp_path, steps=4, resume="any")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "name", mostly_slow(["3", "3/leaves", "3/meta/metadata", "3/leaves/manifest.ocdbt"], 0, 3)
)
def test_links_in_a_checkpoint_are_not_followed(name, tmp_path):
    folder, outside = tmp_path / "run", tmp_path / "outside"
    run(steps=3, checkpoint=folder)
    shutil.move(folder / name, outside)
    (folder / name).symlink_to(outside)
    before = contents(outside) if outside.is_dir() else outside.read_bytes()
    with pytest.raises(ValueError, match="symbolic link"):
        run(checkpoint=folder)
    assert before == (contents(outside) if outside.is_dir() else outside.read_bytes())


@pytest.mark.parametrize(
    "fields", mostly_slow([{"chunks": [2**40]}, {"shape": [2**40], "chunks": [2**40]}], 0)
)
def test_a_chunk_of_a_checkpoint_is_no_larger_than_its_leaf(fields, tmp_path):
    """A chunk of zeros takes a few kilobytes for each gigabyte that it unpacks to."""
    tensorstore = pytest.importorskip("tensorstore")
    run(steps=6, checkpoint=tmp_path)
    leaves = {"driver": "ocdbt", "base": f"file://{tmp_path}/6/leaves/"}
    held = tensorstore.KvStore.open(leaves).result()
    metadata = json.loads(held.read(b"0/.zarray").result().value)
    held.write(b"0/.zarray", json.dumps(metadata | fields).encode()).result()
    with pytest.warns(UserWarning, match=r"damaged \(leaf 0 has the shape .*from checkpoint 3"):
        same(run(checkpoint=tmp_path), undisturbed())


def test_the_number_of_steps_in_the_name_of_a_folder_allocates_no_memory(tmp_path):
    run(steps=3, checkpoint=tmp_path)
    (tmp_path / "3").rename(tmp_path / str(10**12))
    with pytest.raises(ValueError, match=r"float32\[3\] then, float32\[1000000000000\] now"):
        run(checkpoint=tmp_path)


def test_metadata_that_are_not_json_or_too_large_raise(tmp_path):
    run(steps=3, checkpoint=tmp_path)
    (tmp_path / "3" / "meta" / "metadata").write_bytes(b"[" * 10**5)
    with pytest.raises(ValueError, match="damaged"):
        run(checkpoint=tmp_path)
    with open(tmp_path / "3" / "meta" / "metadata", "r+b") as file:
        file.truncate(2**40)  # of nothing, which takes no place on the disk
    with pytest.raises(ValueError, match="are allowed"):
        run(checkpoint=tmp_path)
