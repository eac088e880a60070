"""Statistics over seeds: their values, and that they resume, extend, merge and use devices."""

import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import negmaml as nm
from negmaml import cli
from negmaml.sweeps import StoreError, SweepFunction
from tests.helpers import mostly_slow
from tests.internals import load, reduce, summary

ALL = {"seed": ["mean", "var", "std", "sem", "count", "min", "max"]}
GRID = {"sigma": [0.1, 0.5], "rates": [0.1, 0.2, -0.3]}
OPTIONS = {"vectorized": ["rates"], "root_seed": 3, "output_dims": {"large": ()}}


def function(key, sigma, rates):
    draw = 3 + sigma * jax.random.normal(key)
    return {"loss": draw + rates, "large": draw > 3}


def swept(seeds, grid=GRID, reduce=ALL, **options):
    return nm.sweep(function, grid, seeds, **OPTIONS, reduce=reduce, **options)


def assert_same(one, other, rounding=0.0):
    """Compare all variables; counts and bounds have to be equal even where sums may be rounded."""
    assert set(one.data_vars) == set(other.data_vars)
    for name in other.data_vars:
        summed = name.endswith(("mean", "var", "std", "sem"))
        rtol = rounding if summed else 0
        np.testing.assert_allclose(one[name], other[name], rtol=rtol, atol=0, err_msg=name)


def expected(cells, name):
    """The statistics of all cells, in float64."""
    values = cells[name].astype(float)
    values = values.where(np.isfinite(values))
    count, std = values.count("seed"), values.std("seed", ddof=1)
    bounds = {"min": values.min("seed"), "max": values.max("seed")}
    center = {"mean": values.mean("seed"), "var": std**2, "std": std, "sem": std / count**0.5}
    return {**center, "count": count, **bounds}


SEEDS = [1, 100, [5, 1, 2, 9, 7], range(1, 300, 3), 2100]


@pytest.mark.parametrize("seeds", mostly_slow(SEEDS, 0, 3))
def test_statistics_are_those_of_all_cells(seeds):
    reduced, cells = swept(seeds), swept(seeds, reduce=None)
    assert set(reduced.dims) == {"sigma", "rates"}
    for name in ("loss", "large"):
        for statistic, right in expected(cells, name).items():
            found = reduced[f"{name}_{statistic}"]
            np.testing.assert_allclose(found, right.transpose(*found.dims), 1e-5, 1e-6)
    assert reduced["finite"].all()
    assert reduced["loss_count"].dtype == np.int64
    assert reduced.attrs["seeds"] == cells.attrs["seeds"]


def test_only_what_is_asked_for_is_returned():
    found = swept(4, reduce={"seed": ["sem", "mean"]})
    assert set(found.data_vars) == {*(f"{o}_{s}" for o in ("loss", "large")
                                      for s in ("mean", "sem")), "finite"}  # fmt: skip


def broken(key, at, rates):
    draw = jax.random.uniform(key)
    inverse = jnp.where(rates > 1, jnp.where(draw < at, jnp.nan, draw), draw)
    return {"y": jnp.where(rates > 2, jnp.inf, inverse)}


def test_values_that_are_not_finite_are_left_out_and_counted():
    grid = {"at": [0.0, 0.5], "rates": [1.0, 2.0, 3.0]}
    given = {"vectorized": ["rates"]}
    cells = nm.sweep(broken, grid, 150, **given)
    found = nm.sweep(broken, grid, 150, **given, reduce=ALL)
    count = found["y_count"].values
    np.testing.assert_array_equal(count, np.isfinite(cells["y"]).sum("seed"))
    assert count[0].tolist() == [150, 150, 0] and 0 < count[1, 1] < 150
    assert not found["finite"].any()
    for statistic, right in expected(cells, "y").items():
        np.testing.assert_allclose(found[f"y_{statistic}"], right, 1e-5)
    assert np.isnan(found["y_mean"][:, 2]).all() and np.isnan(found["y_max"][:, 2]).all()


