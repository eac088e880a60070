"""The proportional theory against exact means, the printed limit, simulation and derivatives."""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm
from negmaml.theory import train_task_error, weight_error
from tests.helpers import OVER, UNDER, mostly_slow
from tests.internals import (
    corrected_moments,
    first_order,
    isotropic_inputs,
    leading,
    logarithms,
    marchenko_pastur,
    model,
    normalized_moment,
    rescale,
    saddle_derivatives,
    solve_saddle,
    spectrum,
    training_set,
)
from tests.internals import isotropic_moments as moments_module
from tests.internals import saddle_point_solve as solve

NEAR = nm.MixedLinearRegression(p=30, m=4, n_t=20, n_v=6, n_r=20, sigma=0.5, nu=1.0, omega0=0.1)
ONE = nm.GradientDescent(0.0)


def resized(**sizes):
    return dataclasses.replace(NEAR, **sizes)


@pytest.mark.parametrize(("n", "p"), ((5, 30), (20, 20), (21, 20), (60, 20), (1, 40)))
def test_the_spectrum_has_the_exact_moments_to_second_order(n, p, x64):
    nodes, weights = marchenko_pastur(n, p, jnp.float64)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-14)
    limit = marchenko_pastur(1e6 * n, 1e6 * p, jnp.float64)
    for k in (1, 2, 3, 4):
        exact = normalized_moment(n, p, (k,))
        found, at_infinity = (float(w @ x**k) for x, w in ((nodes, weights), limit))
        assert abs(found / exact - 1) < 12 * k / (min(n, p) * p) or k <= 2
        assert abs(found - exact) <= 0.35 * abs(at_infinity - exact) + 1e-12


@pytest.mark.parametrize("rate", (-1.0, 0.4))
@pytest.mark.parametrize("n_t", (3, 4, 16, 17))
def test_the_measures_hand_over_seamlessly(n_t, rate, x64):
    problem = resized(n_t=n_t, n_v=3)
    for rule in (nm.GradientDescent(rate), nm.GradientFlow(rate)):
        exact, law, auto = (
            float(weight_error(problem, rule, measure=kind))
            for kind in ("exact", "marchenko-pastur", "auto")
        )
        assert auto in (exact, law)
        assert law == pytest.approx(exact, rel=0.01)


def test_an_unknown_measure_is_refused():
    with pytest.raises(ValueError, match=r"measure must be one of .*got 'gauss'"):
        weight_error(NEAR, ONE, measure="gauss")
    assert spectrum(4, 9, "auto", jnp.float32) is None


@pytest.mark.parametrize(("m", "n_v"), ((2, 5), (13, 2), (28, 1), (2, 40), (1, 33), (300, 1)))
def test_without_inner_step_the_noise_has_the_exact_inverse_wishart_mean(m, n_v, x64):
    problem = resized(m=m, n_v=n_v, nu=0.0, omega0=0.0)
    rows, p = problem.rows, problem.p
    exact = min(rows, p) / (abs(p - rows) - 1) * problem.sigma**2
    assert float(weight_error(problem, ONE)) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("rule", (nm.GradientDescent(-0.7), nm.GradientFlow(0.5), nm.Proximal(2.0)))
def test_the_start_contributes_its_exact_unreachable_part(rule, x64):
    problem = resized(sigma=0.0, nu=0.0)
    expected = (1 - problem.rows / problem.p) * problem.offset_squared
    np.testing.assert_allclose(weight_error(problem, rule), expected, rtol=1e-10)
    np.testing.assert_allclose(weight_error(resized(sigma=0.0, nu=0.0, n_v=9), rule), 0, atol=1e-14)


def training(problem, rule, ridge):
    """Return a training set by the Marchenko-Pastur law."""
    inputs, (rule,) = isotropic_inputs(problem, (rule,), ridge, "marchenko-pastur")
    return training_set(inputs, rule)


