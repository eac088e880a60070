"""The store: kills, resumption, refusal, extension, locks, full disks, devices, workers."""

import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import negmaml as nm
from negmaml.sweeps import StoreError
from tests.helpers import mostly_slow
from tests.internals import load, planning
from tests.internals import store as stores
from tests.sweeps.script import GRID, SEEDS, chunk_count, function

ROOT = Path(__file__).parents[2]


def environment(**more):
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def run_script(store, **more):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.sweeps.script", str(store)],
        cwd=ROOT, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed():
    return nm.sweep(function, GRID, SEEDS)


def assert_same(result, expected):
    assert set(result.data_vars) == set(expected.data_vars)
    for name in expected.data_vars:
        assert result[name].dims == expected[name].dims
        np.testing.assert_allclose(result[name], expected[name], rtol=1e-5)
    for name in expected.coords:
        np.testing.assert_array_equal(result[name], expected[name])


def test_a_store_is_the_dataset_in_memory_and_says_how_it_was_made(tmp_path, undisturbed):
    path = str(tmp_path / "x.zarr")
    assert_same(nm.sweep(function, GRID, SEEDS, store=path, block=5), undisturbed)
    with xr.open_zarr(path) as plain:
        assert plain["completed"].all()
        assert_same(plain.drop_vars("completed"), undisturbed)
        for name in ("grid", "seeds", "dtype", "matmul_precision", "devices", "jax", "negmaml",
                     "git_revision", "wall_seconds", "command"):  # fmt: skip
            assert name in plain.attrs
    assert not undisturbed["finite"].sel(scale=0.0).any()  # a ratio by zero
    assert undisturbed["finite"].drop_sel(scale=0.0).all()


def kill_while_running(path, seconds):
    process = run_script(path)
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def kill_after_blocks(path, blocks):
    """Kill the process once `blocks` blocks are flagged."""
    process = run_script(path)
    while process.poll() is None and chunk_count(path, "completed") < blocks:
        time.sleep(0.003)
    process.kill()
    process.communicate()


def test_kill_and_go_on_redoes_only_what_was_in_flight(tmp_path, undisturbed, computed):
    path = tmp_path / "x.zarr"
    kill_after_blocks(path, 5)
    with xr.open_zarr(path) as partial:  # opens at any time
        done = int(partial["completed"].sum())
        assert 0 < done < partial["completed"].size
        np.testing.assert_allclose(
            partial["total"].where(partial["completed"]),
            undisturbed["total"].where(partial["completed"]),
            rtol=1e-5,
        )
    assert_same(nm.sweep(function, GRID, SEEDS, store=str(path)), undisturbed)
    assert sum(computed) == undisturbed["finite"].size - done


@pytest.mark.slow
def test_kills_at_many_random_instants(tmp_path, undisturbed):
    random = np.random.default_rng(0)
    path = tmp_path / "x.zarr"
    for _ in range(25):  # over the imports, the making of the store, and the blocks
        kill_while_running(path, random.uniform(1.5, 4.5))
        if path.exists():
            xr.open_zarr(path).load()
    assert_same(nm.sweep(function, GRID, SEEDS, store=str(path)), undisturbed)


def test_interruption_says_how_to_go_on(tmp_path, undisturbed):
    def stop(done, cells):
        if done > 10:
            raise KeyboardInterrupt

    path = str(tmp_path / "x.zarr")
    with pytest.raises(KeyboardInterrupt) as interrupted:
        nm.sweep(function, GRID, SEEDS, store=path, block=3, progress=stop)
    assert "the same call resumes" in interrupted.value.__notes__[0]
    assert_same(nm.sweep(function, GRID, SEEDS, store=path), undisturbed)


def test_more_seeds_and_longer_axes_are_added_to_what_is_there(tmp_path, computed):
    path = str(tmp_path / "x.zarr")
    nm.sweep(function, GRID, SEEDS, store=path, block=4)
    longer = {"size": [1, 2, 3], "scale": [-1.0, -0.5, 0.0, 0.5, 2.0]}
    with pytest.raises(StoreError) as refused:
        nm.sweep(function, longer, 8, store=path)
    for text in ("axis size", "(1)", "axis scale", "-0.5", "seeds", "(6, 7)", "extend"):
        assert text in str(refused.value)
    before = sum(computed)
    result = nm.sweep(function, longer, 8, store=path, extend=True)
    assert sum(computed) - before == 3 * 5 * 8 - 2 * 4 * SEEDS
    assert_same(result, nm.sweep(function, longer, 8))
    assert xr.open_zarr(path).attrs["seeds"] == "0 to 7"