@pytest.mark.parametrize(
    ("center", "spread"),
    mostly_slow([(0.0, 1.0), (1e5, 1.0), (1e30, 1e25), (-1e-30, 1e-30)], 1, 2),
)
def test_float32_is_accurate_far_from_zero(center, spread):
    def shifted(key, x):
        return {"y": center + spread * jax.random.normal(key) + x}

    cells = nm.sweep(shifted, {"x": 0.0}, 20_000)["y"].astype(float)
    found = nm.sweep(shifted, {"x": 0.0}, 20_000, reduce=ALL)
    np.testing.assert_allclose(found["y_mean"], cells.mean(), 1e-6)
    # Squares beyond the range of float32 give infinity or zero, and never NaN.
    if 1e-15 < spread < 1e15:
        np.testing.assert_allclose(found["y_std"], cells.std(ddof=1), 1e-4)
    assert found["y_std"] >= 0


@pytest.mark.parametrize("seeds", mostly_slow([300, 5000], 1))
def test_rounding_of_means_does_not_enter_the_variance(seeds):
    # Numbers near 1e6 are 0.06 apart in float32, as far as most values are from each other.
    def shifted(key, x):
        return {"y": 1e6 + 0.1 * jax.random.normal(key, (4,)) + x}

    cells = nm.sweep(shifted, {"x": 0.0}, seeds)["y"].astype(float)
    found = nm.sweep(shifted, {"x": 0.0}, seeds, reduce=ALL)
    np.testing.assert_allclose(found["y_var"], cells.var("seed", ddof=1), 1e-5)
    assert np.array_equal(found["y_mean"], cells.mean("seed").astype(np.float32))


def test_sums_do_not_overflow():
    def large(key, x):
        return {"y": 1e38 * (2 + jax.random.uniform(key)) + x}

    cells = nm.sweep(large, {"x": 0.0}, 300)["y"].astype(float)
    found = nm.sweep(large, {"x": 0.0}, 300, reduce=ALL)
    np.testing.assert_allclose(found["y_mean"], cells.mean(), 1e-6)
    assert found["y_std"] == np.inf


def test_results_do_not_depend_on_blocks_batches_or_memory():
    whole = swept(700)
    for given in ({"block": 1}, {"memory": 60_000}, {"memory": 2_000}):
        # A compiler may contract products and sums in one batch and not in another.
        assert_same(swept(700, **given), whole, rounding=5e-7)
    # A grid of a single point has the same numbers.
    assert_same(swept(700, GRID | {"sigma": [0.5]}), whole.isel(sigma=[1]), rounding=5e-7)


@pytest.mark.slow
def test_settings_of_jax_do_not_matter():
    """Strict settings of a user are for the user's function."""

    def cheap(key, x):
        return {"y": x + jax.random.uniform(key)}

    seeds = range(2**32 - 1, 2**32 - 800, -7)
    whole = nm.sweep(cheap, {"x": [0.5, 1.0]}, seeds, reduce=ALL)
    cells = nm.sweep(cheap, {"x": [0.5, 1.0]}, seeds)
    np.testing.assert_array_equal(whole["y_max"], cells["y"].max("seed"))
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        assert_same(nm.sweep(cheap, {"x": [0.5, 1.0]}, seeds, reduce=ALL), whole)
    with jax.enable_x64(True):
        double = nm.sweep(cheap, {"x": [0.5, 1.0]}, seeds, reduce=ALL)
        right = nm.sweep(cheap, {"x": [0.5, 1.0]}, seeds)["y"]
        np.testing.assert_allclose(double["y_std"], right.std("seed", ddof=1), 1e-12)
        assert double["y_mean"].dtype == np.float64


class Small(SweepFunction):
    """Computes at most three cells at once."""

    accepts = requires = ("x",)

    def batch_cells(self, **statics):
        return 3

    def batched(self, keys, numbers, shared):
        assert len(keys) <= 3
        return {"y": jax.vmap(jax.random.uniform)(keys) + numbers["x"]}

    def __call__(self, key, x):
        return {"y": jax.random.uniform(key) + x}


def test_a_tile_is_computed_in_parts_if_the_function_asks_for_it():
    cells = nm.sweep(Small(), {"x": [0.0, 1.0]}, 10)["y"]
    found = nm.sweep(Small(), {"x": [0.0, 1.0]}, 10, reduce=ALL)
    np.testing.assert_allclose(found["y_mean"], cells.mean("seed"), 1e-6)
    np.testing.assert_array_equal(found["y_min"], cells.min("seed"))


