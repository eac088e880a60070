"""Which rate to use, by the expansions: stationary and best rates."""

import dataclasses
from decimal import Decimal, localcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import negmaml as nm
from negmaml.theory import stationary_train_rates
from tests.helpers import OVER, RATES, UNDER, mostly_slow
from tests.internals import weight_error

best_adapt_rate = partial(nm.theory.best_adapt_rate, method="expansion")
best_train_rate = partial(nm.theory.best_train_rate, method="expansion")

both = pytest.mark.parametrize("problem", (OVER, UNDER), ids=("over", "under"))
GRID = np.concatenate([-np.logspace(-3, 4, 4001)[::-1], [0.0], np.logspace(-3, 4, 4001)])


@jax.jit
def train_distance(problem, rate):
    return weight_error(problem, nm.GradientDescent(rate))


train_slope = jax.jit(jax.grad(train_distance, 1))
train_curvature = jax.jit(jax.grad(jax.grad(train_distance, 1), 1))
best_train = jax.jit(best_train_rate)
best_adapt = jax.jit(lambda problem, rate: best_adapt_rate(problem, nm.GradientDescent(rate)))


@jax.jit
def loss(problem, train, adapt):
    rules = nm.GradientDescent(train), nm.GradientDescent(adapt)
    return nm.theory.test_loss(problem, *rules, method="expansion")


adapt_slope = jax.jit(jax.grad(loss, 2))


@pytest.mark.parametrize(("p", "n_t"), ((60, 30), (7, 1), (7, 200), (500, 3)))
def test_theorem_1_is_stationary_at_the_stationary_rates(p, n_t, x64):
    problem = dataclasses.replace(OVER, p=p, n_t=n_t, m=3, n_v=2)
    minimum, maximum = stationary_train_rates(p, n_t)
    assert minimum < 0 < maximum
    for rate, sign in ((minimum, 1), (maximum, -1)):
        curvature = float(train_curvature(problem, rate))
        assert sign * curvature > 0
        assert abs(float(train_slope(problem, rate)) / curvature) < 1e-12  # a Newton step


@pytest.mark.parametrize("adapt", (-1.0, 0.0, 0.6))
@pytest.mark.parametrize(("sigma", "nu", "omega0"), ((0.1, 2.0, 0.0), (3.0, 0.0, 0.4)))
def test_the_stationary_rates_hold_for_every_variance_offset_and_adaptation(
    sigma, nu, omega0, adapt, x64
):
    problem = dataclasses.replace(OVER, sigma=sigma, nu=nu, omega0=omega0)
    for rate in stationary_train_rates(OVER.p, OVER.n_t):
        slope = jax.grad(loss, 1)(problem, rate, adapt)
        assert abs(float(slope)) < 1e-13 * float(loss(problem, rate, adapt))


@pytest.mark.parametrize(
    ("p", "n_t"), ((1, 1), (60, 30), (3, 10**15), (10**15, 3), (10**15, 10**15), (10**9, 1))
)
def test_the_stationary_rates_lose_no_digits_at_any_size(p, n_t):
    with localcontext() as context:
        context.prec = 80
        half, ratio = Decimal(n_t + 1) / (2 * p), Decimal(n_t) / p
        root = (half**2 + ratio).sqrt()
        exact = float(-half - root), float(-half + root)
    assert stationary_train_rates(p, n_t) == pytest.approx(exact, rel=1e-15)


def test_the_positive_rate_tends_to_one_and_the_negative_to_minus_infinity_with_training_points():
    negative, positive = stationary_train_rates(5, 10**12)
    assert positive == pytest.approx(1, rel=1e-11)
    assert negative == pytest.approx(-(10**12) / 5, rel=1e-11)


def test_both_stationary_rates_tend_to_zero_with_dimensions():
    negative, positive = stationary_train_rates(10**14, 9)
    assert positive == pytest.approx(3e-7, rel=1e-6)
    assert negative == pytest.approx(-3e-7, rel=1e-6)


