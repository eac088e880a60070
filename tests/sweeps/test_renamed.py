"""Old names of arguments, attributes and spec fields, and stores of the previous format."""

import json

import numpy as np
import pytest
import xarray as xr

import negmaml as nm
from negmaml.sweeps import merge, plan, prepare, status
from tests.helpers import mostly_slow
from tests.internals import WorkerRecord, description_of, spec, summary
from tests.internals import description_MANIFEST as MANIFEST
from tests.sweeps.script import GRID, SEEDS, function


def powers(key, rates, size=1):
    return {"value": rates * size}


RATES = {"rates": [1.0, 2.0]}


@pytest.mark.parametrize("call", [nm.sweep, plan, prepare])
@pytest.mark.parametrize(
    ("old", "new", "value"),
    [("root", "root_seed", 3), ("whole", "vectorized", ["rates"]),
     ("common", "common_random_numbers", ["rates"])],
)  # fmt: skip
def test_old_arguments_of_every_function_warn_and_work(call, old, new, value):
    with pytest.warns(DeprecationWarning, match=rf"\({old}=\.\.\.\) was renamed: use {new}="):
        call(powers, RATES, 2, **{old: value})


@pytest.mark.parametrize(
    ("old", "new", "value"),
    [("part", "worker", (1, 1)), ("accept_changes", "allow_code_change", True),
     ("version", "code_version", "1")],
)  # fmt: skip
def test_old_arguments_of_stores_warn_and_work(old, new, value, tmp_path):
    with pytest.warns(DeprecationWarning, match=f"use {new}="):
        result = nm.sweep(powers, RATES, 2, tmp_path / "x.zarr", **{old: value})
    np.testing.assert_array_equal(result["value"][:, 0], [1.0, 2.0])


def test_whole_axes_of_a_function_warn_and_work():
    class Powers(nm.sweeps.SweepFunction):
        accepts = requires = whole_axes = ("rates",)

        def __call__(self, key, *, rates):
            return {"value": rates}

    with pytest.warns(DeprecationWarning, match="use vectorized_axes"):
        assert nm.sweep(Powers(), RATES, 2)["value"].dims == ("seed", "rates")


def test_old_fields_of_a_spec_warn_and_work(tmp_path):
    path = tmp_path / "spec.toml"
    path.write_text(
        'function = "linear"\nseeds = 2\nroot = 3\nversion = "1"\nwhole = ["a"]\ncommon = ["b"]\n'
        "[grid]\np = 3\n"
    )
    with pytest.warns(DeprecationWarning) as warned:
        fields = spec.read(str(path))
    assert {str(w.message).split("'")[-2] for w in warned} == set(spec.RENAMED.values())
    assert fields["root_seed"] == 3 and fields["code_version"] == "1"
    assert fields["vectorized"] == ["a"] and fields["common_random_numbers"] == ["b"]
    assert not spec.RENAMED.keys() & fields.keys()


def test_a_field_by_both_names_raises(tmp_path):
    path = tmp_path / "spec.toml"
    path.write_text('function = "linear"\nseeds = 2\nroot = 3\nroot_seed = 4\n[grid]\np = 3\n')
    with pytest.raises(ValueError, match=r"'root' and 'root_seed' are one field.*only 'root_seed'"):
        spec.read(str(path))


def test_old_attributes_of_a_worker_warn_and_work():
    record = WorkerRecord("worker-1", "process 1 on x", (1, 2), 3, 4.0)
    for old, new in (("name", "key"), ("part", "index"), ("beat", "heartbeat")):
        with pytest.warns(DeprecationWarning, match=f"use {new}"):
            assert getattr(record, old) == getattr(record, new)


def to_format(number, path):
    """Turn a store into one of an earlier format: 4 lists seeds, 3 has `done` for `completed`."""
    root = json.loads((path / "zarr.json").read_text())
    manifest = json.loads(root["attributes"][MANIFEST])
    manifest |= {"format": number, "seeds": list(range(*manifest["seeds"].values()))}
    del manifest["labels"]
    root["attributes"][MANIFEST] = json.dumps(manifest)
    arrays = root["consolidated_metadata"]["metadata"]
    if number == 3:
        (path / "completed").rename(path / "done")
        arrays["done"] = arrays.pop("completed")
    (path / "zarr.json").write_text(json.dumps(root))


@pytest.mark.parametrize(("number", "worker"), mostly_slow([(3, None), (3, (1, 1)), (4, None)], 0))
def test_a_store_of_an_earlier_format_is_read_resumed_extended_and_merged(number, worker, tmp_path):
    path, expected = tmp_path / "x.zarr", nm.sweep(function, GRID, SEEDS)
    partly = GRID | {"scale": GRID["scale"][:2]}
    nm.sweep(function, partly, SEEDS, store=path, block=3)
    (path / "completed" / "c" / "0" / "0" / "1").unlink()  # a block that was not finished
    to_format(number, path)
    assert status(path).cells_done < status(path).cells
    assert not summary.load(str(path))["completed"].all()
    nm.sweep(function, partly, SEEDS, store=path, worker=worker)
    found = nm.sweep(function, GRID, SEEDS, store=path, worker=worker, extend=True).load()
    xr.testing.assert_identical(found.drop_attrs(), expected.drop_attrs())
    name = "done" if number == 3 else "completed"
    assert xr.open_zarr(path)[name].all() and (path / "completed").exists() == (number == 4)
    assert description_of(str(path)).manifest.format == number
    merged = merge([path], tmp_path / "m.zarr")
    assert merged["completed"].all() and (tmp_path / "m.zarr" / "completed").exists()
    np.testing.assert_array_equal(merged["total"], expected["total"])