@pytest.mark.slow
def test_an_extension_cut_off_is_undone_or_finished(tmp_path, undisturbed, monkeypatch):
    path = str(tmp_path / "x.zarr")
    nm.sweep(function, GRID, SEEDS, store=path, block=4)

    def cut(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stores.SweepStore, "describe", cut)
        with pytest.raises(KeyboardInterrupt):
            nm.sweep(function, GRID, 8, store=path, extend=True)
    assert_same(nm.sweep(function, GRID, SEEDS, store=path), undisturbed)
    assert_same(nm.sweep(function, GRID, 8, store=path, extend=True), nm.sweep(function, GRID, 8))


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A finished store that several tests are refused."""
    path = str(tmp_path_factory.mktemp("kept") / "x.zarr")
    nm.sweep(function, GRID, SEEDS, store=path)
    return path


def other(key, size, scale):
    return {name: 2 * value for name, value in function(key, size, scale).items()}


def same(key, size, scale):
    """By another name and way, the same computation."""
    return dict(reversed(function(key, scale=scale, size=size).items()))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (dict(grid=GRID | {"scale": [1.0]}), "adds 1 (1.0)"),
        (dict(grid={**GRID, "size": 2}), "axis size: dim"),
        (dict(seeds=[3, 7]), "seeds: asked adds 1 (7)"),
        (dict(root_seed=1), "root_seed: store has 0, asked 1"),
        (dict(function=other), "than tests.sweeps.script.function did (numbers: 6 became 8 (now"),
        (dict(code_version="1"), "now version '1'"),
        (dict(common_random_numbers=["scale"]), "common"),
    ],
)
def test_another_sweep_is_refused_with_the_difference(kept, call, named, computed):
    path = kept
    with pytest.raises(StoreError, match="another sweep") as refused:
        nm.sweep(**(dict(function=function, grid=GRID, seeds=SEEDS, store=path) | call))
    assert named in str(refused.value)
    assert not computed


def test_the_same_computation_by_another_name_or_version_goes_on(tmp_path, monkeypatch, computed):
    path = str(tmp_path / "x.zarr")
    first = nm.sweep(function, GRID, SEEDS, store=path)
    monkeypatch.setattr(planning, "__version__", "9.9.9")
    computed.clear()
    result = nm.sweep(same, GRID, SEEDS, store=path)
    assert_same(result, first)
    assert not computed
    assert "then 9.9.9" in xr.open_zarr(path).attrs["history"][0]


RATE = 0.5


class Scaled:
    """Has attributes, and a method."""

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, key, x):
        return {"value": self.rate * x * jax.random.normal(key)}

    def method(self, key, x):
        return self(key, x)


def with_global(key, x):
    return {"value": RATE * x}


def by_array(key, x, weights):
    return {"value": x * jnp.sum(jnp.asarray(weights))}


LARGE = np.arange(5000.0)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Scaled(0.5), Scaled(0.25)),
        (Scaled(0.5).method, Scaled(0.25).method),
        (jax.jit(Scaled(0.5)), jax.jit(Scaled(0.25))),
        (lambda key, x: Scaled(0.5)(key, x), lambda key, x: Scaled(0.25)(key, x)),
        (partial(by_array, weights=LARGE), partial(by_array, weights=np.sqrt(LARGE))),
        (with_global, with_global),
    ],
)
def test_a_function_that_computes_something_else_is_refused_unless_accepted(
    before, after, tmp_path, monkeypatch
):
    path, grid = str(tmp_path / "x.zarr"), {"x": [1.0, 2.0]}
    nm.sweep(before, grid, 2, store=path)
    monkeypatch.setattr(sys.modules[__name__], "RATE", 0.25)
    with pytest.raises(
        StoreError, match=r"something else than .* did \(.* became .*allow_code_change"
    ):
        nm.sweep(after, {"x": [1.0, 2.0, 3.0]}, 2, store=path, extend=True)
    result = nm.sweep(after, grid, 3, store=path, extend=True, allow_code_change=True)
    assert "became" in result.attrs["history"][0]
    assert_same(nm.sweep(after, grid, 3, store=path), result)


def test_a_function_that_changed_in_one_group_only_is_refused(tmp_path):
    path = str(tmp_path / "x.zarr")

    def first(key, size):
        return {"value": jnp.sum(jax.random.normal(key, (size,)))}

    def second(key, size):
        return first(key, size) if size < 3 else {"value": jnp.float32(size)}

    nm.sweep(first, {"size": [2, 3]}, 2, store=path)
    nm.sweep(second, {"size": [2]}, 2, store=path)  # the same, here
    with pytest.raises(StoreError, match=r"3. it computes something else"):
        nm.sweep(second, {"size": [2, 3]}, 2, store=path)
    with pytest.raises(StoreError, match=r"2. it computes something else"):
        nm.sweep(
            lambda key, size: {"value": jnp.float32(1)}, {"size": [5]}, 2, store=path, extend=True
        )


def test_a_function_that_calls_python_needs_a_label(tmp_path):
    def calling(key, x):
        return {"value": jax.pure_callback(np.sin, jax.ShapeDtypeStruct((), x.dtype), x,
                                           vmap_method="sequential")}  # fmt: skip

    options = {"store": str(tmp_path / "x.zarr")}
    with pytest.raises(TypeError, match=r"pure_callback.*pass a label such as code_version="):
        nm.sweep(calling, {"x": [1.0]}, 1, **options)
    assert not (tmp_path / "x.zarr").exists()
    nm.sweep(calling, {"x": [1.0]}, 1, code_version="1", **options)
    nm.sweep(calling, {"x": [1.0]}, 1, code_version="1", **options)
    with pytest.raises(StoreError, match="then version '1', now version '2'"):
        nm.sweep(calling, {"x": [1.0]}, 1, code_version="2", **options)


shapes_asked = []


def products(key, size, left, right):
    """Handles two axes whole; `first` knows only one of them.

    Products only: whether a sum of products is rounded once or twice differs between programs.
    """
    shapes_asked.append((*left.shape, *right.shape))
    total = jnp.sum(jax.random.normal(key, (size,)))
    return {"both": total * jnp.outer(left, right), "first": total * left}


WHOLE = {
    "vectorized": ["left", "right"],
    "output_dims": {"both": ["left", "right"], "first": ["left"]},
}
SHORT = {"size": [2, 3], "left": [0.0, 0.3], "right": [1.0, 0.2]}
LONGER = {"size": [2, 3], "left": [-0.4, 0.0, 0.3], "right": [1.0, 0.1, 0.2]}


def test_whole_axes_lengthen_in_place_and_only_new_values_are_computed(tmp_path):
    options = WHOLE | {"store": str(tmp_path / "x.zarr"), "extend": True}
    nm.sweep(products, SHORT, 5, block=4, **options)
    shapes_asked.clear()
    nm.sweep(products, LONGER, 5, **options)
    # One run for each level, after one that traces the shapes of the outputs.
    assert set(shapes_asked) == {
        (3, 3),
        (2, 2),
        (1, 2),
        (3, 1),
    }  # a run for each level, and one to trace the outputs
    assert_same(nm.sweep(products, LONGER, 7, **options), nm.sweep(products, LONGER, 7, **WHOLE))
    shapes_asked.clear()
    nm.sweep(products, SHORT, 6, **options)  # a part of the store: new cells get everything
    assert (1, 2) not in shapes_asked
    again = LONGER | {"left": [0.3, -0.4, 0.0, 0.6], "right": [0.2, 0.1, 1.0]}
    assert_same(nm.sweep(products, again, 7, **options), nm.sweep(products, again, 7, **WHOLE))


@pytest.mark.slow
def test_rates_of_the_linear_model_lengthen(tmp_path):
    grid = {"p": 6, "m": 2, "n_t": 4, "n_v": 2, "n_r": 4, "sigma": 0.1, "nu": 0.5,
            "train_rate": [0.0, 0.3], "adapt_rate": [0.0, 0.2]}  # fmt: skip
    longer = grid | {"train_rate": [-0.4, 0.0, 0.3], "adapt_rate": [-0.2, 0.2, 0.0]}
    path = str(tmp_path / "x.zarr")
    nm.sweep(nm.sweeps.linear, grid, 5, store=path)
    result = nm.sweep(nm.sweeps.linear, longer, 5, store=path, extend=True)
    assert_same(result, nm.sweep(nm.sweeps.linear, longer, 5))


@pytest.mark.parametrize("at", mostly_slow([1, 8], 0))
def test_an_extension_of_whole_axes_goes_on_where_it_was_cut(tmp_path, at):
    options = WHOLE | {"store": str(tmp_path / "x.zarr")}
    nm.sweep(products, SHORT, 3, block=2, **options)
    calls = []

    def stop(*_):
        calls.append(1)
        if len(calls) > at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nm.sweep(products, LONGER, 4, extend=True, progress=stop, **options)
    assert_same(nm.sweep(products, LONGER, 4, **options), nm.sweep(products, LONGER, 4, **WHOLE))


def test_an_output_that_may_depend_on_all_values_is_not_extended(tmp_path):
    def best(key, rates):
        return {"value": rates**2, "best": jnp.max(rates)}

    path = str(tmp_path / "x.zarr")
    nm.sweep(best, {"rates": [0.0, 1.0]}, 2, store=path, vectorized=["rates"])
    with pytest.raises(StoreError, match="best may depend on all values"):
        nm.sweep(best, {"rates": [0.0, 2.0, 1.0]}, 2, store=path, vectorized=["rates"], extend=True)
    assert xr.open_zarr(path).sizes["rates"] == 2


def test_values_and_axes_in_another_order_are_the_same_sweep(kept, computed):
    turned, seeds = {"scale": [2.0, 0.5, 0.0, -1.0], "size": [2, 3]}, range(SEEDS - 1, -1, -1)
    result = nm.sweep(function, turned, seeds, store=kept)
    assert not computed
    assert_same(result, nm.sweep(function, turned, seeds))


def test_a_part_of_a_store_is_what_was_asked_for_and_all_that_is_computed(tmp_path, computed):
    options = {"store": str(tmp_path / "x.zarr"), "block": 4}
    part = {"size": [3], "scale": [2.0, -1.0]}
    nm.sweep(function, GRID, [0], **options)
    nm.sweep(function, GRID | {"scale": [-1.0, 0.0, 0.5, 2.0, 3.0]}, 2, extend=True, **options)
    shutil.rmtree(tmp_path / "x.zarr" / "completed" / "c")  # as if nothing had been computed
    computed.clear()
    result = nm.sweep(function, part, [1, 0], **options)
    assert sum(computed) == result["finite"].size == 4
    assert_same(result, nm.sweep(function, part, [1, 0]))


def test_strings_label_axes_and_urls_are_stores(tmp_path):
    def named(key, kind, sign):
        return {"value": sign * (1.0 if kind == "one" else 2.0)}

    grid = {"kind": ["one", "other"], "sign": [-1.0, 1.0]}
    for url in (str(tmp_path / "x.zarr"), "memory://sweeps/x.zarr"):
        result = nm.sweep(named, grid, 2, store=url, block=1)
        assert result["value"].sel(kind="other", sign=-1.0, seed=1) == -2.0
        assert_same(nm.sweep(named, grid, 2, store=url), result)


def test_what_is_not_ours_stays_as_it_is(tmp_path, computed):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "data").write_text("mine")
    xr.Dataset({"a": 1}).to_zarr(tmp_path / "other.zarr", zarr_format=3, consolidated=False)
    for name, words in (("file", "no zarr"), ("folder", "no zarr"), ("other.zarr", "no sweep")):
        with pytest.raises(StoreError, match=words):
            nm.sweep(function, GRID, SEEDS, store=str(tmp_path / name))
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "data").read_text() == "mine"
    assert "a" in xr.open_zarr(tmp_path / "other.zarr", consolidated=False)
    assert not computed


def test_a_path_that_cannot_be_written_is_refused_at_once(tmp_path, computed):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written"):
        nm.sweep(function, GRID, SEEDS, store=str(tmp_path / "file" / "x.zarr"))
    assert not computed


@pytest.mark.slow
def test_a_full_disk_leaves_a_whole_store(tmp_path, undisturbed):
    """A limit on the size of files stands in for a full disk: the write itself fails."""
    path = tmp_path / "x.zarr"
    code = f"""
