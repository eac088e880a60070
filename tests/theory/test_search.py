"""Optima by the proportional theory: global, of every rule, and of the ridge."""

import dataclasses
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm
from negmaml.theory import (
    best_adapt_rate,
    best_meta_ridge,
    best_rates,
    best_train_rate,
    phase_diagram,
    stationary_train_rates,
    weight_error,
)
from tests.internals import ROUNDS, logarithms, minimise, optima, sensitivity_by_parts, theory_model
from tests.internals import saddle_point as saddle

OFF = nm.MixedLinearRegression(p=40, m=4, n_t=20, n_v=4, n_r=20, sigma=0.5, nu=1.0, omega0=0.2)
GRID = np.concatenate([-np.geomspace(1e-3, 100, 300), [0.0], np.geomspace(1e-3, 100, 300)])


def test_of_two_minima_the_lower_is_found(x64):
    def two_wells(x):
        return (x**2 - 1) ** 2 + 0.1 * x

    assert float(minimise(two_wells, jnp.linspace(-3, 3, 25))) == pytest.approx(-1.0123, abs=1e-3)


@pytest.mark.parametrize(("cusp", "rounds"), ((0.0, ROUNDS - 1), (0.3, ROUNDS)))
def test_a_smooth_minimum_takes_a_round_less_on_the_host(cusp, rounds):
    lowest, calls = -0.123456789, []

    def function(x):
        calls.append(x)
        return np.exp(x) - x * np.exp(lowest) + cusp * np.abs(x - lowest)

    found = minimise(function, np.linspace(-3, 3, 37))
    assert found == pytest.approx(lowest, abs=1e-4 if cusp else 1e-8)
    assert len(calls) == rounds


@pytest.mark.parametrize(
    ("family", "n_v"),
    [(nm.GradientDescent, 4)]
    + [
        pytest.param(family, n_v, marks=pytest.mark.slow)
        for family, n_v in product((nm.GradientDescent, nm.GradientFlow, nm.Proximal), (4, 25))
        if (family, n_v) != (nm.GradientDescent, 4)
    ],
)
def test_no_parameter_on_a_fine_grid_beats_the_best(family, n_v, x64):
    problem = dataclasses.replace(OFF, n_v=n_v)
    grid = GRID[np.abs(GRID) < 5] if family is nm.GradientFlow else GRID
    best = best_train_rate(problem, family(0.0))
    values = weight_error(problem, family(grid))
    lowest = jnp.min(jnp.where(jnp.isfinite(values), values, jnp.inf))
    assert float(weight_error(problem, family(best))) <= float(lowest) * (1 + 1e-9)


def test_with_few_rows_the_best_rate_is_that_of_theorem_1(x64):
    problem = nm.MixedLinearRegression(p=4000, m=1, n_t=2000, n_v=2, n_r=9, sigma=1.0, nu=1.0)
    expected, _ = stationary_train_rates(4000, 2000)
    assert float(best_train_rate(problem)) == pytest.approx(expected, rel=5e-3)


@pytest.mark.slow
def test_the_best_rate_has_the_derivative_of_its_condition(x64):
    def best(sigma):
        return best_train_rate(dataclasses.replace(OFF, n_v=25, sigma=sigma))

    difference = float(best(0.55) - best(0.45)) / 0.1
    assert float(jax.grad(best)(0.5)) == pytest.approx(difference, rel=0.02)


def test_both_best_rates_are_best_at_once(x64):
    train, adapt = best_rates(OFF)
    around = np.array([-0.01, 0.0, 0.01])
    losses = nm.theory.test_loss(
        OFF, nm.GradientDescent(train + around), nm.GradientDescent(adapt + around)
    )
    assert losses.min() == losses[1, 1]
    strength = best_adapt_rate(OFF, nm.GradientDescent(train), nm.Proximal(0.0))
    losses = nm.theory.test_loss(
        OFF, nm.GradientDescent(train), nm.Proximal(strength * np.array([0.9, 1, 1.1]))
    )
    assert losses.argmin() == 1


def test_the_best_ridge_beats_its_neighbours_and_none(x64):
    train = nm.GradientDescent(-0.2)
    ridge = float(best_meta_ridge(OFF, train))
    values = [float(weight_error(OFF, train, meta_ridge=ridge * x)) for x in (1, 0.9, 1.1, 0)]
    assert values[0] == min(values)
    square = dataclasses.replace(OFF, m=10)
    assert 0 < float(best_meta_ridge(square, train)) < jnp.inf


@pytest.mark.slow
def test_a_phase_diagram_has_the_best_rates_of_its_cells(x64):
    n_t, n_v = np.array([500.0, 2000.0]), np.array([30.0, 400.0])
    found = phase_diagram(1000.0, 10.0, n_t[:, None], n_v, 0.5, 1.0)
    assert found.best.shape == (2, 2)
    assert (found.weight_error <= found.at_zero).all()
    for i, j in np.ndindex(2, 2):
        problem = nm.MixedLinearRegression(
            p=1000, m=10, n_t=int(n_t[i]), n_v=int(n_v[j]), n_r=5, sigma=0.5, nu=1.0
        )
        assert float(found.best[i, j]) == pytest.approx(float(best_train_rate(problem)), rel=0.08)


def test_losses_of_a_phase_diagram_are_infinite_at_the_threshold():
    """At p = n_v m without ridge, unless nothing is noisy; the best rate has a limit there."""
    n_v, sigma = np.array([4.999, 5.0, 5.001]), np.array([[0.5], [0.0]])
    found = phase_diagram(10.0, 2.0, 10.0, n_v, sigma, 2 * sigma)
    assert np.isinf(found.weight_error[0]).tolist() == [False, True, False]
    assert np.isinf(found.at_zero[0]).tolist() == [False, True, False]
    assert not found.weight_error[1].any() and not found.at_zero[1].any()
    np.testing.assert_allclose(found.best[0], found.best[0, 1], rtol=0.02)


