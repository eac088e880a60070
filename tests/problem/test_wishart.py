"""Exact Wishart moments and the quadrature of the mean spectral measure."""

from fractions import Fraction
from math import comb, prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from negmaml.theory import wishart_moment, wishart_quadrature
from tests.helpers import z_score
from tests.internals import normalized_moment

sizes = st.integers(1, 40)
exponent_lists = st.lists(st.integers(0, 3), max_size=3).map(tuple)


def chi_square_moment(degrees, k):
    """E (chi^2)^k."""
    return prod(degrees + 2 * i for i in range(k))


@pytest.mark.parametrize("n", (1, 2, 7, 30))
@pytest.mark.parametrize("exponents", ((1,), (2,), (5,), (1, 1), (2, 3), (1, 2, 4)))
def test_in_one_dimension_moments_are_those_of_chi_square(n, exponents):
    assert wishart_moment(n, 1, exponents) == chi_square_moment(n, sum(exponents))


@pytest.mark.parametrize("p", (1, 2, 7, 30))
@pytest.mark.parametrize("exponents", ((1,), (2,), (5,), (1, 1), (2, 3), (1, 2, 4)))
def test_of_one_row_moments_are_those_of_its_squared_norm(p, exponents):
    assert wishart_moment(1, p, exponents) == chi_square_moment(p, sum(exponents))


@given(n=sizes, p=sizes)
def test_single_traces_have_their_textbook_means(n, p):
    assert wishart_moment(n, p, ()) == 1
    assert wishart_moment(n, p, (0,)) == p
    assert wishart_moment(n, p, (1,)) == n * p
    assert wishart_moment(n, p, (2,)) == n * p * (n + p + 1)
    assert wishart_moment(n, p, (3,)) == n * p * (n**2 + p**2 + 3 * n * p + 3 * n + 3 * p + 4)


@given(n=sizes, p=sizes, k=st.integers(0, 5))
def test_powers_of_the_trace_are_chi_square_with_n_p_degrees(n, p, k):
    assert wishart_moment(n, p, (1,) * k) == chi_square_moment(n * p, k)


@given(n=sizes, p=sizes, exponents=exponent_lists)
def test_another_trace_multiplies_a_moment_by_the_mean_of_a_scaled_chi_square(n, p, exponents):
    # tr W is independent of W / tr W, and the moment is homogeneous in W.
    expected = (n * p + 2 * sum(exponents)) * wishart_moment(n, p, exponents)
    assert wishart_moment(n, p, (*exponents, 1)) == expected


@given(n=sizes, p=sizes, exponents=exponent_lists)
def test_a_zeroth_power_multiplies_a_moment_by_p(n, p, exponents):
    assert wishart_moment(n, p, (0, *exponents)) == p * wishart_moment(n, p, exponents)


@given(n=sizes, p=sizes, exponents=st.lists(st.integers(1, 4), max_size=3).map(tuple))
def test_rows_and_dimensions_are_interchangeable(n, p, exponents):
    assert wishart_moment(n, p, exponents) == wishart_moment(p, n, exponents)


@given(n=sizes, p=sizes, data=st.data())
def test_the_order_of_the_exponents_does_not_matter(n, p, data):
    exponents = data.draw(exponent_lists)
    shuffled = tuple(data.draw(st.permutations(exponents)))
    assert wishart_moment(n, p, exponents) == wishart_moment(n, p, shuffled)


def test_the_fourth_moment_of_five_rows_in_thirty_dimensions():
    assert Fraction(wishart_moment(5, 30, (4,)), 5**4 * 30) == Fraction("539.84")


def test_moments_of_huge_matrices_stay_exact():
    n, p = 10**9 + 7, 10**9 + 9
    moment = wishart_moment(n, p, (2, 1, 1))
    assert type(moment) is int
    assert moment == n * p * (n + p + 1) * (n * p + 4) * (n * p + 6)


@pytest.fixture(scope="module")
def traces():
    """tr W^k, k = 0..4, of 200 000 draws with n = 4, p = 3."""
    X = np.random.default_rng(0).standard_normal((200_000, 4, 3))
    eigenvalues = np.linalg.eigvalsh(X.swapaxes(1, 2) @ X)
    return [np.sum(eigenvalues**k, axis=1) for k in range(5)]


@pytest.mark.parametrize("exponents", ((3,), (4,), (1, 2), (2, 2), (1, 3), (1, 1, 2), (1, 2, 2)))
def test_moments_agree_with_simulation(traces, exponents):
    sampled = prod(traces[k] for k in exponents)
    assert abs(z_score(sampled, wishart_moment(4, 3, exponents))) < 4


