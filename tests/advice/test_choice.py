"""Choices and intervals, on losses that are given."""

import numpy as np
import pytest

from negmaml.advice.choice import difference


def test_the_interval_of_a_gain_is_that_of_student():
    gain = difference(1.0, 0.1, 4.0, 11)
    reach = 2.2281388519649385 * 0.1  # of Student's t with 10 degrees of freedom, two-sided 95%
    np.testing.assert_allclose((gain.low, gain.high), (1 - reach, 1 + reach), rtol=1e-9)
    assert (gain.value, gain.error, gain.relative) == (1.0, 0.1, 0.25)


@pytest.mark.parametrize(
    ("value", "told", "positive"), [(0.3, True, True), (0.1, False, False), (-0.3, True, False)]
)
def test_a_gain_is_told_where_its_interval_leaves_out_zero(value, told, positive):
    gain = difference(value, 0.1, 1.0, 11)
    assert (gain.told, gain.positive) == (told, positive)


def test_intervals_of_a_gain_hold_the_truth_as_often_as_they_say():
    random = np.random.default_rng(0)
    samples = random.normal(0.2, 1.0, size=(4000, 6))
    gains = [difference(s.mean(), s.std(ddof=1) / 6**0.5, 1.0, 6) for s in samples]
    held = np.mean([g.low < 0.2 < g.high for g in gains])
    assert held == pytest.approx(0.95, abs=0.015)
