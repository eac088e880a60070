"""Values of axes, seeds and dtypes: each gives a right result or an error before computing."""

import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import negmaml as nm
from negmaml.sweeps import StoreError, merge, random_points
from tests.helpers import mostly_slow
from tests.internals import Runner, parse, parse_grid, parse_seeds, spec


def scaled(key, x):
    return {"y": x * jax.random.normal(key)}


@pytest.fixture
def never(monkeypatch):
    """Nothing is compiled or computed."""
    monkeypatch.setattr(Runner, "compute", None)
    monkeypatch.setattr(Runner, "probe", None)


NEXT = float(np.nextafter(np.float32(1), np.float32(2)))  # the number after 1 in float32


@pytest.mark.parametrize(
    ("values", "options", "said"),
    [
        ([1.0, 1.0 + 1e-9], {}, r"x holds 1\.0 and 1\.000000001, which are one in float32"),
        ([0.1 + 0.2, 0.3], {}, "which are one in float32"),
        ([1.0, 1.0 + 1e-9], {"vectorized": ["x"]}, "which are one in float32"),
        ([16777216.0, 16777217.0], {}, "which are one in float32"),
        ([2**24 + 1, 0.5], {}, "integer 16777217, which float32 rounds to 16777216"),
        ([2**24 + 1], {"static": []}, "integer 16777217, which float32 rounds to 16777216"),
        (-(2**24) - 1, {"static": []}, "integer -16777217, which float32 rounds to -16777216"),
        ([0.0, 1e-50], {}, r"1e-50, which is 0 in float32, whose smallest number is 1\.2e-38"),
        (-1e-40, {}, "-1e-40, which is 0 in float32"),
        ([2**31], {}, "beyond int32"),
        ([-(2**31) - 1], {}, "beyond int32"),
        ([1e39], {}, "beyond float32"),
        (Fraction(10**400), {}, "any finite number"),
        (Fraction(-(10**400)), {}, "holds -inf"),
        ([np.nan], {}, "any finite number"),
        (np.ma.masked_array([1.0, 2.0], [False, True]), {}, "holds a masked value"),
        ([0.0, -0.0], {}, "got -0.0 twice"),
        ([0.0, -0.0], {"static": ["x"]}, "got -0.0 twice"),
        ([1, 1.0], {}, "got 1.0 twice"),
        ([1, True], {}, "got True twice"),
        (["a", "a\0"], {}, "no text of Unicode"),
        (["a\ud800"], {}, "no text of Unicode"),
        (range(10**20), {}, "at most 10,000,000 values"),
        (range(10**12), {}, "at most 10,000,000 values, got 1,000,000,000,000"),
    ],
)
def test_numbers_that_would_become_others_are_refused(values, options, said, never, tmp_path):
    for store in (None, tmp_path / "x.zarr"):
        with pytest.raises(ValueError, match=said):
            nm.sweep(scaled, {"x": values}, 2, store=store, **options)
    assert not (tmp_path / "x.zarr").exists()


@pytest.mark.parametrize("values", [["1.0", 1.0], [True, 2], ["a", False], [False, 2.5]])
def test_a_static_axis_is_of_one_kind_as_its_labels_are(values, never):
    with pytest.raises(TypeError, match="and not a mixture"):
        nm.sweep(scaled, {"x": values}, 2, static=["x"])


@pytest.mark.parametrize("values", [{1.0, 2.0}, {1.0: 2.0}, b"ab", {1.0: 2.0}.keys()])
def test_values_without_an_order_are_no_axis(values, never):
    with pytest.raises(TypeError, match="'x' holds"):
        nm.sweep(scaled, {"x": values}, 2)


def test_numbers_that_float32_tells_apart_are_cells_of_their_own():
    values = [1.0, NEXT, 2.0**24, -(2.0**24), 0.1, -0.0, 1.2e-38, 3e38]
    found = nm.sweep(lambda key, x: {"y": x}, {"x": values}, 1)["y"].values[:, 0]
    np.testing.assert_array_equal(found, np.array(values, np.float32))
    assert len(set(found)) == len(values)
    pairs = [(1.0, 3.0), (1.0 + 1e-9, 4.0)]  # apart by their second names
    assert parse_grid({("a", "b"): pairs}, 1).shape == (2, 1)


