"""Advice on data of known truth: it finds true gains, and claims no others."""

import dataclasses

import jax
import numpy as np
import pytest

import negmaml as nm
from tests.advice.conftest import grouped_rows
from tests.internals import best_rate_interval, bootstrap_error, predicted

SIZES = dict(n_t=8, n_v=8, n_r=8)
GRID = np.sort(np.append(np.linspace(-1.2, 0.8, 21), 0.0))


def plain(seed, **options):
    """Advice in raw units, without intercept and ridge: the setting of the theory."""
    defaults = dict(
        rates=GRID, meta_ridges=[0.0], intercept=False, unit="raw", key=jax.random.key(seed)
    )
    problem = {k: options.pop(k) for k in ("groups", "sigma", "nu", "p") if k in options}
    return nm.advise(*grouped_rows(seed, **problem), **SIZES, **defaults | options)


def truth(m, p=4, sigma=1.0, nu=1.0):
    """The loss over GRID at the best adaptation rate, and that rate, by the theory."""
    with jax.enable_x64(True):
        problem = nm.MixedLinearRegression(p=p, m=m, sigma=sigma, nu=nu, w0=1.0, **SIZES)
        distance = nm.simulate(
            jax.random.key(0), problem, nm.GradientDescent(GRID), nm.GradientDescent(0.0), runs=4000
        ).weight_error.mean(-1)
        distance = np.asarray(distance)
    rate = np.linspace(0, 1, 501)
    h = (1 - rate) ** 2 + rate**2 * (p + 1) / 8
    loss = sigma**2 / 2 * (1 + rate**2 * p / 8) + h / 2 * (nu**2 + distance[:, None])
    return loss.min(1), rate[loss.argmin(1)]


@pytest.fixture(scope="module")
def many():
    """Advice on 24 data sets of one problem, and their true loss and adaptation rate."""
    return [plain(seed, m=3, sigma=1.5, splits=30) for seed in range(24)], truth(3, sigma=1.5)


@pytest.mark.slow
def test_losses_and_adaptation_rates_are_those_of_the_theory(many):
    advices, (loss, adapt) = many
    for found, expected in (("loss", loss), ("adapt", adapt)):
        values = np.stack([getattr(a.curves, found)[:, 0] for a in advices])[:, ::4]
        error = values.std(0, ddof=1) / len(values) ** 0.5
        assert np.all(abs(values.mean(0) - expected[::4]) < 4 * error + 1e-3)


def test_stated_errors_are_the_scatter_over_data_sets(many):
    advices, _ = many
    for name, error in (("loss", "error"),):
        values = np.stack([getattr(a.curves, name)[:, 0] for a in advices])
        stated = np.stack([getattr(a.curves, error)[:, 0] for a in advices]).mean(0)
        ratio = stated / values.std(0, ddof=1)
        assert np.all((ratio > 0.65) & (ratio < 1.5))  # 24 data sets know it to 15%


def test_intervals_of_the_best_rate_hold_it(many):
    advices, (loss, _) = many
    best = GRID[np.argmin(loss)]
    intervals = np.array([a.train_rate_interval for a in advices])
    held = np.mean((intervals[:, 0] <= best) & (best <= intervals[:, 1]))
    assert held >= 0.8
    assert np.median(intervals[:, 1] - intervals[:, 0]) < 1.0
    assert np.mean(intervals[:, 1] < 0.3) > 0.5  # and they are informative


@pytest.mark.slow
@pytest.mark.parametrize(("m", "sigma"), [(4, 1.5), (15, 0.7)])
def test_coverage_over_many_data_sets(m, sigma):
    advices = [plain(seed, m=m, sigma=sigma) for seed in range(200)]
    loss, _ = truth(m, sigma=sigma)
    best = GRID[np.argmin(loss)]
    intervals = np.array([a.train_rate_interval for a in advices])
    held = np.mean((intervals[:, 0] <= best) & (best <= intervals[:, 1]))
    assert 0.88 <= held <= 1.0
    values = np.stack([a.curves.loss[:, 0] for a in advices])
    stated = np.stack([a.curves.error[:, 0] for a in advices])
    covered = np.mean(abs(values - loss) < 2.02 * stated, 0)
    assert np.all(covered > 0.88)


