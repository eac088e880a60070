"""Ranges stand for the tuples of their values, and take no memory for them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import negmaml as nm
from negmaml.sweeps import status
from tests.internals import description_of, progressions

INTEGERS = st.lists(st.integers(0, 12), min_size=1, max_size=8, unique=True)
RANGES = st.builds(
    lambda start, step, n: range(start, start + step * n, step),
    st.integers(20, 40), st.sampled_from([-3, -1, 1, 2, 3]), st.integers(1, 6),
)  # fmt: skip


@given(INTEGERS | RANGES, INTEGERS | RANGES)
def test_ranges_and_tuples_of_the_same_values_agree(old, new):
    as_ranges = progressions.compact(tuple(old)), progressions.compact(tuple(new))
    added = [value for value in new if value not in old]
    assert list(progressions.missing_from(*as_ranges)) == added
    assert list(progressions.joined(*as_ranges)) == [*old, *added]
    at = [list(old).index(value) if value in old else -1 for value in new]
    np.testing.assert_array_equal(progressions.positions(*as_ranges), at)
    everywhere = np.arange(len(old))
    np.testing.assert_array_equal(progressions.take(as_ranges[0], everywhere), list(old))
    for values in as_ranges:
        assert progressions.from_json(progressions.to_json(values)) == values


def test_huge_ranges_are_compared_without_listing_them():
    old, new = range(10**12), range(2 * 10**12)
    assert progressions.missing_from(new, old) == ()
    assert progressions.joined(old, new) == new
    assert progressions.positions(new, range(4, 10**12, 2)) == range(4, 10**12, 2)


@pytest.mark.parametrize("held", [{"start": 0}, {"start": 0, "stop": 1.0, "step": 1}])
def test_no_other_table_is_a_range(held):
    with pytest.raises((KeyError, ValueError)):
        progressions.from_json(held)


def function(key, x):
    return {"y": x}


def test_a_million_seeds_take_no_place_in_the_metadata(tmp_path):
    path = tmp_path / "x.zarr"
    nm.sweep(function, {"x": [1.0]}, 10**6, store=path)
    assert (path / "zarr.json").stat().st_size < 20_000
    assert len(list((path / "seed").rglob("*"))) < 6
    assert description_of(str(path)).manifest.grid.seeds == range(10**6)
    more = nm.sweep(function, {"x": [1.0]}, 10**6 + 1, store=path, extend=True)
    assert more.seed[-1] == 10**6 and more.attrs["seeds"] == "0 to 1000000"
    assert status(path).cells_done == 10**6 + 1
