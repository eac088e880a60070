"""Lost chunks are seen, named, never read as NaN, and computed again by the same call."""

import pickle
import shutil
from itertools import product

import fsspec
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import negmaml as nm
from negmaml.sweeps import StoreError, merge
from tests.helpers import mostly_slow
from tests.internals import description_of, lost, open_store, summary
from tests.internals import main as cli
from tests.sweeps.test_store import LONGER, SHORT, WHOLE, products

GRID, SEEDS, BLOCK = {"x": [1.0, 2.0, 3.0], "kind": ["a", "bé"]}, 4, 4


def function(key, x, kind):
    """Outputs that are not random, of several types; one of them is equal to its fill value."""
    return {
        "loss": x * jnp.arange(1.0, 3.0) * (1 if kind == "a" else -1),
        "nothing": jnp.full((), jnp.nan),
        "count": jnp.int32(0) + (x > 2),
        "zero": jnp.zeros((2,), bool),
    }


def call(store, seeds=SEEDS, **options):
    return nm.sweep(function, GRID, seeds, store=str(store), block=BLOCK, **options).load()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "x.zarr"
    return path, call(path)


@pytest.fixture
def store(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "x.zarr")


def chunks(store, name):
    return sorted(path for path in (store / name / "c").rglob("*") if path.is_file())