def test_a_true_gain_is_significant(many):
    advices, _ = many
    assert np.mean([a.significantly_better and a.train_rate < 0 for a in advices]) > 0.2
    assert np.mean([a.gain["pooled ridge"].significant for a in advices]) > 0.9


@pytest.mark.parametrize("sigma", [1.0, 3.0])
def test_no_gain_is_claimed_where_tasks_are_identical(sigma):
    """A zero rate ignores the support rows, so a gain over it is real; one over a regression on all
    rows is not. The second sigma is mostly noise."""
    advices = [plain(seed, nu=0.0, sigma=sigma, splits=20) for seed in range(12)]
    for name in ("pooled ridge", "joint training"):
        assert sum(a.compare("meta-learning", name).significantly_better for a in advices) <= 1
    assert np.all([abs(a.adapt_rate) < 0.15 for a in advices])
    assert np.all(
        [a.fitted_loss[a.recommended] > 0.98 * a.fitted_loss["pooled ridge"] for a in advices]
    )
    assert sum(a.recommended == "pooled ridge" for a in advices) >= 9


def test_permuted_labels_give_no_gain(rows):
    x, y, groups = rows
    shuffled = np.random.default_rng(1).permutation(groups)
    advice, real = (
        nm.advise(x, y, labels, splits=40, key=jax.random.key(0), **SIZES)
        for labels in (shuffled, groups)
    )
    gain = real.compare("meta-learning", "pooled ridge")
    assert gain.significantly_better and gain.relative > 0.1
    assert not advice.compare("meta-learning", "pooled ridge").significantly_better
    assert not advice.compare("meta-learning", "joint training").significantly_better
    nothing = "No method is better than a pooled ridge. Use a pooled ridge: "
    assert nothing in " ".join(advice.report().split())
    assert nothing not in real.report()


def test_the_linear_kernel_gives_what_the_features_give(rows):
    x, y, groups = (a[:240] for a in rows)
    common = dict(
        meta_ridges=[0.0, 3.0], rates=[-0.4, 0.5], key=jax.random.key(0), splits=10, **SIZES
    )
    linear = nm.advise(x, y, groups, **common)
    kernel = nm.advise(x, y, groups, kernel=lambda a, b: a @ b.T, **common)
    np.testing.assert_allclose(kernel.curves.loss, linear.curves.loss, rtol=1e-6)
    assert any("kernel" in note for note in kernel.notes)


def test_a_kernel_fits_a_curve_that_a_line_cannot():
    random = np.random.default_rng(0)
    x = np.round(random.uniform(-2, 2, size=(400, 1)), 1)  # 41 different inputs
    groups = np.repeat(np.arange(25), 16)
    y = np.sin(3 * x[:, 0] + random.normal(size=25)[groups]) + 0.1 * random.normal(size=400)

    def kernel(a, b):
        return jax.numpy.exp(-2 * (a[:, None, 0] - b[None, :, 0]) ** 2)

    curved = nm.advise(x, y, groups, kernel=kernel, splits=10, key=jax.random.key(0), **SIZES)
    assert (
        curved.loss["meta-learning"]
        < 0.8
        * nm.advise(x, y, groups, splits=10, key=jax.random.key(0), **SIZES).loss["meta-learning"]
    )


