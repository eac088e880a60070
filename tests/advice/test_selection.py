"""Choices of rates, and intervals, for given losses."""

import numpy as np
import pytest

from tests.internals import (
    ALL,
    CHOOSE,
    REPORT,
    CVLosses,
    Difference,
    Evidence,
    RateGrid,
    Splits,
    best_adapt_rate,
    best_choices,
    best_rate_interval,
    bootstrap_error,
    collect_evidence,
    decide,
    loss_at,
    losses_of,
    t_quantile,
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
    options = np.array([1.4, 1.1, 1.2])
    means = CVLosses(meta, pooled, {"mixed model": options})
    chosen = best_choices(means, grid)
    losses = {name: float(value) for name, value in losses_of(chosen, means).items()}
    any_rate, at_pooled = best_adapt_rate(meta, grid)[1], best_adapt_rate(pooled, grid)[1]
    same = np.stack([by_hand(meta[:, i], RATES[i]) for i in (2, 3)])
    expected = {
        "meta-learning": any_rate.min(),
        "zero inner rate": any_rate[1].min(),
        "shared rate": same.min(),
        "joint training": at_pooled.min(),
        "pooled ridge": pooled[0].min() / 2,
        "mixed model": 1.1,
    }
    assert losses == pytest.approx(expected)
    assert chosen["shared rate"].adapt == RATES[chosen["shared rate"].rate] > 0
    assert chosen["pooled ridge"].adapt == 0
    for name in ("meta-learning", "zero inner rate"):
        rate, ridge, own = chosen[name]
        assert loss_at(meta, rate, ridge, own) == pytest.approx(by_hand(meta[:, rate, ridge], own))


def folds_of_losses():
    """Losses of four splits in two folds, and of a bootstrap of 6 replicates of 5 splits."""
    random = np.random.default_rng(2)

    def losses(*lead, seed):
        others = {"per-group ridge": random.uniform(1, 2, (*lead, 3))}
        pooled = quadratics(*lead, 1, 3, seed=seed + 1)
        return CVLosses(quadratics(*lead, 4, 3, seed=seed), pooled, others)

    splits = Splits(None, np.zeros((4, 3, 9)), None, np.array([0, 1, 0, 1]))
    return losses(4, 3, seed=0), splits, losses(6, 5, seed=5)


def test_a_loss_is_reported_by_groups_that_did_not_choose():
    """Two folds of two splits: each chooses by its own means, and reports others."""
    measured, splits, replicated = folds_of_losses()
    grid = RateGrid(RATES, RIDGES, None)
    final = best_choices(measured.map(lambda a: a.mean(0)[ALL]), grid)
    found = collect_evidence(measured, splits, grid, final, replicated)
    for fold, mine in enumerate(([0, 2], [1, 3])):
        choose, report = (
            measured.map(lambda a, k=k, mine=mine: a[mine].mean(0)[k]) for k in (CHOOSE, REPORT)
        )
        for part, chosen in ((found.nested, best_choices(choose, grid)), (found.final, final)):
            for name, value in losses_of(chosen, report).items():
                assert part[name][fold] == pytest.approx(float(value))
    for name, values in losses_of(final, replicated).items():
        np.testing.assert_array_equal(found.replicates[name], values)
    assert (found.splits, found.groups) == (4, 9)


def test_the_error_of_a_difference_has_parts_of_groups_and_of_the_choice():
    measured, splits, replicated = folds_of_losses()
    grid = RateGrid(RATES, RIDGES, None)
    final = best_choices(measured.map(lambda a: a.mean(0)[ALL]), grid)
    found = collect_evidence(measured, splits, grid, final, replicated)
    one, two = "per-group ridge", "joint training"
    gain = found.difference(one, two)
    assert gain.value == pytest.approx(found.nested[two].mean() - found.nested[one].mean())
    moved = [found.nested[n] - found.final[n] for n in (two, one)]
    choice = moved[0] - moved[1]
    sampling = bootstrap_error(found.replicates[two] - found.replicates[one], 4)
    variance = sampling**2 + choice.var(ddof=1) / 2
    assert gain.error == pytest.approx(variance**0.5)
    reach = 1.1 * 2.306004135204166 * gain.error  # Student's t with 8 degrees of freedom
    assert (gain.low, gain.high) == pytest.approx((gain.value - reach, gain.value + reach))
    back = found.difference(two, one)
    assert (back.value, back.low) == pytest.approx((-gain.value, -gain.high))
    assert found.difference(one, one)[:4] == (0, 0, 0, 0)


def evidence_of(losses):
    """Evidence in which methods have these losses in every fold."""
    nested = {name: np.full(5, float(value)) for name, value in losses.items()}
    return Evidence(nested, nested, {}, 100, 40)


def test_the_simplest_method_within_half_a_percent_of_the_least_loss_is_recommended():
    losses = {"pooled ridge": 2.0, "per-group ridge": 1.5, "joint training": 1.0,
              "mixed model": 0.996, "meta-learning": 1.2, "shared rate": 0.5}  # fmt: skip
    assert decide(evidence_of(losses)) == "joint training"  # a shared rate is no candidate
    assert decide(evidence_of(losses | {"mixed model": 0.99})) == "mixed model"
    assert decide(evidence_of(losses | {"per-group ridge": 1.0})) == "per-group ridge"
    assert decide(evidence_of(losses | {"pooled ridge": 1.0})) == "pooled ridge"
    del losses["mixed model"], losses["joint training"]
    assert decide(evidence_of(losses)) == "meta-learning"


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


@pytest.mark.parametrize(
    ("value", "significant", "better"),
    [(0.3, True, True), (0.1, False, False), (-0.3, True, False)],
)
def test_a_gain_is_significant_where_its_interval_excludes_zero(value, significant, better):
    gain = Difference(value, 0.1, value - 0.22, value + 0.22, value)
    assert (gain.significant, gain.significantly_better) == (significant, better)
