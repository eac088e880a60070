"""Names of axes, outputs and dims: those that clash are refused before anything is computed."""

import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import negmaml as nm
from negmaml.sweeps import SweepFunction, random_points
from tests.internals import Runner

LETTERS = "\u00e9", "e\u0301"  # the same letter, composed and decomposed


@pytest.fixture
def never(monkeypatch):
    """Nothing is compiled or computed."""
    monkeypatch.setattr(Runner, "compute", None)
    monkeypatch.setattr(Runner, "probe", None)


def total(key, **point):
    return {"value": sum(point.values())}


def returns(*names, shape=()):
    return lambda key, x: {name: x * jnp.ones(shape) for name in names}


def assert_refused(said, tmp_path, function, grid, error=ValueError, **options):
    for store in (None, tmp_path / "x.zarr"):
        with pytest.raises(error, match=said):
            nm.sweep(function, grid, 2, store=store, **options)
    assert not list(tmp_path.iterdir()) or not (tmp_path / "x.zarr").exists()


PAIRS = [(1.0, 2.0), (3.0, 4.0)]


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ({("a", "b"): PAIRS, "a_b": [5.0, 6.0]}, "a, b have the dim 'a_b', which is also a name"),
        ({("a", "b"): PAIRS, "a_b": 5.0}, "a, b have the dim 'a_b', which is also a name"),
        ({("a", "b_c"): PAIRS, ("a_b", "c"): PAIRS}, "dim 'a_b_c', and so have a, b_c"),
        ({("a", "a"): PAIRS}, "got 'a' twice"),
        ({"a": [1.0], ("a", "b"): PAIRS}, "got 'a' twice"),
        ({"self": [1.0]}, "'self' is reserved"),
        ({"completed": [1.0]}, "'completed' is reserved"),
        ({("done", "b"): PAIRS}, "'done' is reserved"),
        ({"__a": [1.0]}, "two underscores, which zarr reserves"),
        ({"a" * 101: [1.0]}, "more than 100 bytes"),
        ({LETTERS[0]: [1.0], LETTERS[1]: [2.0]}, "Unicode takes the names"),
        ({"\ufb01": [1.0], "fi": [2.0]}, "Unicode takes the names"),
        ({"point": [{"self": 1.0}]}, "'self' is reserved"),
        ({"point": [{"a": 1.0}], "a": [1.0]}, "got 'a' twice"),
        ([{"a": [1.0], "seed": 1}, {"a": [2.0]}], "'seed' is reserved"),
    ],
)
def test_names_of_a_grid_that_clash_are_refused(grid, said, tmp_path, never):
    assert_refused(said, tmp_path, total, grid)


@pytest.mark.parametrize("key", ["a b", "a/b", "", "..", "a\x1b", 3, b"a", None, (), ("a", 3)])
def test_an_axis_is_named_by_a_word(key, tmp_path, never):
    assert_refused("named by a word", tmp_path, total, {key: PAIRS}, TypeError)
    assert_refused("named by a word", tmp_path, total, {"point": [{key: 1.0}]}, TypeError)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a/b", "the character '/'"),
        ("a\\b", "the character"),
        ("a\x1b[31m", r"the character '\\x1b'"),
        ("a\nb", r"the character '\\n'"),
        ("a\ud800", "the character"),
        ("", "is empty"),
        (".", "a period"),
        ("..", "a period"),
        (".x", "a period"),
        (" x", "a space"),
        ("__x", "which zarr reserves"),
        ("zarr.json", "a file of zarr"),
        ("Zarr.json", "a file of zarr"),
        ("x" * 101, "more than 100 bytes"),
        ("self", "a name that the store uses"),
        ("seed", "a name that the store uses"),
        ("done", "a name that the store uses"),
        ("completed", "a name that the store uses"),
        ("finite", "a name that the store uses"),
        ("x", "names that the grid or the store uses"),
    ],
)
def test_an_output_that_no_store_can_hold_is_refused(name, said, tmp_path, never):
    assert_refused(said, tmp_path, returns(name), {"x": [1.0, 2.0]})


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (returns(3), "texts as keys, got the key 3"),
        (returns(3, "a"), "texts as keys, got the key 3"),
        (lambda key, x: {"y": "text"}, "got 'text' at 'y'"),
        (lambda key, x: {"y": None, "z": x}, "got None at 'y'"),
        (lambda key, x: {"y": key}, "random.key_data"),
    ],
)
def test_what_is_no_dict_of_arrays_is_refused(function, said, tmp_path, never):
    assert_refused(said, tmp_path, function, {"x": [1.0, 2.0]}, TypeError)


