"""Choices of rates, and intervals, for given losses."""

import numpy as np
import pytest

from tests.internals import (
    CHOOSE,
    REPORT,
    CVLosses,
    RateGrid,
    Splits,
    best_adapt_rate,
    best_choices,
    best_rate_interval,
    bootstrap_error,
    loss_at,
    losses_of,
    nested_losses,
    t_quantile,
    with_interval,
)

RATES, RIDGES = np.array([-0.5, 0.0, 0.4, 0.9]), np.array([0.0, 1.0, 3.0])
ADAPT = np.array([-0.2, 0.1, 0.5])


def quadratics(*shape, seed=0):
    """Coefficients (..., 3, R, L) of squares: c0 c2 > c1^2, each of them above 0."""
    random = np.random.default_rng(seed)
    c1, c2 = random.uniform(0.2, 1.0, (2, *shape))
    c0 = c1**2 / c2 + random.uniform(0.0, 0.5, shape)
    return np.stack([c0, c1, c2], -3)


def by_hand(c, adapt):
    """Half the mean square of e0 - adapt e1, whose moments are c."""
    return 0.5 * c[0] - adapt * c[1] + 0.5 * adapt * adapt * c[2]


def test_the_best_adaptation_rate_is_the_least_of_each_quadratic():
    meta = quadratics(4, 3)
    adapt, loss = best_adapt_rate(meta, RateGrid(RATES, RIDGES, None))
    np.testing.assert_allclose(loss, by_hand(meta, adapt))
    for step in (-1e-3, 1e-3):
        assert np.all(by_hand(meta, adapt + step) > loss)
    adapt, loss = best_adapt_rate(meta, RateGrid(RATES, RIDGES, ADAPT))
    every = np.stack([by_hand(meta, a) for a in ADAPT])
    np.testing.assert_allclose(loss, every.min(0))
    np.testing.assert_array_equal(adapt, ADAPT[every.argmin(0)])
    meta[1:] = 0
    np.testing.assert_array_equal(best_adapt_rate(meta, RateGrid(RATES, RIDGES, None))[0], 0)


@pytest.mark.parametrize("adapt", [None, ADAPT], ids=["any rate", "rates of a grid"])
@pytest.mark.parametrize("seed", range(8))
def test_every_family_chooses_what_is_best_among_its_own(seed, adapt):
    meta, pooled = quadratics(4, 3, seed=seed), quadratics(1, 3, seed=seed + 10)
    pooled[0] = 1 + pooled[0, :, ::-1]
    grid = RateGrid(RATES, RIDGES, adapt)
    chosen = best_choices(meta, pooled, grid)
    losses = {name: float(value) for name, value in losses_of(chosen, meta, pooled).items()}
    any_rate, at_pooled = best_adapt_rate(meta, grid)[1], best_adapt_rate(pooled, grid)[1]
    same = np.stack([by_hand(meta[:, i], RATES[i]) for i in (2, 3)])
    expected = {
        "advised": any_rate.min(),
        "zero inner rate": any_rate[1].min(),
        "shared rate": same.min(),
        "joint training": at_pooled.min(),
        "pooled ridge": pooled[0].min() / 2,
    }
    assert losses == pytest.approx(expected)
    assert chosen["shared rate"].adapt == RATES[chosen["shared rate"].rate] > 0
    assert chosen["pooled ridge"].adapt == 0
    for name in ("advised", "zero inner rate"):
        rate, ridge, own = chosen[name]
        assert loss_at(meta, rate, ridge, own) == pytest.approx(by_hand(meta[:, rate, ridge], own))


def test_a_loss_is_reported_by_groups_that_did_not_choose():
    """Two folds of two splits: each chooses by its own means, and reports others."""
    meta, pooled = quadratics(4, 3, 4, 3), quadratics(4, 3, 1, 3, seed=1)
    single = np.random.default_rng(2).uniform(1, 2, (4, 3, 3))
    measured = CVLosses(meta, pooled, {"single": single, "fixed": single[..., 0]})
    splits = Splits(None, None, None, np.array([0, 1, 0, 1]))
    grid = RateGrid(RATES, RIDGES, None)
    found = nested_losses(measured, splits, grid)
    expected: dict[str, list[float]] = {name: [] for name in found}
    for mine in ([0, 2], [1, 3]):
        of_fold, of_pooled = meta[mine].mean(0), pooled[mine].mean(0)
        chosen = best_choices(of_fold[CHOOSE], of_pooled[CHOOSE], grid)
        for name, value in losses_of(chosen, of_fold[REPORT], of_pooled[REPORT]).items():
            expected[name].append(float(value))
        ridge = single[mine].mean(0)[CHOOSE].argmin()
        expected["single"].append(single[mine].mean(0)[REPORT, ridge])
        expected["fixed"].append(single[mine].mean(0)[REPORT, 0])
    assert found == pytest.approx({name: np.mean(values) for name, values in expected.items()})


def test_the_error_of_a_mean_has_the_part_of_groups_and_that_of_splits():
    random = np.random.default_rng(3)
    of_groups, of_splits = 0.5, 2.0
    replicates = of_groups * random.normal(size=(20_000, 1)) + of_splits * random.normal(
        size=(20_000, 5)
    )
    for splits in (5, 100):
        expected = (of_groups**2 + of_splits**2 / splits) ** 0.5
        assert bootstrap_error(replicates, splits) == pytest.approx(expected, rel=0.05)
    assert bootstrap_error(of_splits * random.normal(size=(500, 5)), 10**9) < 0.2


def test_the_interval_of_the_best_rate_ends_where_half_the_quantile_is_reached():
    rates, groups, best = np.linspace(-1, 1, 41), 12, 0.2
    away = abs(rates - best)
    reach = t_quantile(groups) / 2
    for slope in (4.0, 9.0):  # of the excess over its error
        low, high = best_rate_interval(rates, 2 * slope * away**2, 2 * away, groups)
        expected = (best - reach / slope, best + reach / slope)
        np.testing.assert_allclose((low, high), expected, rtol=1e-9)
    wide = best_rate_interval(rates, away**2, 10 * away, groups)
    assert wide == (-1.0, 1.0)  # the ends of the grid


def test_the_interval_of_a_gain_is_that_of_student():
    gain = with_interval(1.0, 0.1, 4.0, 11)
    reach = 2.2281388519649385 * 0.1  # of Student's t with 10 degrees of freedom, two-sided 95%
    np.testing.assert_allclose((gain.low, gain.high), (1 - reach, 1 + reach), rtol=1e-9)
    assert (gain.value, gain.error, gain.relative) == (1.0, 0.1, 0.25)


@pytest.mark.parametrize(
    ("value", "significant", "better"),
    [(0.3, True, True), (0.1, False, False), (-0.3, True, False)],
)
def test_a_gain_is_significant_where_its_interval_excludes_zero(value, significant, better):
    gain = with_interval(value, 0.1, 1.0, 11)
    assert (gain.significant, gain.significantly_better) == (significant, better)


def test_intervals_of_a_gain_hold_the_truth_as_often_as_stated():
    random = np.random.default_rng(0)
    samples = random.normal(0.2, 1.0, size=(4000, 6))
    gains = [with_interval(s.mean(), s.std(ddof=1) / 6**0.5, 1.0, 6) for s in samples]
    held = np.mean([g.low < 0.2 < g.high for g in gains])
    assert held == pytest.approx(0.95, abs=0.015)
