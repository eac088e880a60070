"""Moments of the random-coefficient model, on data of known moments."""

import numpy as np
import pytest

from negmaml.advice import random_coefficients
from tests.internals import RandomCoefficients, initial_shrinkage, updated_shrinkage


def grams(seed, groups, rows, p, sigma, spread, w0):
    """Gram matrices of (x, y) of groups of 2 to `rows` rows; the first feature is constant."""
    random = np.random.default_rng(seed)
    counts, out = random.integers(2, rows + 1, size=groups), []
    for n in counts:
        x = random.normal(size=(n, p))
        x[:, 0] = 1
        w = w0 + spread @ random.normal(size=p)
        z = np.c_[x, x @ w + sigma * random.normal(size=n)]
        out.append(z.T @ z)
    return np.stack(out), counts


@pytest.mark.parametrize(
    ("groups", "rows", "p"), [(600, 25, 3), (900, 4, 3), (900, 8, 10)],
    ids=["large groups", "groups of a few rows", "more coefficients than rows"],
)  # fmt: skip
def test_moments_are_found_whatever_the_size_of_groups(groups, rows, p):
    random = np.random.default_rng(5)
    spread = np.diag(np.linspace(0.5, 1.2, p))
    if p == 3:  # correlated; with more than 8 coefficients independent ones are assumed
        spread = spread + 0.3 * np.tril(random.normal(size=(p, p)), -1)
    w0, sigma = np.linspace(-1, 1, p), 1.5
    found = [random_coefficients(*grams(s, groups, rows, p, sigma, spread, w0)) for s in range(8)]
    for values, true in (
        ([f.mean for f in found], w0),
        ([f.covariance for f in found], spread @ spread.T),
        ([f.noise_variance for f in found], sigma**2),
    ):
        values = np.stack(values)
        error = values.std(0, ddof=1) / len(values) ** 0.5
        assert np.all(abs(values.mean(0) - true) < 5 * error + 0.02)
        assert np.all(error < 0.15)


@pytest.mark.parametrize(
    ("structure", "deviations"),
    [("intercept", (0.8, 0, 0)), ("equal", (0.8, 0.5, 0.5))],
    ids=["random intercept", "equal slopes"],
)
@pytest.mark.parametrize("p", [3, 9])  # with more than 8 coefficients Omega is diagonal
def test_a_structure_finds_its_own_moments_and_has_its_form(structure, deviations, p):
    spread = np.diag([*deviations[:1], *[deviations[1]] * (p - 1)])
    w0, sigma = np.linspace(-1, 1, p), 1.0
    found = [
        random_coefficients(*grams(s, 400, 12, p, sigma, spread, w0), structure=structure)
        for s in range(6)
    ]
    omega = np.stack([f.covariance for f in found])
    assert np.all(omega == omega * np.eye(p))
    slopes = np.diagonal(omega, axis1=1, axis2=2)[:, 1:]
    # The features have deviations of nearly one, the unit of equal slopes.
    np.testing.assert_allclose(slopes, slopes[:, :1] * np.ones(p - 1), rtol=0.1)
    for values, true in (
        (omega[:, 0, 0], 0.64),
        (slopes[:, 0], deviations[1] ** 2),
        (np.stack([f.noise_variance for f in found]), sigma**2),
    ):
        error = values.std(ddof=1) / len(values) ** 0.5
        assert abs(values.mean() - true) < 5 * error + 0.02


def test_noise_includes_what_a_structure_cannot_represent():
    spread = np.diag([0.0, 0.6, 0.6])
    gram, counts = grams(1, 800, 12, 3, 1.0, spread, np.ones(3))
    found = random_coefficients(gram, counts, structure="intercept")
    # Slopes of variance 0.36 in two directions of unit mean square are noise to this structure.
    assert found.noise_variance == pytest.approx(1 + 2 * 0.36, rel=0.1)
    assert found.covariance[0, 0] < 0.1


def test_identical_groups_have_no_covariance_and_it_is_never_negative():
    gram, counts = grams(0, 300, 12, 3, 1.0, np.zeros((3, 3)), np.ones(3))
    found = random_coefficients(gram, counts)
    assert np.linalg.eigvalsh(found.covariance)[0] >= -1e-12
    assert np.trace(found.covariance) < 0.05
    assert found.noise_variance == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("structure", ["intercept", "equal", "full"])
def test_noise_is_not_negative_where_rows_are_fitted_exactly(structure):
    """There are 5 groups of 2 rows each, some the same, with 8 coefficients."""
    random = np.random.default_rng(0)
    x, y = (
        random.normal(size=(200, 3, 2, 8)) * [1, 5, 1, 1, 9, 1, 1, 1],
        random.normal(size=(200, 3, 2, 1)),
    )
    z = np.concatenate([x, 30 + y], -1)[:, [0, 0, 0, 1, 2]]
    gram = np.swapaxes(z, -1, -2) @ z
    noise = [
        random_coefficients(g, np.full(5, 2), structure=structure).noise_variance for g in gram
    ]
    assert np.all(np.isfinite(noise)) and min(noise) >= 0


def test_one_group_is_refused():
    gram, counts = grams(0, 1, 12, 3, 1.0, np.eye(3), np.ones(3))
    with pytest.raises(ValueError, match="at least 2 groups"):
        random_coefficients(gram, counts)


def test_few_groups_without_noise_have_the_unbiased_covariance_of_their_slopes():
    rng = np.random.default_rng(0)
    slopes = rng.standard_normal((4, 2))
    rows = rng.standard_normal((4, 50, 2))
    z = np.concatenate([rows, np.einsum("gnp,gp->gn", rows, slopes)[..., None]], -1)
    gram = np.swapaxes(z, 1, 2) @ z
    found = random_coefficients(gram, np.full(4, 50), tau=1e-9)
    np.testing.assert_allclose(found.covariance, np.cov(slopes.T), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "times"), [(12, 1), (4, 1), (3, 10)], ids=["many", "some", "none"]
)
def test_the_first_shrinkage_is_the_mean_eigenvalue_of_a_group(rows, times):
    """Ten times that where groups of 3 coefficients leave hardly a row for residuals."""
    x = np.random.default_rng(0).normal(size=(40, rows, 4))
    gram, counts = np.swapaxes(x, 1, 2) @ x, np.full(40, rows)
    mean = np.linalg.eigvalsh(gram[:, :3, :3]).mean()
    first = initial_shrinkage(gram, counts)
    assert first == pytest.approx(times * mean)

    def following(noise, spread):
        found = RandomCoefficients(np.zeros(3), spread * np.eye(3), np.array(noise))
        return updated_shrinkage(found, gram, counts)

    assert following(2 * first, 2.0) == pytest.approx(first)
    assert following(10 * first, 2.0) == pytest.approx(5 * first)
    assert following(1.0, 0.0) == following(1e9, 1.0) == pytest.approx(30 * first)
    assert following(0.0, 1.0) == pytest.approx(first / 30 if times == 1 else first)
