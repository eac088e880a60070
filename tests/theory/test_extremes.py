"""The theory at inputs of every size: never NaN, float32 as float64, optima no scan beats."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import negmaml as nm
from negmaml.rules import Schedule
from negmaml.theory import (
    best_adapt_rate,
    best_train_rate,
    standard_deviation,
    train_task_error,
    weight_error,
)
from negmaml.theory import (
    test_loss as loss_of,
)
from tests.helpers import mostly_slow
from tests.internals import canonicalize, isotropic_inputs, rule_moments

LARGEST = float(np.finfo(np.float32).max)
SMALL = nm.MixedLinearRegression(p=40, m=4, n_t=20, n_v=4, n_r=20, sigma=0.5, nu=1.0, omega0=0.2)
HUGE = nm.MixedLinearRegression(
    p=100_000, m=30, n_t=50, n_v=40, n_r=10_000, sigma=0.5, nu=1.0, omega0=0.1
)

rates = st.floats(-5, 5, width=32)
sizes = st.floats(0, 1e3, width=32)
rules = st.one_of(
    st.builds(nm.GradientDescent, rates, st.sampled_from((1, 3, 10))),
    st.builds(lambda *values: nm.GradientDescent(Schedule(values), 3), rates, rates, rates),
    st.builds(lambda rate, b: nm.Momentum(rate, b, 3), rates, st.floats(-1, 1, width=32)),
    st.builds(nm.GradientFlow, rates),
    st.builds(nm.Proximal, st.one_of(rates, st.floats(-1e3, 1e3, width=32))),
)


@st.composite
def problems(draw):
    """Sizes over the declared range, n_v m/p of 1e-3 to 1e3."""
    p, m, n_t, n_r = (draw(st.integers(0, 100)) / 100 for _ in range(4))
    p, m, n_t, n_r = (round(10 ** (top * x)) for top, x in ((5, p), (4, m), (4, n_t), (4, n_r)))
    n_v = max(1, round(p / m * 10 ** draw(st.floats(-3, 3))))
    sigma, nu, w0 = draw(sizes), draw(sizes), draw(sizes)
    return nm.MixedLinearRegression(p=p, m=m, n_t=n_t, n_v=n_v, n_r=n_r, sigma=sigma, nu=nu, w0=w0)


@given(problems(), rules, rules, st.sampled_from((0.0, 1e-3, 1.0, 1e3)))
def test_nothing_is_nan(problem, train, adapt, ridge):
    with jax.enable_x64(True):
        options = {"meta_ridge": ridge}
        values = (
            loss_of(problem, train, adapt, **options),
            weight_error(problem, train, **options),
            train_task_error(problem, train, **options),
            *standard_deviation(problem, train, adapt, **options),
        )
    assert not np.isnan(values).any()
    assert min(map(float, values)) >= 0


@given(problems(), rules, st.sampled_from((0.0, 1.0, 1e3)))
def test_single_precision_is_within_one_per_cent(problem, train, ridge):
    found = []
    for dtype in (np.float64, np.float32):
        inputs, (rule,) = isotropic_inputs(problem, (train,), ridge, "auto")
        inputs, rule = canonicalize(inputs, dtype), canonicalize(rule, dtype)
        with np.errstate(all="ignore"):
            found.append(rule_moments(inputs, rule).weight_error)
    double, single = found
    assert single.dtype == np.float32
    if double < LARGEST:
        assert float(single) == pytest.approx(float(double), rel=0.01, abs=1e-37)


def test_flows_uphill_and_down_are_finite_however_large_the_spectrum(x64):
    times = np.array([-5.0, -1.0, 1.0, 5.0])
    assert np.isfinite(weight_error(HUGE, nm.GradientFlow(times))).all()
    assert np.isfinite(weight_error(HUGE, nm.GradientDescent(times, 10))).all()


@pytest.mark.slow
@pytest.mark.parametrize("family", mostly_slow((nm.GradientDescent, nm.GradientFlow), 1))
def test_traced_single_precision_has_values_and_derivatives(family):
    def value(rate, sigma):
        problem = dataclasses.replace(HUGE, sigma=sigma)
        return weight_error(problem, family(rate), meta_ridge=1.0)

    rates = jnp.array([-5.0, -1.0, 0.0, 1.0, 5.0])
    found, slopes = jax.vmap(jax.value_and_grad(value, (0, 1)), (0, None))(rates, 0.0)
    expected = [float(value(float(rate), 0.0)) for rate in rates]
    np.testing.assert_allclose(found, expected, rtol=0.01)
    assert all(np.isfinite(slope).all() for slope in slopes)


def test_where_means_do_not_exist_they_are_infinite_and_else_finite(x64):
    step = nm.GradientDescent(0.1)
    flow = nm.GradientFlow(SMALL.n_r * np.array([-0.26, -0.25, -0.24, 0.0]))
    infinite = np.isinf(loss_of(SMALL, step, flow))
    np.testing.assert_array_equal(infinite, [True, True, False, False])
    proximal = nm.Proximal(np.array([-30.0, -1.0, 0.0, 1.0]))
    infinite = np.isinf(loss_of(SMALL, step, proximal))
    np.testing.assert_array_equal(infinite, [False, True, False, False])
    square = dataclasses.replace(SMALL, m=10)
    assert np.isinf(weight_error(square, step))
    exact = dataclasses.replace(square, sigma=0.0, nu=0.0)
    assert float(weight_error(exact, step)) == pytest.approx(0, abs=1e-12)


def test_with_filters_that_vanish_meta_training_stays_where_it_starts(x64):
    problem = dataclasses.replace(SMALL, n_t=60)
    expected = float(problem.offset_squared)
    assert float(weight_error(problem, nm.Proximal(0.0))) == pytest.approx(expected, rel=1e-9)


slow = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize("n_t", (20, 60))
@pytest.mark.parametrize("quantity", (weight_error, pytest.param(train_task_error, marks=slow)))
def test_a_strength_of_zero_has_the_slope_that_differences_show(n_t, quantity, x64):
    def value(strength):
        return quantity(dataclasses.replace(SMALL, n_t=n_t), nm.Proximal(strength), meta_ridge=0.7)

    step = 1e-5
    sides = [(float(value(s)) - float(value(0.0))) / s for s in (-step, step)]
    found = float(jax.grad(value)(0.0))
    largest = max(map(abs, sides))  # opposite ones where the slope is zero
    assert found == pytest.approx(np.mean(sides), abs=2e-3 * largest)


@pytest.mark.slow
def test_where_a_strength_of_zero_is_a_jump_its_slope_is_a_number(x64):
    def value(strength):
        return weight_error(dataclasses.replace(SMALL, n_t=60), nm.Proximal(strength))

    assert float(value(1e-6)) > 1e6 * float(value(0.0))
    assert np.isfinite(jax.grad(value)(0.0))


@pytest.mark.slow
def test_infinite_means_have_no_slope(x64):
    square = dataclasses.replace(SMALL, m=10)
    assert float(jax.grad(lambda rate: weight_error(square, nm.GradientDescent(rate)))(0.1)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("form", (jax.jacrev, pytest.param(jax.jacfwd, marks=slow)))
def test_the_slopes_of_a_batch_of_rules_are_those_of_each(form, x64):
    def value(rates, sigma):
        return weight_error(dataclasses.replace(SMALL, sigma=sigma), nm.GradientDescent(rates))

    rates, step = np.array([[-0.3, 0.2], [0.9, 0.0]]), 1e-6
    by_rate, by_sigma = form(value, (0, 1))(jnp.asarray(rates), 0.5)
    each = (value(rates + step, 0.5) - value(rates - step, 0.5)) / (2 * step)
    np.testing.assert_allclose(by_rate.reshape(4, 4), np.diag(each.ravel()), rtol=1e-6, atol=1e-8)
    noise = (value(rates, 0.5 + step) - value(rates, 0.5 - step)) / (2 * step)
    np.testing.assert_allclose(by_sigma, noise, rtol=1e-6)


@pytest.mark.slow
def test_large_losses_have_derivatives_in_single_precision():
    def loss(sigma, time):
        problem = dataclasses.replace(HUGE, sigma=sigma)
        return loss_of(problem, nm.GradientDescent(0.3), nm.GradientFlow(time))

    found, slope = jax.value_and_grad(loss)(0.5, -2.2)
    assert 1e30 < found < 1e37
    with jax.enable_x64(True):  # on the host
        expected = (loss(0.501, -2.2) - loss(0.499, -2.2)) / 0.002
    assert float(slope) == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("rows", (30, 3000))
def test_scatter_with_many_rows_is_as_good_in_single_precision(rows):
    # Only (p/N)^2 of the covariance of the losses remains.
    problem = nm.MixedLinearRegression(
        p=9000, m=300, n_t=3000, n_v=rows, n_r=1, sigma=0.01, nu=0.01
    )
    rule, still = nm.GradientDescent(-1.8), nm.GradientDescent(0.0)
    found = jax.jit(lambda rule: standard_deviation(problem, rule, still).weight_error)(rule)
    assert found.dtype == np.float32
    expected = standard_deviation(problem, rule, still).weight_error  # on the host, in double
    np.testing.assert_allclose(found, expected, rtol=1e-3)


@pytest.mark.parametrize(
    "rule",
    (
        nm.GradientDescent(-0.7),
        nm.GradientDescent(1.3, 7),
        nm.GradientDescent(Schedule([0.3, -0.2]), 3),
        nm.Momentum(0.4, -0.6, 4, nesterov=True),
        nm.GradientFlow(np.array([-2.0, 0.0, 3.0])),
        nm.Proximal(np.array([-1.3, 0.2])),
    ),
)
def test_filters_with_sizes_apart_are_the_filters(rule, x64):
    x = np.array([0.0, 0.3, 1.0, 20.0])
    found = rule.spectral().log_form(x)
    scale = 0.0 if found.scale is None else found.scale
    np.testing.assert_allclose(found.sign * np.exp(found.log_init), rule.init_filter(x), rtol=1e-12)
    np.testing.assert_allclose(found.label * np.exp(scale), rule.label_filter(x), rtol=1e-12)


def test_steps_beyond_every_number_have_filters(x64):
    rates = np.array([-5.0, 4.0])
    schedule = nm.GradientDescent(Schedule(np.tile(rates, (300, 1))), 300)
    for rule in (nm.GradientDescent(rates, 300), schedule):
        found = rule.spectral().log_form(np.array([1e5]))
        expected = 300 * np.log(np.abs(1 - rates * 1e5))
        np.testing.assert_allclose(found.log_init[:, 0], expected, rtol=1e-12)
        np.testing.assert_allclose(
            np.log(np.abs(found.label[:, 0])) + found.scale[:, 0], expected - np.log(1e5), rtol=1e-9
        )


FAMILIES = (
    nm.GradientDescent(0.0), nm.GradientDescent(0.0, 3), nm.GradientFlow(0.0), nm.Proximal(1.0)
)  # fmt: skip


def random_problem(rng):
    """(problem, ridge) of sizes to 10^4, variances over nine decades, some of them zero."""
    p, m, n_t, n_r = np.exp(rng.uniform(0, np.log([1e4, 1e3, 1e3, 1e3]))).round().astype(int)
    n_v = max(1, round(p / m * 100 ** rng.uniform(-1, 1)))
    sigma, nu, w0 = np.exp(rng.uniform(-5, 5, 3)) * (rng.random(3) > 0.15)
    ridge = np.exp(rng.uniform(-7, 7)) if rng.random() < 0.5 or n_v * m == p else 0.0
    names = dict(zip(("p", "m", "n_t", "n_r"), map(int, (p, m, n_t, n_r)), strict=True))
    problem = nm.MixedLinearRegression(
        **names, n_v=n_v, sigma=float(sigma), nu=float(nu), w0=float(w0)
    )
    return problem, float(ridge)


def scanned(rule, n, p):
    """2001 parameters of both signs over the range of the search."""
    smallest, largest = rule.search_range((1 + (p / n) ** 0.5) ** 2)
    positive = np.geomspace(smallest, largest, 1000)
    return rule.with_tunable(np.concatenate([-positive[::-1], [0.0], positive]))


def beaten(scan):
    """Return the largest value allowed for the best: 0.1% more, or the smallest number."""
    return 1.001 * float(np.min(scan)) + float(np.finfo(scan.dtype).tiny)


@pytest.mark.filterwarnings("ignore:best_:negmaml.ConvergenceWarning")  # some fall to the end
@pytest.mark.parametrize("double", (True, False))
@pytest.mark.parametrize("count", (8, pytest.param(200, marks=pytest.mark.slow)))
def test_no_scan_beats_the_best_rates(count, double):
    rng, still = np.random.default_rng(7), nm.GradientDescent(0.0)
    with jax.enable_x64(double):
        for i in range(count):
            (problem, ridge), rule = random_problem(rng), FAMILIES[i % len(FAMILIES)]
            options = {"meta_ridge": ridge}
            best = rule.with_tunable(best_train_rate(problem, rule, **options))
            scan = loss_of(problem, scanned(rule, problem.n_t, problem.p), still, **options)
            assert float(loss_of(problem, best, still, **options)) <= beaten(scan)
            step, rule = nm.GradientDescent(-0.1), FAMILIES[i // 2 % len(FAMILIES)]
            best = rule.with_tunable(best_adapt_rate(problem, step, rule, **options))
            scan = loss_of(problem, step, scanned(rule, problem.n_r, problem.p), **options)
            assert float(loss_of(problem, step, best, **options)) <= beaten(scan)
