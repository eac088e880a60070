"""Moments of features: spectra corrected for few points, fourth moments, and predictions."""

import jax
import numpy as np
import pytest

import negmaml as nm
from negmaml.theory import feature_moments, general_inputs

pytestmark = pytest.mark.usefixtures("x64")

P = 80
SPECTRA = {
    "identity": np.ones(P),
    "power": 5 * np.arange(1, P + 1) ** -1.0,
    "spike": np.append(60.0, np.ones(P - 1)),
    "two-level": np.repeat([4.0, 0.2], P // 2),
}


def sample(s, N, seed=0):
    return np.random.default_rng(seed).standard_normal((N, len(s))) * np.sqrt(s)


def freedom(s, x):
    """Degrees of freedom at a ridge x, as the theory sums them."""
    return np.sum(s / (s + x)), np.sum((s / (s + x)) ** 2)


@pytest.mark.parametrize("N", (40, 80, 320))
@pytest.mark.parametrize("name", SPECTRA)
def test_sums_over_the_corrected_spectrum_are_those_of_the_truth(name, N):
    s, X = SPECTRA[name], sample(SPECTRA[name], N)
    found = np.asarray(feature_moments(X).s)
    raw = np.zeros(P)
    raw[: min(N, P)] = np.linalg.eigvalsh(X @ X.T / N)[::-1][:P]
    assert found.shape == (P,)
    assert np.all(np.diff(found) <= 0)
    assert found.min() >= 0
    assert found.sum() == pytest.approx(raw.sum())
    x = s.mean()
    for there, here, uncorrected in zip(
        freedom(s, x), freedom(found, x), freedom(raw, x), strict=True
    ):
        assert here == pytest.approx(there, rel=0.12)  # of order 1/N, with one sample
        if N < P:
            assert abs(here - there) < abs(uncorrected - there)


def test_a_kernel_matrix_tells_what_features_do():
    X = sample(SPECTRA["power"], 50)
    of_features, of_kernel = feature_moments(X), feature_moments(kernel=X @ X.T, p=P)
    for one, other in zip(*map(jax.tree.leaves, (of_features, of_kernel)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9)


@pytest.mark.parametrize("N", (60, 2000))  # by the kernel, and along each eigenvector
def test_the_fourth_moment_sees_the_spread_of_lengths(N):
    lengths = np.random.default_rng(5).choice([0.6, np.sqrt(2 - 0.36)], N)
    s = SPECTRA["identity"]
    plain, spread = (feature_moments(X) for X in (sample(s, N), sample(s, N) * lengths[:, None]))
    assert plain.kurtosis == pytest.approx(1, abs=0.05)
    assert spread.kurtosis / plain.kurtosis == pytest.approx(
        np.mean(lengths**4) / np.mean(lengths**2) ** 2, rel=0.1
    )


@pytest.mark.parametrize("name", ("power", "identity"))
def test_features_of_random_length(name):
    """The spectrum is that of all lengths together, and squared lengths vary alike everywhere."""
    s, N = SPECTRA[name], 240
    squares = np.random.default_rng(5).permutation(np.repeat([0.4, 1.6], N // 2))
    found = feature_moments(sample(s, N) * np.sqrt(squares)[:, None])
    for there, here in zip(freedom(s, s.mean()), freedom(found.s, s.mean()), strict=True):
        assert here == pytest.approx(there, rel=0.12)
    bin_weights, covariance = found.fourth_moments
    some = np.asarray(bin_weights) @ (s / (s + s.mean()) / np.sum(s / (s + s.mean())))
    assert some @ covariance @ some == pytest.approx(squares.var(), rel=0.3)


def test_many_points_give_the_exact_moments():
    # Components with independent signs: F is diagonal, s_k tr S^2 + (E x^4 - s_k^2) s_k.
    s = np.array([2.0, 1.0, 0.5])
    X = np.random.default_rng(1).uniform(-1, 1, (20_000, 3)) * np.sqrt(3 * s)
    found = feature_moments(X)
    expected = s * np.sum(s**2) + (9 / 5 - 1) * s**3
    np.testing.assert_allclose(found.s, s, rtol=0.05)
    np.testing.assert_allclose(found.fourth, expected, rtol=0.08)


@pytest.mark.parametrize("p", (12, pytest.param(P, marks=pytest.mark.slow)))
def test_gaussian_features_predict_what_their_problem_does(p):
    found = feature_moments(sample(SPECTRA["power"][:p], 5 * p))
    options = dict(m=4, n_t=20, n_v=5, n_r=10, sigma=0.5, nu=1.0)
    problem = found.problem(**options)
    s = found.s
    none = found.fourth_moments._replace(covariance=np.zeros_like(found.fourth_moments.covariance))
    gaussian = found._replace(fourth=s * np.sum(s**2) + 2 * s**3, fourth_moments=none)
    train, adapt = nm.GradientDescent(-0.2), nm.GradientDescent(np.array([-0.1, 0.0, 0.1]))
    np.testing.assert_allclose(
        gaussian.test_loss(problem, train, adapt),
        nm.theory.test_loss(problem, train, adapt),
        rtol=1e-9,
    )


def test_theorem_3_of_diagonals_is_that_of_matrices():
    s, o, F = SPECTRA["power"][:20], np.linspace(0.1, 0.3, 20), np.linspace(9.0, 1.0, 20)
    rules = (
        nm.GradientDescent(np.array([-0.3, 0.0, 0.2])),
        nm.GradientDescent(np.array([0.1, -0.2])),
    )
    sizes = dict(m=2, n_t=5, n_v=3, n_r=4, sigma=0.5)
    for fourth in (None, F):
        full = general_inputs(
            np.diag(s), np.diag(o), *rules, **sizes,
            fourth_moment=None if fourth is None else np.diag(fourth),
        )  # fmt: skip
        found = general_inputs(s, o, *rules, **sizes, fourth_moment=fourth)
        np.testing.assert_allclose(found, full, rtol=1e-12)
    with pytest.raises(ValueError, match=r"^covariance must hold eigenvalues of at least 0"):
        general_inputs(-s, o, *rules, **sizes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ((), "give either features"),
        ((np.ones((3, 2)), np.eye(3)), "give either features"),
        ((np.ones(3),), r"features must have shape \(N, p\)"),
        ((np.ones((1, 3)),), r"features must have shape \(N, p\) with N >= 2"),
        ((np.zeros((4, 3)),), "features must not be all zero"),
        ((np.full((4, 3), np.nan),), "features must be finite"),
        ((None, np.eye(3)), "p, the dimension of the features, must be given"),
        ((None, np.ones((3, 2))), r"kernel must be a symmetric matrix"),
    ),
)
def test_what_is_no_sample_of_features_is_refused(arguments, message):
    features, kernel = (*arguments, None, None)[:2]
    with pytest.raises(ValueError, match=message):
        feature_moments(features, kernel=kernel)


@pytest.mark.parametrize(("points", "p"), ((30, 10), (40, 20)))
def test_flat_gaussian_features_have_no_fourth_moments_on_average(points, p):
    rng = np.random.default_rng(0)
    found = [feature_moments(rng.standard_normal((points, p))).fourth_moments for _ in range(100)]
    means = np.array([np.mean(np.asarray(x.covariance)) for x in found])
    traces = np.array([np.trace(np.asarray(x.covariance)) for x in found])
    for values in (means, traces):
        assert abs(values.mean()) < 3 * values.std() / len(values) ** 0.5


def test_the_kurtosis_is_made_of_sums_over_different_points():
    X = np.random.default_rng(1).standard_normal((7, 3)) * np.array([1.0, 2.0, 0.5])
    K, N = X @ X.T, len(X)
    pairs = [(i, j) for i in range(N) for j in range(N) if i != j]
    triples = [(i, j, k) for i, j in pairs for k in range(N) if k not in (i, j)]
    total = np.mean([K[i, i] * K[i, j] ** 2 for i, j in pairs])
    squares = np.mean([K[i, j] ** 2 for i, j in pairs])
    cubes = np.mean([K[i, j] * K[j, k] * K[k, i] for i, j, k in triples])
    expected = total / (np.diagonal(K).mean() * squares + 2 * cubes)
    assert feature_moments(X).kurtosis == pytest.approx(expected, rel=1e-9)
    assert feature_moments(kernel=K, p=3).kurtosis == pytest.approx(expected, rel=1e-9)


def test_the_old_name_of_fourth_moments_warns():
    found = feature_moments(sample(SPECTRA["identity"], 30))
    with pytest.warns(DeprecationWarning, match="use fourth_moments"):
        assert found.together is found.fourth_moments