def test_units_standardising_and_keys(rows):
    x, y, groups = rows
    options = dict(splits=10, **SIZES)
    scaled = nm.advise(10 * x, y, groups, key=jax.random.key(0), **options)
    raw = nm.advise(10 * x, y, groups, unit="raw", key=jax.random.key(0), **options)
    assert raw.unit_size == 1.0
    assert raw.adapt_rate == pytest.approx(scaled.adapt_rate * scaled.unit_size)
    again = nm.advise(10 * x, y, groups, key=jax.random.key(0), **options)
    assert again.loss == scaled.loss
    assert nm.advise(10 * x, y, groups, key=jax.random.key(1), **options).loss != scaled.loss
    one, two = (
        nm.advise(a * x, b * y, groups, standardise=True, key=jax.random.key(0), **options)
        for a, b in ((1, 1), (100, 7))
    )
    assert one.loss["meta-learning"] == pytest.approx(two.loss["meta-learning"])
    assert "standardised" in one.report()


def test_ridges_are_in_units_of_the_rows_that_they_compete_with(rows):
    """Default ridges scale with squared features and the number of query rows. The ridge of one
    group is the same per row."""
    x, y, groups = (a[:480] for a in rows)
    options = dict(rates=[-0.3], splits=10, n_t=8, n_r=8, key=jax.random.key(0))

    def ridges(x, m, n_v):
        return nm.advise(x, y, groups, m=m, n_v=n_v, **options).grid.ridges

    unit = ridges(x, 4, 6)
    np.testing.assert_allclose(ridges(10 * x, 4, 6), 100 * unit)
    np.testing.assert_allclose(ridges(x, 8, 3), unit)
    np.testing.assert_allclose(ridges(x, 8, 6), 2 * unit)

    def ridge_loss(m, ridge):
        found = nm.advise(x, y, groups, m=m, n_v=6, meta_ridges=[ridge], **options)
        return found.loss["per-group ridge"]

    assert ridge_loss(8, 40.0) == pytest.approx(ridge_loss(4, 20.0), rel=1e-9)
    assert ridge_loss(8, 20.0) != pytest.approx(ridge_loss(4, 20.0), rel=1e-3)


def test_rows_may_come_in_any_order_and_labels_may_be_text(rows):
    x, y, groups = rows
    names = np.array([f"school {g:02d}" for g in groups])
    one = nm.advise(x, y, names, key=jax.random.key(0), splits=10, **SIZES)
    two = nm.advise(x, y, groups, key=jax.random.key(0), splits=10, **SIZES)
    assert one.loss == two.loss
    order = np.argsort(np.tile(np.arange(24), 40), kind="stable")  # groups interleaved
    mixed = nm.advise(x[order], y[order], groups[order], key=jax.random.key(0), splits=10, **SIZES)
    assert mixed.loss["meta-learning"] == pytest.approx(two.loss["meta-learning"])


def test_a_result_reports_saves_and_draws(rows, tmp_path):
    import xarray as xr

    advice = nm.advise(*rows, key=jax.random.key(0), n_r=5, splits=20)
    report = " ".join(advice.report().split())
    for word in ("Use a mixed model: ", "training rate", "95%", "not standardised", "n_r = 5"):
        assert word in report
    advice.table.to_netcdf(tmp_path / "a.nc", engine="scipy")
    table = xr.open_dataset(tmp_path / "a.nc", engine="scipy")
    assert table["loss"].dims == ("train_rate", "meta_ridge", "adapt_rate")
    assert table.attrs["adapt_rate"] == advice.adapt_rate
    best = table["best_loss"].min().item()
    assert best <= table["loss"].min().item() + 1e-9
    advice.plot().savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert "gain over zero inner rate" in repr(advice)