@pytest.mark.parametrize("name", ("n", "p"))
@pytest.mark.parametrize("function", (wishart_moment, normalized_moment, wishart_quadrature))
@pytest.mark.parametrize(
    ("size", "error"), ((0, ValueError), (-2, ValueError), (2.0, TypeError), (True, TypeError))
)
def test_bad_sizes_are_rejected_by_name(function, name, size, error):
    arguments = {"n": 3, "p": 3, name: size}
    if function is not wishart_quadrature:
        arguments["exponents"] = (1,)
    with pytest.raises(error, match=rf"^{name} must be"):
        function(**arguments)


@pytest.mark.parametrize(
    ("k", "error"), ((-1, ValueError), (1.0, TypeError), (True, TypeError), ("1", TypeError))
)
def test_bad_exponents_are_rejected(k, error):
    with pytest.raises(error, match=r"exponents must be"):
        wishart_moment(3, 3, (1, k))


@pytest.mark.parametrize(("order", "error"), ((0, ValueError), (-1, ValueError), (2.5, TypeError)))
def test_bad_orders_are_rejected(order, error):
    with pytest.raises(error, match=r"^order must be"):
        wishart_quadrature(3, 3, order)


@pytest.mark.parametrize("bad", ((6.0, 4, 3), (6, 4.0, 3), (6, 4, 3.0)))
def test_a_float_size_is_rejected_after_the_equal_integer_was_accepted(bad):
    wishart_quadrature(6, 4, 3)
    with pytest.raises(TypeError, match=r"must be an integer"):
        wishart_quadrature(*bad)


@pytest.mark.parametrize("exponents", ((1,), (4,), (2, 2), (1, 3)))
def test_a_normalized_moment_divides_by_n_and_p(exponents):
    n, p = 5, 30
    exact = Fraction(wishart_moment(n, p, exponents), n ** sum(exponents) * p ** len(exponents))
    assert normalized_moment(n, p, exponents) == float(exact)


@pytest.mark.parametrize("k", range(1, 8))
def test_moments_of_large_square_matrices_approach_the_catalan_numbers(k):
    # Marchenko-Pastur at ratio one; the correction is of order k^2/n.
    assert normalized_moment(10**7, 10**7, (k,)) == pytest.approx(
        comb(2 * k, k) / (k + 1), rel=1e-5
    )


SHAPES = ((1, 1), (1, 12), (5, 30), (12, 12), (40, 7))


@pytest.mark.parametrize("order", (1, 2, 5, 8))
@pytest.mark.parametrize(("n", "p"), SHAPES)
def test_the_quadrature_integrates_every_moment_below_twice_its_order(n, p, order):
    nodes, weights = wishart_quadrature(n, p, order)
    for k in range(2 * order):
        assert nodes**k @ weights == pytest.approx(normalized_moment(n, p, (k,)), rel=1e-11)


@pytest.mark.parametrize(("n", "p"), SHAPES)
def test_the_default_quadrature_is_exact_up_to_the_nineteenth_moment(n, p):
    nodes, weights = wishart_quadrature(n, p)
    assert nodes**19 @ weights == pytest.approx(normalized_moment(n, p, (19,)), rel=1e-11)
    assert nodes**20 @ weights < normalized_moment(n, p, (20,)) * (1 - 1e-9)  # Gauss is low here


@pytest.mark.parametrize(("n", "p"), SHAPES)
def test_nodes_increase_from_zero_and_weights_are_a_probability(n, p):
    nodes, weights = wishart_quadrature(n, p)
    assert nodes[0] >= 0
    assert np.all(np.diff(nodes) > 0)
    assert np.all(weights > 0)
    assert weights.sum() == pytest.approx(1, rel=1e-14)


@pytest.mark.parametrize(("n", "p"), SHAPES)
def test_there_is_an_atom_at_zero_exactly_when_rows_are_fewer_than_dimensions(n, p):
    nodes, weights = wishart_quadrature(n, p, 4)
    assert len(nodes) == len(weights) == 4 + (p > n)
    assert (nodes[0] == 0) == (p > n)
    if p > n:
        assert weights[0] == pytest.approx(1 - n / p, rel=1e-15)


@pytest.mark.parametrize("function", (lambda x: np.exp(-x), lambda x: 1 / (x + 1)))
@pytest.mark.parametrize(("n", "p"), ((5, 12), (8, 8), (20, 6)))
def test_the_quadrature_of_smooth_functions_agrees_with_simulation(n, p, function):
    X = np.random.default_rng(1).standard_normal((10_000, n, p))
    sampled = function(np.linalg.eigvalsh(X.swapaxes(1, 2) @ X / n)).mean(axis=1)
    nodes, weights = wishart_quadrature(n, p)
    assert abs(z_score(sampled, function(nodes) @ weights)) < 4


def test_a_caller_cannot_change_the_cached_quadrature():
    nodes, _ = wishart_quadrature(5, 3)
    with pytest.raises(ValueError, match=r"read-only"):
        nodes[0] = 7.0