import resource, negmaml as nm
from tests.sweeps.script import function, GRID, SEEDS
def full(done, cells):
    if done > 9:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8, 8))
nm.sweep(function, GRID, SEEDS, store={str(path)!r}, block=3, progress=full)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert "cannot write to the store" in done.stderr
    assert "the same call resumes" in done.stderr
    assert 9 < int(xr.open_zarr(path)["completed"].sum()) < undisturbed["finite"].size
    assert_same(nm.sweep(function, GRID, SEEDS, store=str(path)), undisturbed)


LINEAR = {"p": 8, "m": 2, "n_t": 3, "n_v": 2, "n_r": 3, "sigma": [0.1, 1.0], "nu": 1.0,
          "train_rate": [-0.5, 0.5], "adapt_rate": 0.1}  # fmt: skip


@pytest.mark.slow
def test_four_devices_give_the_same_values(tmp_path, undisturbed):
    paths = [str(tmp_path / name) for name in ("a.zarr", "b.zarr")]
    code = f"""
import jax, negmaml as nm
from tests.sweeps.script import function, GRID, SEEDS
from tests.sweeps.test_store import LINEAR
assert len(jax.devices()) == 4
nm.sweep(function, GRID, SEEDS, store={paths[0]!r})
nm.sweep(nm.sweeps.linear, LINEAR, 13, store={paths[1]!r})
"""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(XLA_FLAGS=flags), text=True,
        capture_output=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_same(xr.open_zarr(paths[0]).drop_vars("completed"), undisturbed)
    expected = nm.sweep(nm.sweeps.linear, LINEAR, 13)
    stored = xr.open_zarr(paths[1])
    np.testing.assert_allclose(stored["weight_error"], expected["weight_error"], rtol=2e-4)
    assert stored.attrs["devices"].lower().count("cpu") == 4