def test_theory_from_the_same_groups_predicts_what_was_measured(monkeypatch):
    # Other sizes compile other programs: the slow test has all changes.
    change = {"twice the training groups": {"m": 10}}
    monkeypatch.setattr(predicted, "_changes", lambda advice: change)
    advice = plain(1, groups=80, m=5, splits=50)
    theory = advice.theory
    assert theory.agrees
    assert np.all(abs(theory.gap) < 0.08)  # the measured loss is known to 3%
    assert abs(theory.adapt[advice.best.rate] - advice.adapt_rate) < 0.1
    assert theory.moments.noise_variance == pytest.approx(1.0, rel=0.15)
    more = plain(1, groups=80, m=10, splits=50)
    measured = 1 - more.curves.loss.min() / advice.curves.loss.min()
    assert theory.gains["twice the training groups"] == pytest.approx(measured, abs=0.03)
    assert "twice the training groups +" in " ".join(advice.report(theory=True).split())
    advice.plot(theory=True)
    monkeypatch.setattr(predicted, "_changes", lambda advice: {})  # the curve is enough from here
    for factor, agrees in ((1.02, True), (1.2, False), (0.8, False)):
        curves = advice.curves._replace(
            loss=factor * theory.loss[:, None], error=0 * advice.curves.error
        )
        assert dataclasses.replace(advice, curves=curves).theory.agrees is agrees


@pytest.mark.slow
def test_more_groups_and_more_rows_are_predicted_to_gain():
    gains = plain(1, groups=80, m=5, splits=50).theory.gains
    assert len(gains) == 4
    assert np.all(np.array(list(gains.values())) > 0)


def test_adaptation_rates_can_be_restricted(rows):
    advice = nm.advise(
        *rows, adapt_rates=[0.0, 0.5], rates=[-1, 1], key=jax.random.key(0), splits=10, **SIZES
    )
    assert advice.adapt_rate in (0.0, 0.5)
    assert advice.table.sizes["adapt_rate"] == 2
    np.testing.assert_allclose(advice.grid.rates / advice.unit_size, [-1, 0, 1])
    only = nm.advise(*rows, rates=[-1], key=jax.random.key(0), splits=10, **SIZES)
    assert "shared rate" not in only.gain


def test_small_groups_and_constant_features_are_left_out_with_a_note(rows):
    x, y, groups = rows
    x = np.c_[x, np.full(len(x), 3.0), x[:, 0]]
    small = np.r_[groups[:-20], np.repeat(np.arange(100, 105), 4)]
    advice = nm.advise(x, y, small, key=jax.random.key(0), splits=10, **SIZES)
    said = " ".join(advice.notes)
    assert "6 of 45" in said  # 5 groups of 4 rows, and the last one, which lost 20 of 24
    assert "constant features left out: x4" in said
    assert "collinear" in said


def test_more_features_than_rows_are_noted():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(36, 50)), random.normal(size=36)
    advice = nm.advise(
        x, y, np.repeat(np.arange(6), 6), rates=[-1, 1], splits=10, key=jax.random.key(0)
    )
    assert any("more features (50) than rows (36)" in note for note in advice.notes)
    assert np.all(np.isfinite(list(advice.loss.values())))


def test_standard_error_takes_the_noise_of_splits_off():
    random = np.random.default_rng(0)
    values = random.normal(size=(4000, 1)) + 3 * random.normal(size=(4000, 5))
    assert bootstrap_error(values, 10**9) == pytest.approx(1.0, rel=0.1)
    assert bootstrap_error(values, 9) == pytest.approx(2**0.5, rel=0.1)


def test_a_rate_that_is_zero_gains_nothing_over_zero(rows):
    advice = nm.advise(*rows, rates=[-9.0, 9.0], splits=10, key=jax.random.key(0), **SIZES)
    assert advice.best.rate == 1 and advice.train_rate == 0.0
    assert not advice.compare("meta-learning", "zero inner rate").significant


def test_interval_of_rates_is_where_the_excess_is_small():
    rates = np.linspace(-2, 2, 41)
    low, high = best_rate_interval(rates, (rates - 0.5) ** 2 / 2, 0.1 * abs(rates - 0.5), 1000)
    half = 0.1 * 1.96  # (a - a0)^2 / 2 = z/2 * 0.1 |a - a0|
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.02)