def test_float64_tells_more_apart(x64):
    values = [1.0, 1.0 + 1e-9, 1e-50, 2**24 + 1, 1e300, 0.3, 0.1 + 0.2]
    found = nm.sweep(lambda key, x: {"y": x}, {"x": values}, 1)["y"].values[:, 0]
    np.testing.assert_array_equal(found, np.array(values))
    with pytest.raises(ValueError, match="which float64 rounds to 9007199254740992"):
        parse_grid({"x": [2**53 + 1, 0.5]}, 1)


def test_one_zero_whatever_its_sign_for_static_axes_too():
    one, other = (parse_grid({"x": [zero, 1.5]}, 1, static=["x"]) for zero in (0.0, -0.0))
    assert repr(one.axes) == repr(other.axes)


def test_an_extension_by_a_value_that_is_there_in_float32_is_refused(tmp_path):
    paths = [tmp_path / name for name in ("a.zarr", "b.zarr")]
    for path, value in zip(paths, (0.3, 0.1 + 0.2), strict=True):
        nm.sweep(scaled, {"x": [value, 1.0]}, 2, store=path)
    with pytest.raises(StoreError, match=r"0\.3 and 0\.30000000000000004, which are one"):
        nm.sweep(scaled, {"x": [0.1 + 0.2]}, 2, store=paths[0], extend=True)
    assert xr.open_zarr(paths[0]).sizes["x"] == 2
    with pytest.raises(StoreError, match="which are one in float32"):
        merge(paths, tmp_path / "m.zarr")
    assert not (tmp_path / "m.zarr").exists()


def test_random_points_are_apart_in_float32(monkeypatch):
    draws = itertools.cycle([0.5, 0.5 + 1e-10, 0.25])
    monkeypatch.setattr("negmaml.sweeps.points._draw", lambda *_: next(draws))
    assert random_points(2, a={"low": 0, "high": 1}) == [{"a": 0.5}, {"a": 0.25}]


@pytest.mark.parametrize(
    ("seeds", "said"),
    [
        (10**12, "at most 1,000,000,000, got 1,000,000,000,000"),
        (2**70, "at most 1,000,000,000"),
        (range(10**20), "at most 1,000,000,000"),
        (range(10**12), "at most 1,000,000,000, got 1,000,000,000,000"),
        (range(0), "seeds must be"),
        (range(3, -2, -1), "from 0 to 2"),
        (range(2**32, 2**32 + 2), "from 0 to 2"),
        (-1, "at least 1"),
        (-(10**12), "at least 1"),
        ([2**32], "from 0 to 2"),
        ([-1], "from 0 to 2"),
        (np.array([0.0]), r"from 0 to 2\^32 - 1, got \[0.0\]"),
        (np.array(2.0), "got 2.0"),
        (np.array([True]), "seeds must be"),
        (np.bool_(True), "seeds must be"),
        (np.array([[1, 2]]), "seeds must be"),
        ({3: 1}, "seeds must be"),
        (b"ab", "seeds must be"),
        ([1, 2, 1], "got 1 twice"),
        ([], "seeds must be"),
        (None, "seeds must be"),
        (3j, "seeds must be"),
    ],
)
def test_seeds_that_are_too_many_or_none_are_refused_at_once(seeds, said, never):
    with pytest.raises(ValueError, match=said) as refused:
        nm.sweep(scaled, {"x": [1.0]}, seeds)
    assert len(str(refused.value)) < 200


def test_seeds_of_many_kinds_are_taken(monkeypatch):
    for seeds in (np.array([3, 1]), jnp.array([3, 1]), (s for s in (3, 1)), [np.int64(3), 1]):
        assert parse_seeds(seeds) == range(3, -1, -2)
    for seeds in (np.int64(2), np.array(2), jnp.array(2), range(2), [0, 1]):
        assert parse_seeds(seeds) == range(2)
    assert parse_seeds([2**32 - 1]) == range(2**32 - 1, 2**32)
    assert parse_seeds([0, 1, 3]) == (0, 1, 3)
    monkeypatch.setattr(parse, "MAX_LISTED", 5)
    with pytest.raises(ValueError, match=r"at most 5 \(1,000,000,000 in a range\), got 6 or more"):
        parse_seeds(itertools.count())


