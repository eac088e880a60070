"""Rows of groups: units, sizes, precision and memory."""

import numpy as np
import pandas as pd
import pytest

from negmaml.advice import MetaRegressor, advise
from tests.advice.conftest import grouped_rows
from tests.calls.problem import KEY
from tests.internals import data as grouped
from tests.internals import group_rows, rowblocks


@pytest.mark.parametrize(("column", "factor"), [(0, 1e160), (0, 1e-170), (1, 1e-300), (1, 1e300)])
def test_units_of_any_size_are_standardised_and_else_refused(column, factor):
    x, y, groups = grouped_rows(groups=8, rows=8)
    scaled = [x * factor, y] if column == 0 else [x, y * factor]
    name = "xy"[column]
    options = dict(rates=[-0.5, 0.5], splits=10, key=KEY)
    with pytest.raises(ValueError, match=rf"{name} must have its largest number between 1e-45 and"):
        advise(*scaled, groups, **options)
    with pytest.raises(ValueError, match=rf"(?i){name} must have its largest number between"):
        MetaRegressor().fit(*scaled, groups)
    found, expected = (advise(*rows, groups, standardise=True, **options).loss
                       for rows in (scaled, (x, y)))  # fmt: skip
    assert found["pooled ridge"] == pytest.approx(expected["pooled ridge"], rel=1e-9)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("standardise", [False, True])
def test_large_data_in_single_precision_give_what_double_precision_gives(
    monkeypatch, order, standardise
):
    x, y, groups = grouped_rows(groups=6, rows=10, p=5)
    x = np.asarray(np.c_[x, np.full(60, 2.0), x[:, 0] + 100], np.float32, order=order)
    shuffled = np.random.default_rng(0).permutation(60)
    given = x[shuffled].copy(order=order), y[shuffled], groups[shuffled]
    small = group_rows(*given, standardise=standardise)
    for name, value in (("LARGE", 3), ("BLOCK_NUMBERS", 100)):
        monkeypatch.setattr(rowblocks, name, value)
    monkeypatch.setattr(grouped, "LARGE", 3)
    large = group_rows(*given, standardise=standardise)
    assert small.z.dtype == np.float64 and large.z.dtype == np.float32
    np.testing.assert_allclose(large.z, small.z, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(large.grams(), small.grams(), rtol=1e-5, atol=1e-3)
    assert large.rate_unit == pytest.approx(small.rate_unit, rel=1e-5)
    assert large.mean_square == pytest.approx(np.mean(small.x[:, 1:] ** 2), rel=1e-5)
    assert large.notes == small.notes and "rank 5" in small.notes[1]
    counts = np.array([10, 9, 10, 10, 10, 10])
    smaller = grouped.drop_small_groups(
        group_rows(given[0][:-1], given[1][:-1], given[2][:-1], standardise=standardise), 5, 5, 5
    )
    dropped = given[2][-1]
    keep = small.labels != dropped
    assert smaller.labels.tolist() == small.labels[keep].tolist()
    assert smaller.counts.tolist() == counts[[0, 2, 3, 4, 5]].tolist()
    if not standardise:
        kept_rows = np.repeat(keep, small.counts)
        np.testing.assert_allclose(smaller.z, small.z[kept_rows], rtol=1e-6, atol=1e-5)


def test_as_many_groups_as_fit_the_memory_are_drawn(monkeypatch):
    x, y, groups = grouped_rows(groups=20, rows=8)
    monkeypatch.setattr(grouped, "MAX_NUMBERS", 0)
    monkeypatch.setattr(grouped, "MIN_STATISTICS", 9 * 36 * 12)
    advice = advise(x, y, groups, rates=[-0.5], splits=10, key=KEY)
    assert advice.data.groups == 12
    assert any("12 of 20 groups drawn at random" in note for note in advice.notes)
    again = advise(x, y, groups, rates=[-0.5], splits=10, key=KEY)
    assert again.data.labels.tolist() == advice.data.labels.tolist()
    for label, rows in zip(
        advice.data.labels, np.split(advice.data.y, advice.data.starts[1:]), strict=True
    ):
        np.testing.assert_array_equal(rows[:, 0], y[groups == label])


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.ones((4, 2)) * 1j, "x must hold real numbers, got .* of dtype complex128"),
        (np.zeros((4, 2), "M8[D]"), "x must hold real numbers, got .* dates to days"),
        (np.array([[[1]], [2]] * 2, object), "x must hold numbers"),
    ],
)
def test_values_that_are_no_real_numbers_are_refused(x, message):
    with pytest.raises((TypeError, ValueError), match=message):
        group_rows(x, np.arange(4.0), [0, 0, 1, 1])


def test_frames_are_taken_by_position_unless_their_rows_are_in_another_order():
    x, y, groups = grouped_rows(groups=4, rows=3)
    frame = pd.DataFrame(x, index=np.arange(12) + 100)
    np.testing.assert_array_equal(group_rows(frame, pd.Series(y), groups).y[:, 0], y)
    named = pd.Series(groups, index=frame.index)
    with pytest.raises(ValueError, match=r"x and groups must .* write groups.loc\[x.index\]"):
        group_rows(frame, y, named.sample(frac=1, random_state=0))
