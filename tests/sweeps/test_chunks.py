"""Chunks and shards: zarr reads the numbers that were written, in parts and as a whole."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
import zarr

import negmaml as nm
from negmaml.sweeps import StoreError, merge, status
from tests.internals import chunks, description_of, layout, summary

GRID = {"x": [1.0, -2.0], "kind": ["a", "bé"], "rates": [0.5, 2.0, 3.0]}
SEEDS = 96


def function(key, x, kind, rates):
    return {
        "loss": x * rates * (2 if kind == "a" else 1),
        "pair": jnp.stack([x, -x]) * (1 + 2j),
        "count": jnp.int32(x),
    }


def call(store, seeds=SEEDS, grid=GRID, **options):
    dims = {"loss": ["rates"], "pair": ["sign"], "count": []}
    options = {"vectorized": ["rates"], "output_dims": dims, "block": 144} | options
    return nm.sweep(function, grid, seeds, store, **options)


@pytest.fixture
def small(monkeypatch):
    """Inner chunks of a few cells, so that small stores have shards."""
    monkeypatch.setattr(layout, "INNER_BYTES", 256)


@pytest.fixture
def store(small, tmp_path):
    call(tmp_path / "x.zarr")
    return tmp_path / "x.zarr"


def layouts(store):
    return description_of(str(store)).layouts


def test_a_large_block_is_a_shard_that_any_reader_of_zarr_opens(store):
    held, expected = layouts(store), call(None).load()
    assert held["loss"].chunk == (1, 1, 96, 3) and held["loss"].inner == (1, 1, 16, 3)
    assert held["pair"].inner == (1, 1, 16, 2) and held["count"].inner is None
    with xr.open_zarr(store) as plain:
        xr.testing.assert_equal(plain.drop_vars("completed").load(), expected)
    assert zarr.open_array(store / "loss").shards == (1, 1, 96, 3)
    checked = summary.load(str(store))
    for part in ({"seed": 5}, {"seed": slice(40, 70), "x": [1]}, {"rates": 1, "kind": 0}, {}):
        xr.testing.assert_equal(checked["loss"].isel(part).load(), expected["loss"].isel(part))


def test_blocks_of_parts_extensions_and_merges_keep_the_rest_of_a_shard(small, tmp_path):
    path = tmp_path / "x.zarr"
    longer = GRID | {"rates": [0.5, 2.0, 3.0, -1.0]}
    call(path, range(3, 90))
    call(path, [3, 4], longer, extend=True)
    call(path, 120, extend=True)
    expected = call(None, 120, longer).load()
    xr.testing.assert_equal(call(path, 120, longer).load(), expected)
    merged = merge([path], tmp_path / "m.zarr").drop_vars("completed").load()
    xr.testing.assert_equal(merged.sortby("seed"), expected)
    assert layouts(tmp_path / "m.zarr")["loss"].inner


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("at", [20, -1, -20])
def test_an_altered_shard_is_found_and_its_right_inner_chunks_are_read(at, store):
    expected = call(store).load()
    path = store / "loss/c/0/1/0/0"
    flip(path, at)
    assert list(status(store, check=True).lost) == ["loss/c/0/1/0/0"]
    loss = call(store)["loss"] if at < 0 else summary.load(str(store))["loss"]
    if at > 0:  # one inner chunk
        np.testing.assert_array_equal(loss.isel(seed=50), expected["loss"].isel(seed=50))
        with pytest.raises(StoreError, match="was altered: its checksum is another"):
            loss.isel(x=0, kind=1, seed=5).load()
    xr.testing.assert_equal(call(store).load(), expected)
    assert not status(store, check=True).lost


@pytest.mark.parametrize("harm", ["truncate", "lengthen", "delete"])
def test_a_shard_of_another_size_is_lost(harm, store):
    path = store / "loss/c/0/1/0/0"
    lazily = call(store)["loss"].isel(x=0, kind=1, seed=50)
    data = path.read_bytes()
    path.write_bytes(data[:-1] if harm == "truncate" else data + data[-100:])
    if harm == "delete":
        path.unlink()
    assert list(status(store).lost) == ["loss/c/0/1/0/0"]
    if harm != "lengthen":
        with pytest.raises(StoreError, match=r"altered|is missing"):
            lazily.load()
    assert status(store).cells_done == 3 * SEEDS
    call(store)
    assert status(store).cells_done == 4 * SEEDS


def test_the_codecs_of_a_shard_are_those_of_a_sweep(store):
    text = (store / "zarr.json").read_text()
    for old, new in (('"end"', '"start"'), ('"sharding_indexed"', '"pickle"')):
        (store / "zarr.json").write_text(text.replace(old, new, 1))
        with pytest.raises(StoreError, match="codec"):
            status(store)


@pytest.mark.parametrize("name", ["loss", "pair", "count", "finite", "kind", "seed", "x"])
def test_every_chunk_is_decoded_to_what_was_encoded(name, store):
    held = layouts(store)[name]
    at = (0,) * len(held.shape)
    data = (store / held.key(at)).read_bytes()
    values = chunks.decode(held, data)
    assert values.shape == held.chunk and not chunks.fault(held, at, data)
    assert chunks.encode(held, values) == data
    shutil.rmtree(store)


def test_blocks_that_cannot_be_divided_are_no_shards(small):
    divided = layout._inner_chunk
    assert divided((1, 97), np.dtype("f4"), 2) is None
    assert divided((2, 32), np.dtype("f4"), 2) is None  # it is not larger than an inner chunk
    assert divided((4, 96), np.dtype("f4"), 2) == (1, 48)
    assert divided((4, 8, 100), np.dtype("f4"), 2) == (1, 1, 100)  # a cell is larger