def test_no_other_count_is_beyond_all_bounds(tmp_path):
    (tmp_path / "spec.toml").write_text(
        'function = "linear"\nseeds = 1\n[grid]\nnu = { start = 0, stop = 1, num = 1000000000000 }'
    )
    calls = [
        lambda: random_points(10**12, a={"low": 0, "high": 1}),
        lambda: nm.sweep(scaled, {"x": 1.0}, 1, store=tmp_path / "x.zarr", worker=(1, 10**12)),
        lambda: spec.read(str(tmp_path / "spec.toml")),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"at most [\d,]+, got .*0,?000"):
            call()


def test_more_cells_than_flags_have_room_are_refused(never):
    with pytest.raises(ValueError, match="at most 1,000,000,000 cells, got x 1,001 x seed 1,000,0"):
        nm.sweep(scaled, {"x": np.arange(1001) / 2}, 10**6)


SMALL = ["float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "int4", "uint4", "int2", "uint2"]
DTYPES = [("bfloat16", "float32"), *((n, "float32") for n in SMALL[:3]),
          *((n, "uint8" if n[0] == "u" else "int8") for n in SMALL[3:]),
          *((n, n) for n in ("float16", "float32", "complex64", "bool", "int8"))]  # fmt: skip


@pytest.mark.parametrize(("dtype", "held"), mostly_slow(DTYPES, 0, 1, 4, 5, 10))
def test_outputs_of_every_dtype_are_stored_as_they_are(dtype, held, tmp_path):
    """Those that NumPy does not have are held in the least one that has all their values."""

    def function(key, x):
        return {"y": jnp.array([0, 1, x, -1 if dtype[0] in "fci" else 1]).astype(dtype)}

    values = np.array([1.0, 0.0])
    expected = np.stack([np.asarray(function(None, x)["y"]) for x in values])[:, None]
    for store in (None, tmp_path / "x.zarr"):
        result = nm.sweep(function, {"x": values}, 1, store=store)
        assert result["y"].dtype == held
        np.testing.assert_array_equal(result["y"], expected.astype(held))
        assert result["finite"].all()
    np.testing.assert_array_equal(xr.open_zarr(tmp_path / "x.zarr")["y"], result["y"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e5m2", "float8_e4m3fn"])
def test_what_is_not_finite_in_few_bits_is_flagged(dtype, tmp_path):
    def function(key, x):
        return {"y": (x / 0).astype(dtype)}

    result = nm.sweep(function, {"x": [0.0, 1.0]}, 1, store=tmp_path / "x.zarr")
    assert not result["finite"].any()
    assert np.isnan(result["y"][0, 0])


@pytest.mark.parametrize(
    ("value", "said"),
    [(lambda key: key, "key<.*random.key_data"), (lambda key: "text", "got 'text' at 'y'"),
     (lambda key: np.zeros(2, jax.dtypes.float0), "float0")],
)  # fmt: skip
def test_outputs_that_are_no_numbers_are_refused(value, said, never, tmp_path):
    for store in (None, tmp_path / "x.zarr"):
        with pytest.raises(TypeError, match=said):
            nm.sweep(lambda key, x: {"y": value(key)}, {"x": [1.0]}, 1, store=store)


def test_complex_outputs_are_summarised_by_their_size(tmp_path):
    from tests.internals import summary

    nm.sweep(lambda key, x: {"y": x * (3 + 4j)}, {"x": [1.0, 2.0]}, 2, store=tmp_path / "x.zarr")
    dataset = summary.load(str(tmp_path / "x.zarr"))
    assert dict(summary.rows(dataset))["y, modulus"] == "5 to 10"
    with pytest.raises(ValueError, match="y is complex"):
        summary.mean(dataset, "y", ["x"])