def delete(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def lengthen(path):
    """A file with more than a chunk."""
    path.write_bytes(path.read_bytes() + b"more")


OUTPUTS = ("loss", "nothing", "count", "zero", "finite")


HARMS = list(product(OUTPUTS, [delete, empty, lengthen, flip]))


@pytest.mark.parametrize(("name", "harm"), mostly_slow(HARMS, 0, 3, 5, 10, 12, 19))
def test_what_is_lost_is_named_and_computed_again(name, harm, made, store, computed):
    path = chunks(store, name)[2]
    harm(path)
    key = path.relative_to(store).as_posix()
    quick, found = nm.sweeps.status(store), nm.sweeps.status(store, check=True)
    assert list(found.lost) == [key]
    assert found.cells_done == found.cells - BLOCK
    assert found.blocks_done == found.blocks - 1
    assert found.checked
    assert key in str(found)
    if harm in (delete, empty) or (harm is lengthen and name in ("loss", "nothing")):
        assert (quick.cells_done, quick.lost) == (found.cells_done, found.lost)
    computed.clear()
    result = call(store)
    assert sum(computed) == BLOCK
    xr.testing.assert_identical(result.drop_attrs(), made[1].drop_attrs())
    assert key in result.attrs["history"][-1]
    again = nm.sweeps.status(store, check=True)
    assert (again.cells_done, again.lost) == (again.cells, {})
    assert not store.with_name(".x.zarr.damaged").exists()


def test_every_chunk_is_written_also_one_of_fill_values(made, store):
    found = description_of(str(store))
    for name in (*OUTPUTS, "completed"):
        assert len(chunks(store, name)) == np.prod(found.layouts[name].chunks)
        assert found.layouts[name].checksum
    with xr.open_zarr(store) as plain:  # by any reader of zarr
        xr.testing.assert_equal(plain.drop_vars("completed").load(), made[1])


def test_flags_that_are_lost_are_cells_that_are_not_done(made, store, computed):
    delete(chunks(store, "completed")[0])
    flip(chunks(store, "completed")[1])
    assert nm.sweeps.status(store).cells_done == made[1]["finite"].size - 2 * BLOCK
    computed.clear()
    xr.testing.assert_identical(call(store).drop_attrs(), made[1].drop_attrs())
    assert sum(computed) == 2 * BLOCK


@pytest.mark.parametrize("name", ["kind", "x", "seed"])
@pytest.mark.parametrize("harm", [delete, flip])
def test_labels_are_those_of_the_sweep_whatever_the_files_hold(name, harm, made, store):
    harm(chunks(store, name)[0])
    found = nm.sweeps.status(store, check=True)
    assert [key.split("/")[0] for key in found.lost] == [name]
    assert found.cells_done == found.cells
    np.testing.assert_array_equal(summary.load(str(store))[name], made[1][name])
    call(store)
    assert not nm.sweeps.status(store, check=True).lost
    np.testing.assert_array_equal(xr.open_zarr(store)[name], made[1][name])


def test_a_part_that_is_asked_for_does_not_hide_the_loss_of_the_rest(made, store):
    """The block is computed in part, and its other cells stay as not done."""
    delete(chunks(store, "loss")[0])
    part = nm.sweep(function, {"x": [1.0], "kind": ["a"]}, [2], store=store).load()
    np.testing.assert_array_equal(part["loss"].squeeze(), [1.0, 2.0])
    assert nm.sweeps.status(store).cells_done == made[1]["finite"].size - BLOCK + 1
    assert nm.sweeps.status(store).lost == {}
    xr.testing.assert_identical(call(store).drop_attrs(), made[1].drop_attrs())


def test_nothing_that_is_lost_later_is_read_as_nan(store):
    lazily = nm.sweep(function, GRID, SEEDS, store=store)
    copied = pickle.loads(pickle.dumps(lazily))
    delete(chunks(store, "loss")[0])
    flip(chunks(store, "count")[0])
    for dataset in (lazily, copied):
        with pytest.raises(StoreError, match=r"loss/c/0/0/0/0 is missing.*status --check"):
            dataset["loss"].load()
        with pytest.raises(StoreError, match=r"count/c/0/0/0 was altered"):
            dataset["count"].load()


def test_means_leave_out_what_is_lost(store):
    delete(chunks(store, "loss")[0])
    found = summary.load(str(store))
    assert int((found["completed"] > 0).sum()) == found["completed"].size - BLOCK
    assert found["loss"].where(found["completed"] > 0).count() == 2 * (
        found["completed"].size - BLOCK
    )


def test_a_large_store_is_verified_by_status_which_leaves_a_note(made, store, monkeypatch):
    monkeypatch.setattr(lost, "MAX_VERIFIED", 0)
    flip(chunks(store, "loss")[1])
    with pytest.raises(StoreError, match="was altered"):
        call(store)
    assert nm.sweeps.status(store, check=True).lost
    assert store.with_name(".x.zarr.damaged").exists()
    xr.testing.assert_identical(call(store).drop_attrs(), made[1].drop_attrs())
    assert not store.with_name(".x.zarr.damaged").exists()


def test_a_note_of_others_changes_nothing_that_is_right(made, store, computed):
    folder = store.with_name(".x.zarr.damaged")
    folder.mkdir()
    (folder / "chunks").write_text('["loss/c/0/0/0/0", "../../x", "zarr.json", 3]')
    computed.clear()
    xr.testing.assert_identical(call(store).drop_attrs(), made[1].drop_attrs())
    assert not computed


@pytest.mark.parametrize("harm", [delete, truncate])
def test_a_worker_that_is_alone_computes_again_what_is_lost(harm, made, store):
    harm(chunks(store, "loss")[0])
    xr.testing.assert_identical(call(store, worker=(1, 2)).drop_attrs(), made[1].drop_attrs())
    assert not nm.sweeps.status(store, check=True).lost


def test_a_store_in_memory_is_looked_after_too(made):
    url, files = "memory://lost/x.zarr", fsspec.filesystem("memory")
    call(url)
    files.rm_file("/lost/x.zarr/loss/c/0/0/0/0")
    data = bytearray(files.cat_file("/lost/x.zarr/count/c/1/0/0"))
    data[-1] ^= 1
    files.pipe_file("/lost/x.zarr/count/c/1/0/0", bytes(data))
    found = nm.sweeps.status(url, check=True)
    assert list(found.lost) == ["count/c/1/0/0", "loss/c/0/0/0/0"]
    assert found.cells_done == found.cells - 2 * BLOCK
    xr.testing.assert_identical(call(url).drop_attrs(), made[1].drop_attrs())
    files.rm("/lost", recursive=True)


@pytest.mark.parametrize("last", mostly_slow([True, False], 1))
def test_chunks_of_an_extension_of_whole_axes_are_looked_after(last, tmp_path):
    """A chunk of the values that were added: cells keep the values from before."""
    path = tmp_path / "x.zarr"
    nm.sweep(products, SHORT, 3, store=path, block=2, **WHOLE)
    expected = nm.sweep(products, LONGER, 3, store=path, extend=True, **WHOLE).load()
    delete(chunks(path, "both")[-1 if last else 0])
    found = nm.sweeps.status(path)
    assert found.cells_done < found.cells
    done = lost.found_in(str(path), description_of(str(path))).levels()
    assert done.min() == (2 if last else 0)
    again = nm.sweep(products, LONGER, 3, store=path, **WHOLE).load()
    xr.testing.assert_equal(again, expected)
    assert nm.sweeps.status(path, check=True).cells_done == found.cells


def test_a_copy_of_a_growing_store_forgets_cells_that_it_does_not_know(tmp_path):
    """Files of an extension, with the metadata from before it: the values may become others."""
    path, copy = tmp_path / "x.zarr", tmp_path / "copy.zarr"

    def scaled(key, x):
        return {"y": x}

    nm.sweep(scaled, {"x": [1.0, 2.0, 3.0]}, 2, store=path, block=4)
    old = {p: p.read_bytes() for p in path.rglob("zarr.json")}
    nm.sweep(scaled, {"x": [1.0, 2.0, 3.0, 4.0, 5.0]}, 2, store=path, extend=True)
    for file, content in old.items():
        file.write_bytes(content)
    shutil.move(path, copy)
    longer = nm.sweep(scaled, {"x": [1.0, 2.0, 3.0, 40.0, 50.0]}, 2, store=copy, extend=True)
    np.testing.assert_array_equal(longer["y"].sel(seed=0), longer["x"])


def test_flags_of_parts_that_the_store_does_not_know_are_not_believed(tmp_path):
    path = tmp_path / "x.zarr"
    nm.sweep(products, SHORT, 3, store=path, block=2, **WHOLE)
    held = open_store(str(path))
    for at in np.ndindex(*held.layouts["completed"].chunks):
        held.write_flags(at, np.full(held.manifest.block, 2, np.uint8))
    assert nm.sweeps.status(path).cells_done == nm.sweeps.status(path).cells
    found = nm.sweep(products, LONGER, 3, store=path, extend=True, **WHOLE).load()
    xr.testing.assert_equal(found, nm.sweep(products, LONGER, 3, **WHOLE))


def without_checksums(store):
    """The store as earlier versions wrote it: no checksums, and no chunks of fill values."""
    held = open_store(str(store))
    for name, layout in held.layouts.items():
        object.__setattr__(layout, "checksum", False)
        for path in chunks(store, name):
            path.write_bytes(path.read_bytes()[:-4])
    held.describe({})
    held.update_array_metadata()
    for name in ("nothing", "zero"):
        shutil.rmtree(store / name / "c")


def test_a_store_of_an_earlier_version_is_read_and_resumed(made, store, computed):
    without_checksums(store)
    assert nm.sweeps.status(store, check=True).lost == {}
    assert nm.sweeps.status(store).cells_done == made[1]["finite"].size
    computed.clear()
    xr.testing.assert_identical(call(store).drop_attrs(), made[1].drop_attrs())
    assert not computed
    call(store, seeds=SEEDS + 1, extend=True)
    assert nm.sweeps.status(store).cells_done == made[1]["finite"].size * (SEEDS + 1) // SEEDS


def finite_only(key, x):
    return {"y": x}


def test_chunks_that_an_earlier_version_must_have_written_are_missed(tmp_path, computed):
    path = tmp_path / "x.zarr"
    nm.sweep(finite_only, {"x": [1.0, 2.0]}, 2, store=path, block=2)
    held = open_store(str(path))
    for name, layout in held.layouts.items():
        object.__setattr__(layout, "checksum", False)
        for file in chunks(path, name):
            file.write_bytes(file.read_bytes()[:-4])
    held.describe({})
    held.update_array_metadata()
    delete(chunks(path, "y")[0])
    truncate(chunks(path, "y")[0])
    assert nm.sweeps.status(path).cells_done == 0
    computed.clear()
    found = nm.sweep(finite_only, {"x": [1.0, 2.0]}, 2, store=path)
    np.testing.assert_array_equal(found["y"].sel(seed=1), [1.0, 2.0])
    assert sum(computed) == 4


def test_a_merge_takes_no_cell_whose_chunks_are_lost_and_none_that_was_altered(made, store):
    target = store.with_name("m.zarr")
    delete(chunks(store, "loss")[0])
    assert nm.sweeps.status(store).cells_done == int(
        (merge([store], target)["completed"] > 0).sum()
    )
    merge([store, made[0]], target)  # what the first lost is the second's
    assert nm.sweeps.status(target, check=True).cells_done == made[1]["finite"].size
    flip(chunks(store, "loss")[0])
    with pytest.raises(StoreError, match=r"x\.zarr.*loss/c/\S+ was altered"):
        merge([store], store.with_name("n.zarr"))


def test_a_target_that_lost_chunks_is_filled_again(made, store):
    target = store.with_name("m.zarr")
    merge([store], target)
    delete(chunks(target, "count")[0])
    merge([store], target)
    assert nm.sweeps.status(target, check=True).cells_done == made[1]["finite"].size


def test_the_command_names_what_is_lost_and_exits_with_one(store, capsys):
    assert cli.run(["status", str(store), "--check"]) == 0
    flip(chunks(store, "loss")[1])
    assert cli.run(["status", str(store)]) == 0
    assert cli.run(["status", str(store), "--check"]) == 1
    assert "lost: loss/c/0/1/0/0 was altered: its checksum" in capsys.readouterr().out
    with pytest.raises(TypeError, match="check must be True or False"):
        nm.sweeps.status(store, check="yes")


def test_many_losses_are_named_up_to_a_number(store, capsys):
    for name in OUTPUTS:
        shutil.rmtree(store / name / "c")
    found = nm.sweeps.status(store)
    assert len(found.losses()) == 21
    assert found.losses()[-1] == f"and {len(found.lost) - 20} more"
    assert found.cells_done == 0