@pytest.mark.parametrize("name", ("p", "n_t"))
@pytest.mark.parametrize(("size", "error"), ((0, ValueError), (3.0, TypeError), (True, TypeError)))
def test_stationary_rates_reject_bad_sizes_by_name(name, size, error):
    with pytest.raises(error, match=rf"^{name} must be an integer"):
        stationary_train_rates(**{"p": 3, "n_t": 3, name: size})


sizes = st.sampled_from(
    ((60, 3, 30, 2, 20), (9, 1, 1, 1, 1), (30, 40, 5, 25, 10), (4, 30, 50, 3, 40))
)
variances = st.floats(0, 5)


def build(sizes, sigma, nu, offset=0.0):
    p, m, n_t, n_v, n_r = sizes
    return nm.MixedLinearRegression(
        p=p, m=m, n_t=n_t, n_v=n_v, n_r=n_r, sigma=sigma, nu=nu, omega0=offset
    )


@given(
    sizes=sizes,
    sigma=st.floats(0.05, 5),
    nu=variances,
    offset=st.floats(-2, 2),
    rate=st.floats(-3, 3),
)
def test_the_best_adapt_rate_is_stationary_and_between_zero_and_its_bound(
    sizes, sigma, nu, offset, rate
):
    with jax.enable_x64(True):
        problem = build(sizes, sigma, nu, offset)
        best = float(best_adapt(problem, rate))
        slope, at_zero = (float(adapt_slope(problem, rate, a)) for a in (best, 0.0))
    assert 0 < best < 1 / (1 + (problem.p + 1) / problem.n_r)
    assert at_zero < 0
    assert abs(slope) < 1e-12 * abs(at_zero)


@given(sizes=sizes, nu=st.floats(0.05, 5), rate=st.floats(-3, 3))
def test_without_noise_the_best_adapt_rate_is_its_bound(sizes, nu, rate):
    with jax.enable_x64(True):
        problem = build(sizes, 0.0, nu)
        best = float(best_adapt(problem, rate))
    assert best == pytest.approx(1 / (1 + (problem.p + 1) / problem.n_r), rel=1e-14)


def test_with_nothing_to_learn_the_best_adapt_rate_is_finite_and_its_bound():
    problem = dataclasses.replace(OVER, sigma=0.0, nu=0.0)
    assert float(best_adapt(problem, -0.3)) == pytest.approx(1 / (1 + 61 / 20))


@both
def test_the_best_adapt_rate_has_the_shape_of_the_training_rate(problem, x64):
    rates = jnp.array(RATES).reshape(2, 3)
    single = np.reshape([best_adapt(problem, rate) for rate in RATES], (2, 3))
    np.testing.assert_allclose(best_adapt(problem, rates), single, rtol=1e-14)
    np.testing.assert_allclose(
        jax.vmap(lambda r: best_adapt(problem, r))(jnp.array(RATES)), single.ravel(), rtol=1e-14
    )


@both
@pytest.mark.parametrize("name", ("sigma", "nu"))
def test_the_best_adapt_rate_is_differentiable_in_the_variances(problem, name, x64):
    def best(value):
        return best_adapt(dataclasses.replace(problem, **{name: value}), -0.4)

    value, step = getattr(problem, name), 1e-5
    difference = float(best(value + step) - best(value - step)) / (2 * step)
    gradient = float(jax.grad(best)(value))
    assert gradient == pytest.approx(difference, rel=1e-7)
    assert gradient < 0 if name == "sigma" else gradient > 0


@pytest.mark.parametrize("train", (None, nm.GradientDescent(0.3)))
@pytest.mark.parametrize("sigma", (0.1, 3.0))
def test_with_few_rows_the_best_train_rate_is_the_negative_stationary_rate(sigma, train, x64):
    problem = dataclasses.replace(OVER, sigma=sigma)
    expected, _ = stationary_train_rates(OVER.p, OVER.n_t)
    assert float(best_train_rate(problem, train)) == expected