def printed_limit(problem, rule, ridge):
    """The resolvent form of the limit: distance and tau^2 from traces of P = (T + kappa)^-1."""
    x, w = marchenko_pastur(problem.n_t, problem.p, jnp.float64)
    one = training(problem, rule, ridge)
    k_s = float(np.exp(solve(one, True).log_kappa))
    p, m, N, D2 = problem.p, problem.m, problem.rows, float(problem.offset_squared)
    B, q = rule.init_filter(x) ** 2, rule.label_filter(x)
    V = problem.nu**2 / p * B + problem.sigma**2 * q**2 * x / problem.n_t
    g, dg = w @ (1 / (B + k_s)), -(w @ (B + k_s) ** -2)
    kappa, dkappa = m * k_s - (m - 1) / g, m + (m - 1) * dg / g**2
    P, PP = p * g, -p * dg / dkappa
    PW, PWP = m * p * (w @ (B * V / (B + k_s))), m * p * (w @ (B * V / (B + k_s) ** 2)) / dkappa
    TPP, TPTP = P - kappa * PP, p - 2 * kappa * P + kappa**2 * PP
    bias = (m * p * (w @ V) - PW - kappa * PWP) / m + kappa**2 * D2 * TPP / (p * m)
    tau2 = (problem.sigma**2 + bias) / (1 - TPTP / N)
    return PWP + tau2 / problem.n_v * TPP + kappa**2 * D2 * PP / p, tau2


@pytest.mark.parametrize("ridge", (0.0, 3.0))
@pytest.mark.parametrize("n_v", (3, 20))
def test_the_limit_is_the_one_written_with_resolvents(n_v, ridge, x64):
    problem, rule = resized(n_v=n_v), nm.GradientDescent(-0.6, 2)
    one = training(problem, rule, ridge)
    root = solve(one, True)
    units = rescale(one, root)
    found = leading(units, saddle_derivatives(units, root))
    expected = printed_limit(problem, rule, ridge)
    unit = np.exp(2 * units.log_amplitude)
    np.testing.assert_allclose(found[0] * unit, expected[0], rtol=1e-9)
    np.testing.assert_allclose(found[1] * unit * np.exp(root.log_kappa), expected[1], rtol=1e-9)


@pytest.mark.parametrize(
    ("problem", "rule", "ridge", "runs"),
    mostly_slow(
        (
            (OVER, nm.GradientDescent(jnp.array([-0.6, 0.0, 0.3])), 0.0, 2000),
            (NEAR, nm.GradientDescent(jnp.array([-0.5, 0.0, 0.4])), 0.0, 4000),
            (NEAR, nm.Proximal(jnp.array([0.5, 3.0])), 2.0, 2000),
            (resized(n_v=12), nm.GradientDescent(jnp.array([-0.4, 0.5]), 2), 0.0, 2000),
            (resized(n_v=12), nm.GradientFlow(jnp.array([-0.3, 0.7])), 5.0, 2000),
            (UNDER, nm.GradientDescent(jnp.array([-0.5, 0.2])), 0.0, 2000),
        ),
        1, 4,
    ),
)  # fmt: skip
def test_simulation_is_met_with_one_per_cent_to_spare(problem, rule, ridge, runs):
    adapt = nm.GradientDescent(0.1)
    result = nm.simulate(jax.random.key(5), problem, rule, adapt, runs=runs, meta_ridge=ridge)
    for values, predicted in (
        (result.weight_error, weight_error(problem, rule, meta_ridge=ridge)),
        (result.test_loss, nm.theory.test_loss(problem, rule, adapt, meta_ridge=ridge)),
    ):
        mean, error = values.mean(-1), values.std(-1, ddof=1) / runs**0.5
        assert (jnp.abs(mean - predicted) < 3.5 * error + 0.004 * mean).all()


def fresh_error(rng, problem, rate, ridge):
    """Mean squared error on fresh query rows of the training tasks of one run, exactly."""
    p, start = problem.p, np.full(problem.p, problem.omega0)
    filters, residuals, Phi, e = [], [], [], []
    for _ in range(problem.m):
        X = rng.standard_normal((problem.n_t, p))
        Z = rng.standard_normal((problem.n_v, p))
        b = np.eye(p) - rate * X.T @ X / problem.n_t
        noise = problem.sigma * rng.standard_normal(problem.n_t)
        w = rng.standard_normal(p) * problem.nu / p**0.5
        u = b @ w - rate * X.T @ noise / problem.n_t
        filters.append(b)
        residuals.append(u)
        Phi.append(Z @ b)
        e.append(Z @ u + problem.sigma * rng.standard_normal(problem.n_v))
    Phi, e = np.concatenate(Phi), np.concatenate(e)
    gram = Phi @ Phi.T + ridge * np.eye(len(Phi))
    omega = start + Phi.T @ np.linalg.solve(gram, e - Phi @ start)
    gaps = [np.sum((b @ omega - u) ** 2) for b, u in zip(filters, residuals, strict=True)]
    return problem.sigma**2 + np.mean(gaps)


