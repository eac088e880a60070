"""Theorems 1 and 2."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm
from negmaml.theory import expansion_parameter, overparameterized, underparameterized
from tests.helpers import OVER, RATES, UNDER, z_score
from tests.internals import _g_coefficients, _polynomial, weight_error

SQUARE = nm.MixedLinearRegression(p=12, m=4, n_t=5, n_v=3, n_r=5, sigma=1.0, nu=1.0)
both = pytest.mark.parametrize("problem", (OVER, UNDER), ids=("over", "under"))
loss = jax.jit(
    lambda problem, train, adapt: nm.theory.test_loss(
        problem, nm.GradientDescent(train), nm.GradientDescent(adapt), method="expansion"
    )
)


def h(rate, n, p):
    return (1 - rate) ** 2 + rate**2 * (p + 1) / n


def theorem_1(q, train, adapt):
    """Theorem 1 as printed, in plain floats and for scalar offsets."""
    ratio = q.n_v * q.m / q.p
    noise = q.sigma**2 * ratio / 2 * (1 + train**2 * q.p / q.n_t) / h(train, q.n_t, q.p)
    offset = (1 - ratio) / 2 * q.p * (q.omega0 - q.w0) ** 2
    spread = q.nu**2 / 2 * (1 + ratio) + offset + noise
    return q.sigma**2 / 2 * (1 + adapt**2 * q.p / q.n_r) + h(adapt, q.n_r, q.p) * spread


def theorem_2(q, train, adapt, power=2):
    """Theorem 2 in plain floats, with the power of h_t that stands in the denominator.

    Means of traces of W from their published polynomials in n and p.
    """
    n, p = q.n_t, q.p
    w1, w2, w11 = n * p, n * p * (n + p + 1), n * p * (n * p + 2)
    w3 = n * p * (n**2 + p**2 + 3 * n * p + 3 * n + 3 * p + 4)
    cubic = n**3 + p**3 + 6 * n * p * (n + p) + 6 * n**2 + 6 * p**2
    w4 = n * p * (cubic + 17 * n * p + 21 * n + 21 * p + 20)
    w12 = w2 * (n * p + 4)
    w22 = (n + p + 1) * w12 + 4 * w3
    a = train / n
    g1 = (w1 - 2 * a * w2 + a**2 * w3) / (n * p)
    g2 = (p * w1 - 2 * a * w11 + a**2 * w12) / (n * p**2)
    g3 = (p - 4 * a * w1 + 6 * a**2 * w2 - 4 * a**3 * w3 + a**4 * w4) / p
    g4 = p**2 - 4 * a * p * w1 + a**2 * (2 * p * w2 + 4 * w11) - 4 * a**3 * w12 + a**4 * w22
    g4 /= p**2
    noise = h(train, n, p) + train**2 / n * ((q.n_v + 1) * g1 + p * g2)
    tasks = ((q.n_v + 1) * g3 + p * g4) / p
    spread = p / (q.n_v * q.m) * (q.sigma**2 * noise + q.nu**2 * tasks) / h(train, n, p) ** power
    floor = q.sigma**2 / 2 * (1 + adapt**2 * p / q.n_r)
    return floor + h(adapt, q.n_r, p) / 2 * (q.nu**2 + spread)


@pytest.mark.parametrize("adapt", RATES)
@pytest.mark.parametrize("train", RATES)
def test_theorem_1_is_the_printed_equation(train, adapt, x64):
    problem = dataclasses.replace(OVER, w0=0.3, omega0=-0.2)
    assert float(loss(problem, train, adapt)) == pytest.approx(
        theorem_1(problem, train, adapt), rel=1e-13
    )


@pytest.mark.parametrize("adapt", RATES)
@pytest.mark.parametrize("train", RATES)
def test_theorem_2_is_the_corrected_equation(train, adapt, x64):
    assert float(loss(UNDER, train, adapt)) == pytest.approx(
        theorem_2(UNDER, train, adapt), rel=1e-11
    )


@both
def test_each_theorem_by_name_is_the_expansion_of_its_regime(problem):
    theorem = overparameterized if problem.overparameterized else underparameterized
    assert float(theorem(problem, -0.3, 0.2)) == pytest.approx(
        float(loss(problem, -0.3, 0.2)), rel=1e-6
    )


def test_the_denominator_of_theorem_2_is_squared(x64):
    # Simulation gives 0.04139(5) here.
    assert round(float(underparameterized(UNDER, -0.5, 0.2)), 5) == 0.04153
    assert round(theorem_2(UNDER, -0.5, 0.2, power=1), 4) == 0.0523


@pytest.mark.parametrize("adapt", RATES)
def test_the_slope_of_theorem_2_at_zero_is_the_printed_one_times_h_r(adapt, x64):
    slope = float(jax.grad(loss, 1)(UNDER, 0.0, adapt))
    printed = UNDER.sigma**2 * UNDER.p / (UNDER.n_v * UNDER.m)
    assert slope == pytest.approx(h(adapt, UNDER.n_r, UNDER.p) * printed, rel=1e-12)


@pytest.mark.parametrize(("adapt", "holds"), ((0.0, True), (0.3, False), (-0.4, False)))
def test_the_printed_slope_holds_without_adaptation_only(adapt, holds, x64):
    slope = float(jax.grad(loss, 1)(UNDER, 0.0, adapt))
    printed = UNDER.sigma**2 * UNDER.p / (UNDER.n_v * UNDER.m)
    assert (abs(slope / printed - 1) < 0.01) is holds


@pytest.mark.parametrize("problem_sigma", (0.0, 0.7))
def test_the_slope_of_theorem_1_at_zero_comes_from_noise_alone(problem_sigma, x64):
    # h_t has slope -2 at zero, and only the noise term is divided by it.
    problem = dataclasses.replace(OVER, sigma=problem_sigma, omega0=0.5)
    expected = h(0.2, OVER.n_r, OVER.p) * problem_sigma**2 * OVER.rows / OVER.p
    assert float(jax.grad(loss, 1)(problem, 0.0, 0.2)) == pytest.approx(expected, rel=1e-12)


@pytest.fixture(scope="module")
def small_wisharts():
    """20 000 draws of S with n = 5, p = 8, and the identity."""
    X = np.random.default_rng(2).standard_normal((20_000, 5, 8))
    return X.swapaxes(1, 2) @ X / 5, np.eye(8)


@pytest.mark.parametrize("rate", (-0.5, 0.4))
@pytest.mark.parametrize("index", range(4))
def test_the_g_polynomials_agree_with_simulation(small_wisharts, index, rate):
    S, identity = small_wisharts
    square = (identity - rate * S) @ (identity - rate * S)
    trace_square = np.einsum("tii->t", square)
    sampled = (
        np.einsum("tij,tji->t", square, S) / 8,
        np.einsum("tii->t", S) * trace_square / 64,
        np.sum(square**2, axis=(1, 2)) / 8,
        trace_square**2 / 64,
    )[index]
    predicted = float(_polynomial(_g_coefficients(5, 8)[index], jnp.asarray(rate)))
    assert abs(z_score(sampled, predicted)) < 4


@pytest.mark.parametrize(
    ("sigma", "nu"), ((0.5, 0.0), (0.0, 0.5)), ids=("noise alone", "spread alone")
)
@pytest.mark.parametrize("rate", (-0.6, 0.0, 0.4))
@both
def test_the_distance_is_homogeneous_of_degree_two_in_each_variance(problem, rate, sigma, nu):
    one = dataclasses.replace(problem, sigma=sigma, nu=nu)
    two = dataclasses.replace(problem, sigma=2 * sigma, nu=2 * nu)
    rule = nm.GradientDescent(rate)
    assert float(weight_error(two, rule)) == pytest.approx(
        4 * float(weight_error(one, rule)), rel=1e-6
    )


def test_the_offset_adds_its_unreachable_part_to_the_distance(x64):
    w0, omega0 = np.linspace(-1, 1, OVER.p), np.linspace(2, 0, OVER.p)
    moved = dataclasses.replace(OVER, w0=w0, omega0=omega0)
    rule = nm.GradientDescent(jnp.array(RATES))
    expected = (1 - OVER.rows / OVER.p) * np.sum((omega0 - w0) ** 2)
    np.testing.assert_allclose(
        weight_error(moved, rule) - weight_error(OVER, rule), expected, rtol=1e-12
    )


def test_the_starting_point_is_forgotten_with_more_rows_than_dimensions():
    moved = dataclasses.replace(UNDER, w0=1.0, omega0=-2.0)
    rule = nm.GradientDescent(jnp.array(RATES))
    np.testing.assert_array_equal(weight_error(moved, rule), weight_error(UNDER, rule))


def test_theorem_1_is_refused_with_more_rows_than_dimensions():
    with pytest.raises(ValueError, match=r"p > n_v m.*use theory.underparameterized"):
        overparameterized(UNDER, 0.1, 0.1)


def test_theorem_2_is_refused_with_fewer_rows_than_dimensions():
    with pytest.raises(ValueError, match=r"p < n_v m.*use theory.overparameterized"):
        underparameterized(OVER, 0.1, 0.1)


@pytest.mark.parametrize("theorem", (overparameterized, underparameterized))
def test_both_theorems_are_refused_for_a_square_system(theorem):
    with pytest.raises(ValueError, match=r"neither theorem holds"):
        theorem(SQUARE, 0.1, 0.1)


def test_the_distance_is_refused_for_a_square_system():
    with pytest.raises(ValueError, match=r"p = n_v m = 12"):
        weight_error(SQUARE, nm.GradientDescent(0.1))


@both
@pytest.mark.parametrize("function", (weight_error, expansion_parameter))
@pytest.mark.parametrize(
    "train", (nm.GradientDescent(0.1, 2), nm.GradientFlow(0.1), nm.Proximal(0.1))
)
def test_only_one_gradient_step_is_expanded_in_training(problem, function, train):
    with pytest.raises(ValueError, match=r"train must be GradientDescent with steps=1"):
        function(problem, train)


def test_an_unknown_method_is_refused():
    rule = nm.GradientDescent(0.1)
    with pytest.raises(ValueError, match=r"method must be .*'expansion'.*got 'magic'"):
        nm.theory.test_loss(OVER, rule, rule, method="magic")


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
@pytest.mark.parametrize("position", (0, 1))
def test_rates_that_are_not_finite_are_refused(position, bad):
    rates = [0.1, 0.1]
    rates[position] = bad
    with pytest.raises(ValueError, match=r"rate must be finite"):
        overparameterized(OVER, *rates)


@both
def test_any_adaptation_rule_follows_an_expanded_training(problem):
    train = nm.GradientDescent(-0.2)
    for adapt in (nm.GradientDescent(0.1, 3), nm.GradientFlow(-0.2), nm.Proximal(1.5)):
        expected = nm.theory.expected_test_loss(problem, weight_error(problem, train), adapt)
        assert nm.theory.test_loss(problem, train, adapt, method="expansion") == expected


@pytest.mark.parametrize("adapt_shape", ((), (3,), (2, 1)))
@pytest.mark.parametrize("train_shape", ((), (4,), (1, 2)))
def test_the_loss_has_the_shape_of_the_train_and_then_of_the_adapt_rate(train_shape, adapt_shape):
    train, adapt = jnp.full(train_shape, -0.2), jnp.full(adapt_shape, 0.1)
    assert jax.eval_shape(loss, OVER, train, adapt).shape == train_shape + adapt_shape


@both
def test_a_grid_of_rates_holds_the_losses_of_single_rates(problem):
    rates = jnp.array(RATES)
    single = [[loss(problem, train, adapt) for adapt in RATES] for train in RATES]
    np.testing.assert_allclose(loss(problem, rates, rates), single, rtol=2e-6)


@both
def test_vmap_over_rates_and_variances_equals_a_loop(problem, x64):
    rates, sigmas = jnp.array(RATES), jnp.linspace(0.1, 2.0, len(RATES))

    def one(rate, sigma):
        return loss(dataclasses.replace(problem, sigma=sigma), rate, 0.2)

    loop = [one(rate, sigma) for rate, sigma in zip(rates, sigmas, strict=True)]
    np.testing.assert_allclose(jax.vmap(one)(rates, sigmas), loop, rtol=1e-12)


@both
def test_single_and_double_precision_agree(problem):
    rates = np.array(RATES, np.float32)
    single = loss(problem, rates, rates)
    with jax.enable_x64(True):
        double = loss(problem, rates.astype(np.float64), rates.astype(np.float64))
    assert single.dtype == np.float32
    assert double.dtype == np.float64
    np.testing.assert_allclose(single, double, rtol=1e-5)


@both
def test_the_gradient_in_every_number_is_finite_and_a_finite_difference(problem, x64):
    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    step = 1e-5
    problem = dataclasses.replace(problem, w0=0.2, omega0=-0.1)
    for rate in RATES:
        leaves, structure = jax.tree.flatten((problem, rate, -rate))
        computed = jax.tree.leaves(gradient(problem, rate, -rate))
        for i, value in enumerate(computed):
            up, down = (
                loss(*jax.tree.unflatten(structure, [*leaves[:i], leaves[i] + s, *leaves[i + 1 :]]))
                for s in (step, -step)
            )
            size = float(loss(problem, rate, -rate))
            assert float(value) == pytest.approx(
                float(up - down) / (2 * step), rel=1e-6, abs=1e-8 * size
            )


@both
def test_new_rates_and_variances_do_not_retrace(problem):
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def counted(problem, train, adapt):
        return nm.theory.test_loss(problem, train, adapt, method="expansion")

    values = [
        float(counted(dataclasses.replace(problem, sigma=sigma), *map(nm.GradientDescent, rates)))
        for sigma, rates in ((0.1, (-0.3, 0.2)), (0.5, (0.0, -1.0)), (2.0, (1.5, 0.0)))
    ]
    assert len(set(values)) == 3


@pytest.mark.parametrize("problem", (OVER, UNDER, SQUARE), ids=("over", "under", "square"))
def test_the_expansion_parameter_without_training_is_the_aspect_ratio(problem):
    N, p = problem.rows, problem.p
    rho = float(expansion_parameter(problem, nm.GradientDescent(0.0)))
    assert rho == pytest.approx((min(p, N) + 1) / max(p, N), rel=1e-5)


@pytest.mark.parametrize("rate", (-0.5, 0.4))
@pytest.mark.parametrize("m", (1, 2, 6))
def test_the_expansion_parameter_is_the_fluctuation_of_the_gram_matrix(m, rate, x64):
    p, n_t, n_v, draws = 8, 5, 2, 4000
    rng = np.random.default_rng(m)
    X_t, X_v = (rng.standard_normal((draws, m, n, p)) for n in (n_t, n_v))
    Phi = X_v - rate * (X_v @ X_t.swapaxes(2, 3)) @ X_t / n_t
    Phi = Phi.reshape(draws, m * n_v, p)
    wide = p > m * n_v
    gram = Phi @ Phi.swapaxes(1, 2) if wide else Phi.swapaxes(1, 2) @ Phi
    k = gram.shape[-1]
    mean = h(rate, n_t, p) * (p if wide else m * n_v)
    sampled = np.sum((gram - mean * np.eye(k)) ** 2, axis=(1, 2)) / (k * mean**2)
    problem = nm.MixedLinearRegression(p=p, m=m, n_t=n_t, n_v=n_v, n_r=3, sigma=1.0, nu=1.0)
    assert abs(z_score(sampled, float(expansion_parameter(problem, nm.GradientDescent(rate))))) < 4
