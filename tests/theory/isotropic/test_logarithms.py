"""Numbers that come as logarithms, and roots between bounds."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.internals import (
    find_root,
    largest_exponent,
    largest_log_ratio,
    log_at_least_tiny,
    logarithms,
    resolvent_fractions,
    times_exp_2log,
)


def test_shares_are_those_of_the_numbers_and_of_full_relative_precision():
    log_b, log_kappa = np.array([-9.0, -0.3, 0.0, 0.4, 12.0]), np.array([0.7, -1.2])
    kappa, own = resolvent_fractions(log_b, log_kappa)
    for i, level in enumerate(np.exp(log_kappa)):
        b = np.exp(2 * log_b)
        np.testing.assert_allclose(kappa[i], level / (b + level), rtol=1e-14)
        np.testing.assert_allclose(own[i], b / (b + level), rtol=1e-14)
    kappa, own = resolvent_fractions(np.array([-np.inf, -1e9, 1e9]), np.zeros(1))
    assert kappa[0].tolist()[:2] == [1, 1] and own[0, 2] == 1
    assert own[0, 0] == 0 and own[0, 1] > 0 and kappa[0, 2] > 0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_cube_of_the_smaller_share_is_a_number(dtype):
    most = largest_log_ratio(np.ones(1, dtype))
    smallest = np.exp(np.asarray(-most, dtype))
    assert smallest**3 > np.finfo(dtype).tiny and np.exp(np.asarray(3 * most, dtype)) < np.inf
    assert (smallest**3) ** 1.1 < np.finfo(dtype).tiny  # and hardly more would do
    assert largest_exponent(np.ones(1, dtype)) == pytest.approx(
        np.log(float(np.finfo(dtype).max)) - 1
    )


def test_squares_of_units_and_logarithms_of_zero():
    np.testing.assert_allclose(times_exp_2log(np.array([2.0, 0.0]), np.log(3.0)), [18, 0])
    with np.errstate(over="ignore"):
        assert times_exp_2log(np.array(1.0), np.array(1e9)) == np.inf
    assert times_exp_2log(np.array(0.0), np.array(1e9)) == 0
    found = log_at_least_tiny(np.array([0.0, 5.0]))
    np.testing.assert_allclose(found, [np.log(np.finfo(float).tiny), np.log(5)])


ROOTS = np.array([10.0, 10.4, 11.3, 12.0])  # of each entry, at the bounds too


@pytest.mark.parametrize("steep", [0.5, 3.0, 1e4])
@pytest.mark.parametrize("guess", [10.1, 11.9, 50.0])
def test_a_root_is_found_between_its_bounds(steep, guess):
    """Newton's step leads far out where the function is flat, and is then not taken."""
    seen = []

    def residual(y):
        seen.append(y)
        return np.tanh(steep * (y - ROOTS)), steep / np.cosh(
            np.clip(steep * (y - ROOTS), -300, 300)
        ) ** 2 + 1e-300

    low, high = np.full(4, 10.0), np.full(4, 12.0)
    found = find_root(residual, low, high, np.full(4, guess))
    np.testing.assert_allclose(found, ROOTS, rtol=1e-13)
    assert min(map(np.min, seen)) >= 10 - 1e-3 and max(map(np.max, seen)) <= 12 + 1e-3
    assert len(seen) < 45  # bisection halves the bracket each time


def test_a_root_that_rounding_has_put_outside_is_found():
    found = find_root(lambda y: (y - 1, np.ones(1)), 1 + 1e-9, np.full(1, 2.0), np.full(1, 1.5))
    np.testing.assert_allclose(found, 1, rtol=1e-14)
    found = find_root(lambda y: (y - 2, np.ones(1)), 1.0, np.full(1, 2 - 1e-9), np.full(1, 1.5))
    np.testing.assert_allclose(found, 2, rtol=1e-14)


@pytest.mark.parametrize("xp", [np, jnp])
def test_a_root_that_is_not_found_is_nan(xp, monkeypatch):
    """Entries of a batch that converged keep their values."""
    monkeypatch.setattr(logarithms, "MAX_STEPS", 6)

    def residual(y):
        return y**3 - roots**3, 3 * y**2

    roots = xp.asarray([5.0, 1e-3])
    find = find_root if xp is np else jax.jit(partial(find_root, residual))
    arguments = (residual,) if xp is np else ()
    found = find(*arguments, xp.zeros(2), xp.full(2, 10.0), xp.full(2, 5.5))
    assert found[0] == pytest.approx(5) and xp.isnan(found[1])