def test_several_devices_give_the_same_numbers(tmp_path):
    script = """
        import sys
        from tests.sweeps.test_reduce import swept
        import jax
        assert jax.device_count() == 8
        swept(700, store=sys.argv[1]).load()
    """
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    call = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "x.zarr")]
    subprocess.run(call, check=True, env=os.environ | {"XLA_FLAGS": flags})
    assert_same(swept(700, store=tmp_path / "x.zarr"), swept(700))


def test_a_store_resumes_and_serves_other_statistics(tmp_path, computed, monkeypatch):
    whole, path = swept(700), tmp_path / "x.zarr"
    computed.clear()

    def stop(done, cells):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        swept(700, store=path, block=1, progress=stop)
    part = load(path)
    assert 0 < part["loss_count"].sum() < whole["loss_count"].sum()
    assert not part["completed"].all()
    told = []
    assert_same(swept(700, store=path, progress=lambda *counts: told.append(counts)), whole)
    assert told[-1] == (22, 22)  # two points of 11 chunks
    assert 22 <= sum(computed) <= 24  # a stop loses up to two blocks of one chunk
    computed.clear()
    found = swept(700, store=path, reduce={"seed": "mean"})
    assert_same(found, whole[list(found.data_vars)])
    assert sum(computed) == 0
    assert sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) < 60_000


def test_a_store_extends_by_seeds_points_and_rates(tmp_path, computed):
    path = tmp_path / "x.zarr"
    first, more = range(300), GRID | {"sigma": [0.1, 0.3, 0.5], "rates": [0.1, 0.2, -0.3, 0.7]}
    swept(first, store=path)
    with pytest.raises(StoreError, match=r"seeds: asked adds 2 .*extend adds it"):
        swept(420, store=path)
    computed.clear()
    longer = swept(420, store=path, extend=True)
    assert sum(computed) == 2 * 2  # 120 new seeds of two points in chunks of 60
    for name, right in swept(420).items():
        np.testing.assert_allclose(longer[name], right, 1e-5)
    assert longer.attrs["seeds"] == "0 to 419"
    # The chunks of the first call are still there, and have their statistics.
    assert_same(swept(first, store=path), swept(first))
    wide = swept(420, more, store=path, extend=True)
    for name, right in swept(420, more).items():
        np.testing.assert_allclose(wide[name], right, 1e-5)
    assert_same(swept(first, more, store=path), swept(first, more))


def test_seeds_that_share_a_chunk_cannot_be_told_apart(tmp_path):
    swept(10, store=tmp_path / "x.zarr")
    with pytest.raises(StoreError, match="ask for all seeds of the store"):
        swept(9, store=tmp_path / "x.zarr")
    with pytest.raises(StoreError, match="store has statistics over seeds, asked single cells"):
        swept(10, store=tmp_path / "x.zarr", reduce=None)
    swept(10, store=tmp_path / "cells.zarr", reduce=None)
    with pytest.raises(StoreError, match="store has single cells, asked statistics over seeds"):
        swept(10, store=tmp_path / "cells.zarr")


def test_stores_of_other_seeds_are_merged(tmp_path):
    a, b, c = (tmp_path / f"{name}.zarr" for name in "abc")
    swept(range(100, 300), store=a)
    swept(range(100), store=b)
    swept(range(50, 60), store=c, block=100)
    merged = nm.sweeps.merge([a, b], tmp_path / "m.zarr")
    for name, right in swept(300).items():
        np.testing.assert_allclose(merged[name], right, 1e-5)
    assert merged["completed"].all()
    assert_same(swept(range(300), store=tmp_path / "m.zarr"), merged.drop_vars("completed"))
    with pytest.raises(StoreError, match="ask for all seeds"):
        nm.sweeps.merge([b, c], tmp_path / "n.zarr")


@pytest.mark.slow
def test_workers_share_a_reduced_sweep(tmp_path, computed):
    path = tmp_path / "x.zarr"
    assert_same(swept(300, store=path, worker=(1, 2), block=100), swept(300))
    computed.clear()
    assert_same(swept(300, store=path, worker=(2, 2)), swept(300))
    assert sum(computed) == 2 * 5  # those of the call in memory


