"""Pencils have the filter of their rule; polynomials stand in for filters without a pencil."""

import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm
from tests.internals import (
    DEGREE,
    chain,
    error_of,
    interpolated,
    pencil_of_updates,
    proximal_pencil,
)

SIZES = np.array([0.0, 0.4, 1.0, 3.0])


def filter_of(pencil, s):
    """The last point over the first one, where the equations of the multipliers hold."""
    points = np.asarray(pencil.points) == 1
    matrix = np.asarray(pencil.constant) + s * np.asarray(pencil.coupling)
    np.testing.assert_array_equal(matrix, matrix.T)
    assert not matrix[np.ix_(~points, ~points)].any() and not matrix[np.ix_(points, points)].any()
    equations = matrix[np.ix_(~points, points)]
    return np.linalg.solve(equations[:, 1:], -equations[:, 0])[-1]


@pytest.mark.parametrize(
    "rule",
    [nm.GradientDescent(-0.4, 3), nm.GradientDescent(nm.Schedule([0.3, -0.2]), 3),
     nm.Momentum(0.3, 0.5, 4)],
    ids=["descent", "schedule", "momentum"],
)  # fmt: skip
def test_the_pencil_of_updates_has_the_filter_of_the_rule(rule, x64):
    pencil = pencil_of_updates(rule)
    found = [filter_of(pencil, s) for s in SIZES]
    np.testing.assert_allclose(found, rule.init_filter(jnp.asarray(SIZES)), rtol=1e-12)
    assert pencil.active == (0, len(pencil.points) - 1)
    assert pencil.coupled().shape == (2 * rule.steps, 2 * rule.steps)
    assert pencil.for_train_train().coupled().shape == (2 * rule.steps + 1,) * 2


def test_the_proximal_pencil_has_its_filter(x64):
    found = [filter_of(proximal_pencil(0.7), s) for s in SIZES]
    np.testing.assert_allclose(found, 0.7 / (0.7 + SIZES), rtol=1e-12)


def polynomial(x):
    return 1 - 0.9 * x + 0.3 * x**2 - 0.2 * x**4


def test_a_polynomial_filter_is_its_own_interpolation(x64):
    mixing = np.asarray(interpolated(polynomial, 2.0))
    assert mixing.shape == (DEGREE, DEGREE)
    found = [filter_of(chain(mixing), s) for s in SIZES]
    np.testing.assert_allclose(found, polynomial(SIZES), atol=1e-12)
    assert error_of(mixing, polynomial, 2.0) < 1e-14


@pytest.mark.parametrize("b", [lambda x: np.exp(-x), lambda x: 0.5 / (0.5 + x)])
def test_other_filters_are_met_at_the_points_of_chebyshev(b):
    largest = 1.7
    mixing = np.asarray(interpolated(b, largest))
    x = largest * (1 + np.cos(np.pi * (np.arange(DEGREE) + 0.5) / DEGREE)) / 2
    np.testing.assert_allclose([filter_of(chain(mixing), s) for s in x], b(x), rtol=1e-5)
    grid = np.linspace(0, largest, 65)
    through = np.polynomial.Polynomial.fit(np.append(x, 0), b(np.append(x, 0)), DEGREE)
    expected = np.max(abs(through(grid) - b(grid))) / np.max(b(grid))
    assert error_of(mixing, b, largest) == pytest.approx(expected, rel=1e-6)
    assert 1e-4 < expected < 0.1