def test_an_unreachable_scheduler_is_an_error_at_once(tmp_path, computed):
    with pytest.raises(ConnectionError, match=r"no scheduler answers at 'tcp://127\.0\.0\.1:9'"):
        nm.sweep(function, GRID, SEEDS, store=str(tmp_path / "x"), client="tcp://127.0.0.1:9")
    assert not computed
    assert not (tmp_path / "x").exists()


def test_a_store_whose_codecs_could_run_code_is_refused(tmp_path):
    path = tmp_path / "x.zarr"
    nm.sweep(function, GRID, SEEDS, store=path)
    text = (path / "zarr.json").read_text()
    (path / "zarr.json").write_text(text.replace('"zstd"', '"numcodecs.pickle"'))
    for read in (lambda: nm.sweep(function, GRID, SEEDS, store=path), lambda: load(str(path))):
        with pytest.raises(StoreError, match=r"codec 'numcodecs\.pickle'.*could run code"):
            read()


@pytest.mark.slow
def test_a_scheduler_that_is_lost_is_one_error_that_says_how_to_go_on(tmp_path, undisturbed):
    pytest.importorskip("distributed")
    path, scheduler = str(tmp_path / "x.zarr"), None
    port = 18786
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--port", str(port),
               "--no-dashboard"]  # fmt: skip
    scheduler = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    worker = subprocess.Popen(
        [sys.executable, "-m", "distributed.cli.dask_worker", f"tcp://127.0.0.1:{port}",
         "--nthreads", "1", "--no-dashboard", "--death-timeout", "20"],
        cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def lose(done, cells):
        if done:
            scheduler.kill()

    try:
        time.sleep(5)
        with pytest.raises(ConnectionError, match=r"the scheduler is gone.*same call resumes"):
            nm.sweep(function, GRID, SEEDS, store=path, block=1, progress=lose,
                     client=f"tcp://127.0.0.1:{port}")  # fmt: skip
    finally:
        for process in (scheduler, worker):
            process.kill()
            process.wait()
    assert_same(nm.sweep(function, GRID, SEEDS, store=path), undisturbed)


@pytest.mark.slow
def test_a_worker_killed_in_mid_sweep_loses_nothing(tmp_path, undisturbed):
    distributed = pytest.importorskip("distributed")
    path, killed = str(tmp_path / "x.zarr"), []
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        pids = list(client.run(os.getpid).values())
        assert os.getpid() not in pids

        def kill(done, cells):
            if done and not killed:
                killed.append(pids[0])
                os.kill(pids[0], signal.SIGKILL)

        result = nm.sweep(function, GRID, SEEDS, store=path, block=2, client=client, progress=kill)
        assert killed
        assert_same(result, undisturbed)