@pytest.mark.parametrize(
    ("function", "grid", "options", "said"),
    [
        # dims that are made up
        (returns("y", "y_0", shape=2), {"x": [1.0]}, {}, "'y' has the dim 'y_0'"),
        (lambda key, y_0: {"y": jnp.ones(2) * y_0}, {"y_0": [1.0]}, {}, "'y' has the dim 'y_0'"),
        (lambda key, y_0: {"y": jnp.ones(2) * y_0}, {"y_0": 1.0}, {}, "'y' has the dim 'y_0'"),
        (lambda key, y, a: {"y_0": jnp.ones(2), "y": y}, {"y": [1.0], "a": 1.0}, {}, "names that"),
        # dims that are given
        (returns("y", shape=2), {"x": [1.0]}, {"output_dims": {"y": ["x"]}}, "the dim 'x'"),
        (returns("y", shape=2), {"x": [1.0]}, {"output_dims": {"y": ["seed"]}}, "the dim 'seed'"),
        (returns("y", shape=2), {"x": [1.0]}, {"output_dims": {"y": ["finite"]}}, "'finite'"),
        (returns("y", shape=2), {"x": [1.0]}, {"output_dims": {"y": ["y"]}}, "the dim 'y'"),
        (returns("y", shape=2), {"x": [1.0]}, {"output_dims": {"y": ["a/b"]}}, "character '/'"),
        (returns("y", shape=2), {"x": [1.0]}, {"output_dims": {"y": [""]}}, "is empty"),
        (returns("y", shape=(2, 2)), {"x": [1.0]}, {"output_dims": {"y": ["k", "k"]}}, "twice"),
        (lambda key, x: {"y": jnp.ones(2), "z": jnp.ones(3)}, {"x": [1.0]},
         {"output_dims": {"y": ["k"], "z": ["k"]}}, "'k' has 2 values in output 'y' and 3 in 'z'"),
        (lambda key, x: {"y": jnp.ones(2), "z": jnp.ones(3)}, {"x": [1.0]},
         {"output_dims": {"z": ["y_0"]}}, "'y_0' has 2 values in output 'y' and 3 in 'z'"),
        (lambda key, a, b: {"y": jnp.ones(2)}, {("a", "b"): PAIRS},
         {"output_dims": {"y": ["a_b"]}}, "the dim 'a_b'"),
        (returns(*LETTERS), {"x": [1.0]}, {}, "Unicode takes the names"),
        # roles
        (returns("y"), {"x": [1.0]}, {"static": ["x"], "vectorized": ["x"]}, "both name 'x'"),
        (returns("y"), {"x": [1.0]}, {"vectorized": ["x", "x"]}, "vectorized must be distinct"),
        (returns("y"), {"x": [1.0]}, {"common_random_numbers": ["x", "x"]}, "must be distinct"),
        (returns("y"), {"x": [1.0]}, {"static": ["x", "x"]}, "static must be distinct"),
    ],
)  # fmt: skip
def test_outputs_and_dims_that_clash_are_refused(function, grid, options, said, tmp_path, never):
    assert_refused(said, tmp_path, function, grid, **options)


def test_names_that_do_not_clash_are_labels_as_they_are(tmp_path):
    """Right names of many kinds, and dims that two outputs share."""

    def function(key, a, b, µ, key_):
        shared = {"loss 1": a * jnp.ones(2), "top-5": b * jnp.ones(2)}
        return shared | {"κ²": µ * jnp.ones(3), "c": key_, "key": a, "point": b}

    grid = {("a", "b"): PAIRS, "μ": [5.0], "key_": [7.0, 8.0]}
    dims = {"loss 1": ["k"], "top-5": ["k"]}
    for store in (None, tmp_path / "x.zarr"):
        result = nm.sweep(function, grid, 2, store=store, output_dims=dims)
        assert result["loss 1"].dims == result["top-5"].dims == ("a_b", "μ", "key_", "seed", "k")
        assert result["κ²"].dims[-1] == "κ²_0"
        np.testing.assert_array_equal(result["top-5"].isel(a_b=1), 4.0)
        np.testing.assert_array_equal(result["c"].sel(key_=8.0), 8.0)
    assert set(xr.open_zarr(tmp_path / "x.zarr").data_vars) > {"loss 1", "top-5", "κ²", "c", "key"}


@pytest.mark.parametrize(
    ("names", "said"),
    [(("N", "n"), "ignores case"), (("Finite",), "ignores case"), (("X",), "ignores case"),
     (("a:b",), "character ':'"), (("a?",), r"character '\?'")],
)  # fmt: skip
def test_names_that_some_disks_cannot_have_are_for_memory(names, said, tmp_path, monkeypatch):
    result = nm.sweep(returns(*names), {"x": [1.0]}, 1)
    assert set(names) < set(result.data_vars)
    monkeypatch.setattr(Runner, "probe", None)
    for store in (tmp_path / "x.zarr", f"memory://{tmp_path}/x.zarr"):
        with pytest.raises(ValueError, match=said):
            nm.sweep(returns(*names), {"x": [1.0]}, 1, store=store)
    assert not (tmp_path / "x.zarr").exists()


class Listed(SweepFunction):
    vectorized_axes = "x"  # a text, not a list of them

    def __call__(self, key, *, x):
        return {"y": x}


def test_what_a_function_says_of_its_axes_is_checked_like_what_a_caller_says():
    with pytest.raises(TypeError, match="vectorized_axes of the function must be a list of names"):
        nm.sweep(Listed(), {"x": [1.0]}, 1)


def test_random_points_are_named_by_words():
    with pytest.raises(TypeError, match="named by a word"):
        random_points(2, **{"a/b": {"low": 0, "high": 1}})
    with pytest.raises(ValueError, match="'self' is reserved"):
        random_points(2, **{"self": 1.0})