def random_problem(sizes_seed, variances_seed):
    rng = np.random.default_rng(sizes_seed)
    p, n_t, n_v = (int(x) for x in np.exp(rng.uniform(0, np.log(50), 3)).round())
    m = int(p / n_v * rng.uniform(1.2, 6)) + 1
    sigma, nu = np.exp(np.random.default_rng(variances_seed).uniform(-3, 2, 2))
    return nm.MixedLinearRegression(p=p, m=m, n_t=n_t, n_v=n_v, n_r=5, sigma=sigma, nu=nu)


@jax.jit
def search_report(problem, grid):
    """The best rate, its distance, the lowest on the grid, and the Newton step left to go."""

    def objective(rate):
        return weight_error(problem, nm.GradientDescent(rate))

    best = best_train_rate(problem)
    slope = jax.grad(objective)
    step = slope(best) / jax.grad(slope)(best)
    return best, objective(best), objective(grid).min(), step


LONG_TASKS = [
    nm.MixedLinearRegression(p=2, m=50, n_t=n_t, n_v=1, n_r=5, sigma=1.0, nu=0.0)
    for n_t in (400, 2800, 100_000)
]


@pytest.mark.parametrize(
    "problem",
    mostly_slow([UNDER, *(random_problem(i // 3, i) for i in range(12)), *LONG_TASKS], 0, 4, 9, 14),
    ids=lambda q: f"p{q.p}-m{q.m}-n_t{q.n_t}-n_v{q.n_v}-sigma{q.sigma:.2f}-nu{q.nu:.2f}",
)
def test_no_rate_on_a_wide_grid_beats_the_best_train_rate(problem, x64):
    best, reached, lowest, step = map(float, search_report(problem, GRID))
    assert reached <= lowest * (1 + 1e-12)
    assert abs(step) <= 1e-6 * max(1e-3, abs(best))


@pytest.mark.parametrize("name", ("sigma", "nu"))
def test_the_best_train_rate_is_differentiable_in_the_variances(name, x64):
    def best(value):
        return best_train(dataclasses.replace(UNDER, **{name: value}))

    value, step = getattr(UNDER, name), 1e-5
    difference = float(best(value + step) - best(value - step)) / (2 * step)
    assert float(jax.grad(best)(value)) == pytest.approx(difference, rel=1e-6)
    assert float(jax.jvp(best, (value,), (1.0,))[1]) == pytest.approx(difference, rel=1e-6)


def test_the_best_train_rate_under_jit_and_vmap_is_that_of_each_variance(x64):
    def best(sigma):
        return best_train_rate(dataclasses.replace(UNDER, sigma=sigma))

    sigmas = jnp.array([0.05, 0.2, 1.0])
    single = [best_train(dataclasses.replace(UNDER, sigma=float(sigma))) for sigma in sigmas]
    np.testing.assert_allclose(jax.jit(jax.vmap(best))(sigmas), single, rtol=1e-9)


def test_the_best_train_rate_follows_the_precision_of_the_problem():
    single = best_train(UNDER)
    with jax.enable_x64(True):
        double = best_train(UNDER)
    assert (single.dtype, double.dtype) == (np.float32, np.float64)
    assert float(single) == pytest.approx(float(double), rel=1e-4)


@pytest.mark.parametrize("sigma", (0.1, 1.0))
def test_noise_makes_the_best_train_rate_negative(sigma, x64):
    # The slope of the loss at zero is positive wherever there is noise.
    assert float(best_train(dataclasses.replace(UNDER, sigma=sigma, nu=0.0))) < 0


@pytest.mark.parametrize(
    "function", (nm.theory.best_train_rate, nm.theory.best_adapt_rate, best_train_rate)
)
def test_a_square_system_is_refused(function):
    problem = nm.MixedLinearRegression(p=6, m=2, n_t=5, n_v=3, n_r=5, sigma=1.0, nu=1.0)
    with pytest.raises(ValueError, match=r"p = n_v m"):
        function(problem, nm.GradientDescent(0.1))
