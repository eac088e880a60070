"""Stores of one sweep are merged; stores of different sweeps raise an error."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import negmaml as nm
from negmaml.sweeps import StoreError, merge
from tests.internals import description_of, merging
from tests.internals import main as cli
from tests.sweeps.script import GRID, SEEDS, chunk_count, function
from tests.sweeps.test_store import WHOLE, products


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """Three stores of parts of the sweep, which overlap, of other orders and blocks."""
    folder = tmp_path_factory.mktemp("apart")
    turned = {"scale": [2.0, -1.0, 0.0], "size": [3, 2]}
    nm.sweep(function, GRID | {"scale": [-1.0, 0.5]}, [0, 1, 2], store=folder / "a.zarr", block=3)
    nm.sweep(function, turned, [5, 3, 2, 4, 0, 1], store=folder / "b.zarr", block=5)
    nm.sweep(function, GRID | {"scale": [0.5]}, [3, 4, 5], store=folder / "c.zarr")
    return [str(folder / name) for name in ("a.zarr", "b.zarr", "c.zarr")]


def test_a_merge_is_the_sweep_of_all_of_them_bit_for_bit(apart, tmp_path, capsys):
    whole = nm.sweep(function, GRID, SEEDS)
    assert cli.run(["merge", *apart, "--store", str(tmp_path / "m.zarr")]) == 0
    assert "48 of 48" in capsys.readouterr().out
    merged = xr.open_zarr(tmp_path / "m.zarr").load()
    assert merged.attrs["merged"] == apart
    assert merged.attrs["seeds"] == "0 to 5"
    assert merged["completed"].all()
    picked = merged.drop_vars("completed").sel(scale=whole.scale, seed=whole.seed)
    xr.testing.assert_identical(picked.drop_attrs(), whole.drop_attrs())


def test_what_is_in_none_of_them_is_computed_by_the_sweep_and_only_that(apart, tmp_path):
    path, told = tmp_path / "m.zarr", []
    assert not merge(apart[:2], path)["completed"].all()
    merge(apart[:2], path)  # once more is the same
    result = nm.sweep(function, GRID, SEEDS, store=path, progress=lambda *n: told.append(n))
    assert told[0] == (42, 48)
    xr.testing.assert_identical(
        result.load().drop_attrs(),
        nm.sweep(function, GRID, SEEDS).load().drop_attrs(),
    )
    with pytest.raises(StoreError, match=r"something else than this merge:\n  axis scale"):
        merge(apart[1:2], path)


def test_whole_axes_in_another_order_and_lengthened_are_merged(tmp_path):
    paths = [tmp_path / "a.zarr", tmp_path / "b.zarr"]
    grid = {"size": [2, 3], "left": [0.0, 0.3], "right": [1.0, 0.2]}
    nm.sweep(products, grid | {"left": [0.3]}, 2, store=paths[0], **WHOLE)
    nm.sweep(products, grid, 2, store=paths[0], extend=True, **WHOLE)
    nm.sweep(products, grid | {"right": [0.2, 1.0]}, [2, 3], store=paths[1], **WHOLE)
    merged = merge(paths, tmp_path / "m.zarr").load()
    expected = nm.sweep(products, grid, 4, **WHOLE)
    picked = merged.sel(left=expected.left)
    for name in ("both", "first", "finite"):
        np.testing.assert_array_equal(picked[name], expected[name])


@pytest.mark.parametrize("at", (1, 7))
def test_a_merge_that_is_cut_is_gone_on_with(apart, tmp_path, monkeypatch, at):
    from tests.internals import SweepStore

    count, right = [], SweepStore.write

    def write(self, *arguments):
        count.append(1)
        if len(count) == at:
            raise KeyboardInterrupt
        return right(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(SweepStore, "write", write)
        try:
            merge(apart, tmp_path / "m.zarr")
        except KeyboardInterrupt:
            xr.open_zarr(tmp_path / "m.zarr").load()
    assert merge(apart, tmp_path / "m.zarr")["completed"].all()


def other(key, size, scale):
    return {name: 2 * value for name, value in function(key, size, scale).items()}


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (dict(function=other), r"compute different things \(numbers: 6 became 8"),
        (dict(root_seed=1), "root_seed: store has 0, asked 1"),
        (dict(grid=GRID | {"size": 2}), "axis size: dim"),
        (dict(common_random_numbers=["scale"]), "common"),
        (dict(grid={"size": [5], "scale": [1.0]}, function=other), "function: store has tests"),
    ],
)
def test_another_sweep_is_refused_naming_what_differs(call, said, apart, tmp_path):
    path = tmp_path / "other.zarr"
    nm.sweep(**(dict(function=function, grid=GRID, seeds=2, store=path) | call))
    with pytest.raises(StoreError, match="another sweep than") as refused:
        merge([apart[0], path], tmp_path / "m.zarr")
    import re

    assert re.search(said, str(refused.value))
    assert not (tmp_path / "m.zarr").exists()


def test_whole_axes_of_other_values_are_refused(tmp_path):
    def powers(key, rates):
        return {"value": jax.random.normal(key) * jnp.asarray(rates)}

    for name, rates in (("a", [0.0, 1.0]), ("b", [0.0, 2.0])):
        nm.sweep(powers, {"rates": rates}, 2, store=tmp_path / name, vectorized=["rates"])
    with pytest.raises(StoreError, match=r"axis rates: values of a vectorized axis differ"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")


@pytest.mark.parametrize(
    ("stores", "out", "error", "said"),
    [
        ("a.zarr", "m", TypeError, "stores must be a list"),
        ([], "m", TypeError, "stores must be a list"),
        ([3], "m", TypeError, "store must be a path or a URL"),
        (["nowhere.zarr"], "m", FileNotFoundError, "no store at 'nowhere.zarr'"),
    ],
)
def test_wrong_merges_are_refused_in_our_words(stores, out, error, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=said):
        merge(stores, out)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    """Stores of other seeds and other blocks, one of them with its axes in another order."""
    folder, turned = tmp_path_factory.mktemp("sizes"), {"scale": [2.0, -1.0, 0.0], "size": [3, 2]}
    nm.sweep(function, GRID, range(9), store=folder / "small.zarr", block=1)
    nm.sweep(function, turned, range(9, 30), store=folder / "long.zarr")
    nm.sweep(function, GRID, [30], store=folder / "one.zarr", block=5)
    return [folder / name for name in ("small.zarr", "long.zarr", "one.zarr")]


def test_the_order_of_stores_does_not_change_the_number_of_files(sizes, tmp_path):
    counts, told = set(), []
    orders = sizes, sizes[::-1], [*sizes[1:], sizes[0]]
    for i, order in enumerate(orders):
        path = tmp_path / f"{i}.zarr"
        merge(order, path, progress=lambda *n: told.append(n))
        counts.add(chunk_count(path, "total"))
    assert counts == {2}  # 31 seeds in blocks of 21, and all points in each
    assert told == [(8 * 21, 8 * 31), (8 * 31, 8 * 31)] * len(orders)


def test_blocks_of_merged_stores_are_bounded(sizes, tmp_path, monkeypatch):
    """Blocks of stores that are long along different dims do not multiply beyond the bound."""
    monkeypatch.setattr(merging, "MAX_BLOCK_BYTES", 4 * 42)
    merge(sizes, tmp_path / "m.zarr")
    block = description_of(str(tmp_path / "m.zarr")).manifest.block
    longest = max(math.prod(description_of(str(path)).manifest.block) for path in sizes)
    assert math.prod(block) <= longest < 2 * 4 * 21


def test_a_store_is_not_merged_into_itself(apart):
    with pytest.raises(ValueError, match="is among those that are merged"):
        merge(apart, apart[0])