def test_chunks_follow_from_the_seeds_only():
    for n in (1, 64, 65, 2048, 2049, 10**6, 10**9):
        found = reduce.reduction_of(range(n))
        assert found.bounds[0] == 0 and found.bounds[-1] == n
        assert len(found.counts) <= reduce.CHUNKS
        assert (np.diff(found.counts) <= 0).all() and found.counts[-1] > 0
        assert reduce.Reduction.from_json(json.loads(json.dumps(found.to_json()))) == found
    for bounds in ([0, 1], [0, 2, 2], [], [0, 2.0], [1, 2]):
        with pytest.raises(ValueError, match="bounds of the chunks"):
            reduce.Reduction.from_json({"seeds": [1, 2], "bounds": bounds})


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        (["mean"], TypeError, "must be a dict"),
        ({"sigma": ["mean"]}, ValueError, "only the key 'seed'"),
        ({"seed": []}, TypeError, "must list some of"),
        ({"seed": ["maen"]}, ValueError, "did you mean 'mean'"),
        ({"seed": ["median"]}, ValueError, "needs all values at once"),
        ({"seed": ["q50"]}, ValueError, "needs all values at once"),
        ({"seed": [3]}, ValueError, "no statistic 3"),
    ],
)
def test_wrong_statistics_are_refused(given, error, text):
    with pytest.raises(error, match=text):
        swept(2, reduce=given)


def test_outputs_without_order_or_with_taken_names_are_refused():
    with pytest.raises(TypeError, match="'z' is complex"):
        nm.sweep(lambda key, x: {"z": x + 1j}, {"x": [1.0]}, 2, reduce=ALL)
    with pytest.raises(ValueError, match="names that the grid or the store uses"):
        nm.sweep(lambda key, y_mean: {"y": y_mean}, {"y_mean": [1.0]}, 2, reduce=ALL)
    # No moment has this name, but a statistic of the result.
    with pytest.raises(ValueError, match="names that the grid or the store uses"):
        nm.sweep(lambda key, y_sem: {"y": y_sem}, {"y_sem": [1.0]}, 2, reduce=ALL)


def test_a_plan_counts_seeds_and_a_billion_cells_are_planned():
    def cheap(key, x):
        return {"y": x * jax.random.uniform(key)}

    found = nm.sweeps.plan(cheap, {"x": np.arange(100.0)}, 10**7, reduce=ALL)
    assert found.grid.cells == 100 * 32
    assert "10,000,000 of each point, reduced in 32 chunks" in str(found)
    assert found.nbytes < 100_000
    assert found.seconds > 0.1


SPEC = """
function = "linear"
seeds = 70
reduce = { seed = ["mean", "sem", "count"] }
[grid]
p = 10
m = 2
n_t = 5
n_v = 2
n_r = 5
sigma = [0.1, 1.0]
nu = 1.0
train_rate = [-0.3, 0.0, 0.3]
adapt_rate = 0.2
"""


@pytest.mark.slow
def test_commands_take_reduce_from_a_spec(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spec.toml").write_text(SPEC)
    assert cli.run(["sweep", "spec.toml", "--dry-run"]) == 0
    assert "70 of each point" in capsys.readouterr().out
    assert cli.run(["sweep", "spec.toml", "--store", "x.zarr"]) == 0
    assert "test_loss_mean" in capsys.readouterr().out
    assert cli.run(["curves", "x.zarr", "--x", "train_rate", "--hue", "sigma"]) == 0
    assert cli.run(["heatmap", "x.zarr", "--x", "train_rate", "--y", "sigma"]) == 0
    assert cli.run(["status", "x.zarr", "--check"]) == 0
    dataset = load("x.zarr")
    assert summary.variable(dataset, None) == summary.variable(dataset, "test_loss")
    means, errors = summary.mean(dataset, "test_loss_mean", ["train_rate", "sigma"])
    xr.testing.assert_allclose(errors, dataset["test_loss_sem"].astype(float).rename(None))
    assert means.shape == (2, 3)
    assert cli.run(["sweep", "spec.toml", "--dry-run", "--override", "reduce.seed=['median']"]) == 2