@pytest.mark.parametrize(("rate", "ridge", "n_v"), ((0.3, 0.0, 4), (-0.5, 4.0, 6), (0.2, 2.0, 12)))
def test_the_task_error_is_that_of_fresh_query_rows(rate, ridge, n_v, x64):
    problem = resized(n_v=n_v)
    rng = np.random.default_rng(3)
    errors = np.array([fresh_error(rng, problem, rate, ridge) for _ in range(800)])
    predicted = float(train_task_error(problem, nm.GradientDescent(rate), meta_ridge=ridge))
    assert abs(errors.mean() - predicted) < 4 * errors.std() / 800**0.5 + 0.004 * predicted


def test_traced_first_derivatives_with_a_ridge_are_those_of_differences(x64):
    @jax.jit
    def value(x):
        rate, sigma, nu, start, ridge = x
        problem = resized(sigma=sigma, nu=nu, omega0=start)
        return weight_error(problem, nm.GradientDescent(rate), meta_ridge=ridge)

    x, step = jnp.array([-0.3, 0.5, 0.8, 0.1, 1.5]), 1e-4
    slope = jax.jit(lambda direction: jax.jvp(value, (x,), (direction,))[1])
    for direction in jnp.eye(5):
        ahead, behind = value(x + step * direction), value(x - step * direction)
        assert slope(direction) == pytest.approx(float(ahead - behind) / (2 * step), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("ridge", (0.0, 1.5))
def test_first_and_second_derivatives_are_those_of_differences(ridge, x64):
    def value(x):
        rate, sigma, nu, start, ridge = x
        problem = resized(sigma=sigma, nu=nu, omega0=start)
        return weight_error(problem, nm.GradientDescent(rate), meta_ridge=ridge)

    x, step = np.array([-0.3, 0.5, 0.8, 0.1, ridge]), 1e-4

    @jax.jit
    def along(x, direction):
        """The value, its gradient, and the derivative of the gradient in a direction."""
        (loss, gradient), (_, curvature) = jax.jvp(jax.value_and_grad(value), (x,), (direction,))
        return loss, gradient, curvature

    def at(x, i=0):
        return map(np.asarray, along(x, np.eye(5)[i]))

    for i in range(4 + (ridge > 0)):
        _, gradient, curvature = at(x, i)
        (up, slope_up, _), (down, slope_down, _) = (at(x + s * np.eye(5)[i]) for s in (step, -step))
        assert (up - down) / (2 * step) == pytest.approx(gradient[i], rel=1e-5)
        slopes = (slope_up - slope_down) / (2 * step)
        assert curvature == pytest.approx(slopes, rel=1e-4, abs=1e-6)
    if ridge == 0:  # from the right
        loss, gradient, _ = at(x)
        ahead, _, _ = at(x + 1e-6 * np.eye(5)[4])
        assert (ahead - loss) / 1e-6 == pytest.approx(gradient[4], rel=1e-4)


EXTREMES = [
    dict(p=1000, m=1, n_t=10, n_v=1),
    dict(p=1000, m=1000, n_t=10, n_v=1000),
    dict(p=100_000, m=30, n_t=1, n_v=100),
    dict(p=100_000, m=3, n_t=10_000, n_v=40_000),
    dict(p=1, m=1, n_t=1, n_v=5),
    dict(p=3, m=2, n_t=10_000, n_v=1500),
    dict(p=50, m=51, n_t=50, n_v=1),
]


@pytest.mark.parametrize("ridge", (0.0, 1e-6, 1e6))
@pytest.mark.parametrize("sizes", EXTREMES, ids=lambda sizes: "-".join(map(str, sizes.values())))
def test_every_size_and_rate_has_a_finite_positive_distance(sizes, ridge, x64):
    rates = np.array([-5.0, -1.0, -1e-4, 0.0, 0.3, 1.0, 5.0])
    double = weight_error(resized(**sizes), nm.GradientDescent(rates), meta_ridge=ridge)
    many = weight_error(resized(**sizes), nm.GradientDescent(rates, 3), meta_ridge=ridge)
    infinite = abs(resized(**sizes).rows - resized(**sizes).p) <= 2 or sizes["m"] == 1
    for values in (double, many):
        assert not jnp.isnan(values).any()
        assert (values > 0).all()
        assert jnp.isfinite(values).all() or (ridge == 0 and infinite)


@pytest.mark.parametrize("ridge", (0.0, 1.0))
def test_single_precision_loses_at_most_a_thousandth(ridge):
    rates = np.array([-5.0, -0.5, 0.0, 0.3, 2.0])
    for problem in (OVER, UNDER, NEAR, resized(p=10_000, m=50, n_v=300)):
        single = weight_error(
            problem, nm.GradientDescent(rates.astype(np.float32)), meta_ridge=ridge
        )
        with jax.enable_x64(True):
            double = weight_error(problem, nm.GradientDescent(rates), meta_ridge=ridge)
        assert (single.dtype, double.dtype) == (np.float32, np.float64)
        np.testing.assert_allclose(single, double, rtol=1e-3)


@pytest.mark.parametrize(("m", "n_v"), [(1, 40), (3, 20)])
@pytest.mark.parametrize("rule", [nm.GradientDescent(0.2), nm.GradientDescent(-0.2, 2)])
def test_with_rows_enough_the_start_is_forgotten(rule, m, n_v, x64):
    near, far = (weight_error(resized(m=m, n_v=n_v, omega0=start), rule) for start in (0.0, 1e9))
    assert float(far) == pytest.approx(float(near), rel=1e-12)


def test_at_the_threshold_the_mean_is_infinite_without_ridge_and_finite_with_it(x64):
    square = resized(m=10, n_v=3)
    assert weight_error(square, ONE) == train_task_error(square, ONE) == jnp.inf
    assert weight_error(resized(m=29, n_v=1), ONE) > 30 * weight_error(resized(m=26, n_v=1), ONE)
    assert 0 < float(weight_error(square, ONE, meta_ridge=1.0)) < 100


def test_one_task_whose_filter_vanishes_within_the_spectrum_has_no_mean(x64):
    single_task = resized(m=1, n_v=60)
    assert weight_error(single_task, nm.GradientDescent(0.5)) == jnp.inf
    assert jnp.isfinite(weight_error(single_task, nm.GradientDescent(-0.5)))
    assert jnp.isfinite(weight_error(single_task, nm.GradientDescent(0.5), meta_ridge=1.0))


def test_other_sizes_and_values_do_not_recompile(x64, monkeypatch):
    rates = np.linspace(-2, 2, model.ON_HOST + 1)
    weight_error(NEAR, nm.GradientDescent(rates))
    monkeypatch.setattr(model, "rule_moments", chex.assert_max_traces(model.rule_moments, n=0))
    weight_error(resized(p=47, m=9, n_t=33, n_v=11, sigma=2.0), nm.GradientDescent(-rates))
    with pytest.raises(AssertionError, match="traced"):
        weight_error(NEAR, nm.GradientDescent(rates[:-1]).with_tunable(jnp.append(rates, 0.0)))


@pytest.mark.slow
def test_single_numbers_are_computed_without_a_program(x64, monkeypatch):
    rules = nm.GradientDescent(0.25), nm.GradientFlow(-0.3), nm.Proximal(np.array([0.5, 2.0]))
    compiled = [
        jax.jit(lambda rule: weight_error(NEAR, rule, meta_ridge=1.0))(rule) for rule in rules
    ]
    monkeypatch.setattr(model, "_compiled", None)
    for rule, expected in zip(rules, compiled, strict=True):
        found = weight_error(NEAR, rule, meta_ridge=1.0)
        assert isinstance(found, jax.Array)
        np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("n", (8, 16))
def test_with_many_tasks_the_exact_moments_keep_the_tail_of_the_spectrum(n, x64):
    # With m large the second theorem, made of exact moments, is exact.
    problem = resized(p=n, n_t=n, n_v=n, m=10**6)
    rule = nm.GradientDescent(np.array([-0.5, 0.3, 0.7]))
    exact = weight_error(problem, rule, method="expansion")
    error, of_law = (
        np.abs(weight_error(problem, rule, measure=kind) / exact - 1)
        for kind in ("auto", "marchenko-pastur")
    )
    assert error.max() < (0.008 if n == 16 else 0.02)
    assert of_law[-1] > 3 * error[-1]


@pytest.mark.slow
def test_a_batch_of_rates_is_its_rates(x64):
    rates = np.linspace(-2, 2, 2 * 3 * 50).reshape(2, 3, 50)  # more than one block
    batch = weight_error(NEAR, nm.GradientDescent(rates))
    assert batch.shape == rates.shape
    single = [weight_error(NEAR, nm.GradientDescent(rate)) for rate in rates[0, 0, :3]]
    np.testing.assert_allclose(batch[0, 0, :3], single, rtol=1e-12)
    mapped = jax.vmap(lambda rate: weight_error(NEAR, nm.GradientDescent(rate)))(rates[0, 0, :3])
    np.testing.assert_allclose(mapped, single, rtol=1e-12)


def test_the_error_of_the_limit_falls_with_size_and_that_of_the_correction_faster(x64):
    """Both sizes against the largest, at fixed ratios: 1/p and 1/p^2."""

    def at(scale):
        sizes = dict(p=20 * scale, m=2, n_t=14 * scale, n_v=6 * scale)
        problem = resized(**sizes, omega0=0.1 * scale**-0.5)
        found = model.IsotropicModel(problem, 0.0, "marchenko-pastur").moments(
            nm.GradientDescent(-0.5)
        )
        return float(found.weight_error), float(found.limit)

    (_, truth), small, large = at(4096), at(2), at(8)
    # The 1/p term itself falls as 1/p relative to the limit.
    added = (small[0] - truth) / (large[0] - truth)
    assert added == pytest.approx(4, rel=0.25)


@pytest.mark.parametrize("bad", (-1.0, float("nan")))
def test_a_bad_ridge_is_refused(bad):
    with pytest.raises(ValueError, match="meta_ridge must be"):
        weight_error(NEAR, ONE, meta_ridge=bad)


def test_an_expansion_has_no_ridge():
    with pytest.raises(ValueError, match=r"meta_ridge must be 0 for method='expansion'"):
        weight_error(OVER, ONE, method="expansion", meta_ridge=1.0)


@pytest.mark.parametrize("ridge", (0.1, 0.3))
def test_the_pole_fades_as_the_ridge_takes_the_place_of_the_gap(ridge, x64):
    """x s of the means, with s from differences of t and K along kappa."""
    found = solve_saddle(training(NEAR, nm.GradientDescent(-0.5), ridge), True)
    one, at = found.system, found.at
    x = first_order(one, at, False)[0] / leading(one, at)[0]

    def t_and_K(kappa):
        g = one.mean(1 / (one.b**2 + kappa))
        return one.n_v - one.p * (1 - kappa * g), one.m * kappa - (one.m - 1) / g

    (t_0, K_0), (t_1, K_1) = t_and_K(1 - 1e-5), t_and_K(1 + 1e-5)
    log_t, log_K = np.log(t_1 / t_0), np.log(K_1 / K_0)
    s = ((log_t - log_K) / (log_t + log_K)) ** 2
    assert 0 < s < 0.9
    assert float(corrected_moments(found, False).pole) == pytest.approx(float(x * s), rel=1e-5)
    assert float(corrected_moments(found, False).correction_factor) == pytest.approx(
        float(1 + x / (1 - x * s)), rel=1e-5
    )


@pytest.mark.parametrize(
    ("n_v", "ridge"), [(10, 0.0), (40, 0.0), (10, 0.5)], ids=["few rows", "many rows", "ridge"]
)
def test_means_are_nan_where_the_saddle_point_is_not_found(n_v, ridge, monkeypatch):
    """Numbers at a point that is not a saddle point would pass for predictions."""
    monkeypatch.setattr(logarithms, "MAX_STEPS", 1)
    problem = nm.MixedLinearRegression(p=60, m=3, n_t=20, n_v=n_v, n_r=20, sigma=0.5, nu=1.0)
    train, adapt = nm.GradientDescent(0.3, steps=2), nm.GradientDescent(0.1)
    for mean in (partial(nm.theory.test_loss, adapt=adapt), weight_error, train_task_error):
        with pytest.warns(nm.ConvergenceWarning, match="equations of the theory"):
            assert np.isnan(mean(problem, train, meta_ridge=ridge))


def test_traced_means_are_nan_where_the_saddle_point_is_not_found(monkeypatch):
    monkeypatch.setattr(logarithms, "MAX_STEPS", 1)
    moments_module._solve_moments.clear_cache()

    def loss(rate):
        return weight_error(NEAR, nm.GradientDescent(rate, steps=2), meta_ridge=0.5)

    found = jax.jit(jax.value_and_grad(loss))(0.3)
    moments_module._solve_moments.clear_cache()
    assert np.isnan(found).all()