@pytest.mark.slow
def test_a_phase_diagram_of_a_spectrum(x64):
    """With the identity that of isotropic inputs; else the best of each cell."""
    n_t, n_v = np.array([500.0, 2000.0]), np.array([30.0, 400.0])
    cells = 1000.0, 10.0, n_t[:, None], n_v, 0.5, 1.0
    plain, same = phase_diagram(*cells), phase_diagram(*cells, input_covariance=np.ones(4))
    np.testing.assert_allclose(same.best, plain.best, rtol=0.05)
    np.testing.assert_allclose(same.weight_error, plain.weight_error, rtol=1e-3)
    s = np.repeat([4.0, 0.5], 500)
    found = phase_diagram(*cells, input_covariance=s[[0, -1]])
    adapt = nm.GradientDescent(0.0)
    for i, j in np.ndindex(2, 2):
        problem = nm.MixedLinearRegression(
            p=1000, m=10, n_t=int(n_t[i]), n_v=int(n_v[j]), n_r=5, sigma=0.5, nu=1.0,
            input_covariance=s,
        )  # fmt: skip
        best = float(best_train_rate(problem, adapt=adapt))
        assert float(found.best[i, j]) == pytest.approx(best, rel=0.08)


def test_newtons_method_ends_at_the_root(monkeypatch, x64):
    """Rounding at the root once sent it into bisection, ten times as many steps."""
    steps = []
    find = saddle.find_root

    def counting(residual, *ends):
        def counted(y):
            steps[-1] += 1
            return residual(y)

        steps.append(0)
        return find(counted, *ends)

    monkeypatch.setattr(saddle, "find_root", counting)
    problem = nm.MixedLinearRegression(p=60, m=3, n_t=20, n_v=10, n_r=20, sigma=0.5, nu=1.0)
    nm.theory.best_train_rate(problem)
    assert len(steps) >= ROUNDS and max(steps) < 12


@pytest.mark.parametrize("covariance", (None, 1 / np.arange(1.0, 61)))
def test_the_sensitivity_of_an_optimum_is_a_short_program(covariance, x64):
    """Nested transformations would be 15,000 equations, which take minutes to compile."""
    problem = nm.MixedLinearRegression(
        p=60, m=3, n_t=20, n_v=10, n_r=20, sigma=0.5, nu=1.0, input_covariance=covariance
    )
    train, rate = nm.GradientDescent(0.0), np.asarray(0.1)
    objective, train = theory_model(problem).train_objective(train, None)
    variables, fixed = objective.split()
    program = sensitivity_by_parts(optima._objective_of, optima._parts_at)
    traced = jax.make_jaxpr(program)((rate, (variables, train)), fixed)
    assert 100 < equations(traced.jaxpr) < 2000


def equations(jaxpr):
    """How many there are, those of inner programs included."""
    total = 0
    for equation in jaxpr.eqns:
        total += 1
        values = jax.tree.leaves(list(equation.params.values()), is_leaf=is_program)
        total += sum(equations(getattr(x, "jaxpr", x)) for x in values if is_program(x))
    return total


def is_program(value):
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


@pytest.mark.parametrize("best", [-3.7, 0.013, 120.0])
def test_a_smooth_minimum_is_found_to_the_root_of_the_precision(best, x64):
    grid = np.concatenate([-np.geomspace(1e-3, 1e4, 18)[::-1], [0.0], np.geomspace(1e-3, 1e4, 18)])

    def function(x):
        t = (x - best) / abs(best)
        return 1 + t**2 + 0.2 * t**3 * np.exp(-(t**2))

    assert abs(minimise(function, grid) / best - 1) < 1e-6


def test_the_end_of_a_range_where_the_loss_still_falls_warns(x64):
    """Without differences between tasks the flow uphill may be as long as it likes."""
    alike = dataclasses.replace(OFF, p=20, m=3, n_t=40, n_r=40, sigma=1.0, nu=0.0, omega0=0.3)
    with pytest.warns(nm.ConvergenceWarning, match="best_train_rate .* loss still falls"):
        best = best_train_rate(alike, nm.GradientFlow(0.0))
    assert weight_error(alike, nm.GradientFlow(1.1 * best)) < weight_error(
        alike, nm.GradientFlow(best)
    )


def test_an_optimum_without_a_finite_loss_is_nan(monkeypatch, x64):
    nothing = np.full(25, np.nan)
    with np.errstate(invalid="ignore"):
        assert np.isnan(minimise(lambda x: nothing, np.linspace(-3, 3, 25)))
    assert jnp.isnan(minimise(lambda x: jnp.asarray(nothing), jnp.linspace(-3, 3, 25)))
    monkeypatch.setattr(logarithms, "MAX_STEPS", 0)
    with pytest.warns(nm.ConvergenceWarning, match="no value with a finite loss"):
        assert np.isnan(best_train_rate(OFF, nm.GradientDescent(0.0, steps=2)))


def test_the_largest_ridge_warns_unless_it_is_known_to_be_best(x64):
    start = dataclasses.replace(OFF, omega0=0.0)
    best_meta_ridge(start, nm.GradientDescent(0.1))
    with pytest.warns(nm.ConvergenceWarning, match="best_meta_ridge"):
        best_meta_ridge(dataclasses.replace(start, omega0=1e-8), nm.GradientDescent(0.1))
