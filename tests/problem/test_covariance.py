"""Problems with covariances: checks, modes, roots, and exact means against plain NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm
from negmaml.problem import adapted, filter_means
from tests.helpers import RATES, mostly_slow, z_score
from tests.internals import filtered_covariance, symmetric_sqrt

P, N = 5, 4
rng = np.random.default_rng(0)
FRAME = np.linalg.qr(rng.standard_normal((P, P)))[0]
VALUES = np.array([3.0, 1.0, 0.5, 0.1, 0.0])
MATRIX = FRAME * VALUES @ FRAME.T
TASKS = np.cov(rng.standard_normal((P, 20)))
KINDS = ("input_covariance", "weight_covariance")


def build(**changes):
    sizes = dict(p=P, m=2, n_t=3, n_v=4, n_r=N, sigma=0.5, nu=0.7)
    return nm.MixedLinearRegression(**{**sizes, **changes})


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("value", "message"),
    (
        (np.ones(4), r"must be None \(the identity\), eigenvalues of shape \(5,\) or a matrix"),
        (np.eye(4), r"must be .* got shape \(4, 4\)"),
        (2.0, r"must be .* got shape \(\)"),
        (np.array([1, 1, 1, 1, -1e-3]), "must hold eigenvalues of at least 0, got one of -0.001"),
        (np.array([1, np.nan, 1, 1, 1]), "must be finite"),
        (np.triu(np.ones((5, 5))), "must be symmetric, got entries that differ by 1"),
        (MATRIX - 0.01 * np.eye(P), "must be positive semidefinite, got an eigenvalue of -0.01"),
        (np.full((5, 5), np.inf), "must be finite"),
    ),
)
def test_what_is_no_covariance_is_rejected_by_name(name, value, message):
    with pytest.raises(ValueError, match=rf"^{name} {message}"):
        build(**{name: value})


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_singular_covariances_and_their_rounding_are_allowed(name, dtype):
    for value in (VALUES.astype(dtype), MATRIX.astype(dtype), np.zeros(P), np.zeros((P, P))):
        assert not build(**{name: value}).isotropic
    assert build().isotropic


@pytest.mark.parametrize("weights", (None, VALUES, TASKS))
@pytest.mark.parametrize("inputs", (None, VALUES, MATRIX))
def test_modes_are_the_problem_in_the_eigenbasis_of_its_inputs(inputs, weights, x64):
    offset = np.arange(P) / P
    found = build(input_covariance=inputs, weight_covariance=weights, omega0=offset, w0=0.3).modes
    full = [np.eye(P) if c is None else np.diag(c) if c.ndim == 1 else c for c in (inputs, weights)]
    # Sums of functions of s over o and d do not depend on the order or choice of eigenvectors.
    for power in range(3):
        sigma = np.linalg.matrix_power(full[0], power)
        assert np.sum(found.s**power) == pytest.approx(np.trace(sigma))
        assert np.sum(found.s**power * found.o) == pytest.approx(
            0.7**2 / P * np.trace(sigma @ full[1])
        )
        gap = offset - 0.3
        assert np.sum(found.s**power * found.d) == pytest.approx(gap @ sigma @ gap)


def test_modes_are_differentiable_and_map_over_spectra(x64):
    def total(s):
        modes = build(input_covariance=s, omega0=1.0).modes
        return jnp.sum(modes.s**2 * modes.o + modes.d / (1 + modes.s))

    spectra = jnp.stack([jnp.asarray(VALUES), jnp.ones(P)])
    slopes = jax.vmap(jax.grad(total))(spectra)
    expected = 2 * spectra * 0.7**2 / P - 1 / (1 + spectra) ** 2
    np.testing.assert_allclose(slopes, expected, rtol=1e-12)


def test_the_root_has_a_derivative_where_eigenvalues_coincide(x64):
    direction = TASKS / 2
    found, slope = jax.jvp(symmetric_sqrt, (jnp.eye(P) * 4.0,), (jnp.asarray(direction),))
    np.testing.assert_allclose(found, 2 * np.eye(P), atol=1e-14)
    np.testing.assert_allclose(slope, direction / 4, atol=1e-14)  # R dR + dR R = dSigma
    root = symmetric_sqrt(jnp.asarray(MATRIX))
    np.testing.assert_allclose(root @ root, MATRIX, atol=1e-14)


@pytest.fixture(scope="module")
def samples():
    """Spectra and eigenvectors of 40,000 S, in NumPy."""
    X = np.random.default_rng(1).standard_normal((40_000, N, P)) * VALUES**0.5
    return np.linalg.eigh(X.swapaxes(1, 2) @ X / N)


@pytest.mark.parametrize(
    "rule",
    mostly_slow(
        (
            *(nm.GradientDescent(a, 2) for a in (-0.3, 0.0, 0.4)),
            nm.GradientDescent(-0.1, 4),
            nm.Momentum(0.2, 0.5, steps=3),
            nm.GradientFlow(-0.2),
            nm.GradientFlow(0.6),
            nm.Proximal(0.8),
        ),
        0, 5,
    ),
)  # fmt: skip
def test_the_mean_of_b_sigma_b_agrees_with_sampled_matrices(rule, samples, x64):
    x, V = samples
    b, q = np.asarray(rule.init_filter(x)), np.asarray(rule.label_filter(x))
    matrices = np.einsum("npk,nk,nqk->npq", V, b, V, optimize=True)
    found, noise = filtered_covariance(rule, jnp.asarray(VALUES), N)
    spread = (
        2e-3 if rule.spectral().degree is None else 0
    )  # its own standard error, at this small size
    for values, mean in (
        (np.sum(matrices**2 @ VALUES, -1), found.sum()),
        ((matrices**2 @ VALUES)[:, 0], found[0]),
        (np.einsum("npk,nk,p->n", V**2, q**2 * x, VALUES, optimize=True), noise),
    ):
        error = values.std() / len(values) ** 0.5 + spread * values.mean()
        assert abs(values.mean() - float(mean)) <= 4 * error


@pytest.mark.slow
@pytest.mark.parametrize("steps", mostly_slow((1, 2, 3), 1))
def test_at_the_identity_it_is_the_isotropic_mean(steps, x64):
    rule = nm.GradientDescent(jnp.array(RATES), steps)
    found, noise = filtered_covariance(rule, jnp.ones(P), N)
    h, per_dimension = filter_means(rule, N, P)
    np.testing.assert_allclose(found, np.broadcast_to(h[:, None], found.shape), rtol=1e-11)
    np.testing.assert_allclose(noise, P * per_dimension, rtol=1e-11)


@pytest.mark.parametrize("rate", (-0.4, 0.0, 0.3))
def test_the_expected_loss_given_three_forms_agrees_with_simulated_tasks(rate, x64):
    problem = build(input_covariance=MATRIX, weight_covariance=TASKS)
    local, tasks, points = np.random.default_rng(2), 30_000, 4
    error = np.linspace(-0.5, 0.6, P)
    root = FRAME * VALUES**0.5 @ FRAME.T
    w = 0.7 / P**0.5 * local.standard_normal((tasks, P)) @ np.linalg.cholesky(TASKS).T
    X, X_v = (local.standard_normal((tasks, n, P)) @ root for n in (N, points))
    y, y_v = (
        np.einsum("tnp,tp->tn", x, w) + 0.5 * local.standard_normal(x.shape[:2]) for x in (X, X_v)
    )
    theta = error - rate / N * np.einsum("tnp,tn->tp", X, X @ error - y)
    losses = np.mean((np.einsum("tnp,tp->tn", X_v, theta) - y_v) ** 2, 1) / 2
    forms = [error @ np.linalg.matrix_power(MATRIX, j) @ error for j in (1, 2, 3)]
    found = nm.theory.expected_test_loss(problem, jnp.array(forms), nm.GradientDescent(rate))
    assert abs(z_score(losses, float(found))) < 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "steps"), mostly_slow((((), 1), ((2, 3), 1), ((), 2), ((2,), 2)), 1, 3)
)
def test_the_loss_has_the_shape_of_the_forms_and_then_of_the_rule(shape, steps):
    problem = build(input_covariance=VALUES)
    plan = adapted(problem, nm.GradientDescent(jnp.full(shape, 0.1), steps))
    forms = plan.forms(jnp.ones((4, P)))
    assert plan.test_loss(forms).shape == (4, *shape)


def test_identity_covariances_given_as_such_change_nothing(x64):
    rule, gap = nm.GradientDescent(jnp.array(RATES)), np.full(P, 0.2)
    plain = nm.theory.expected_test_loss(build(), gap @ gap, rule)
    for covariance in (np.ones(P), np.eye(P)):
        given = build(input_covariance=covariance, weight_covariance=covariance)
        plan = adapted(given, rule)
        np.testing.assert_allclose(plan.test_loss(plan.forms(gap)), plain, rtol=1e-12)


def test_a_metric_is_refused_where_the_loss_needs_the_place_of_omega():
    rule = nm.Preconditioned(0.1, np.arange(1.0, P + 1))
    with pytest.raises(ValueError, match="evaluation='sampled'"):
        adapted(build(input_covariance=VALUES), rule)


def test_a_new_covariance_does_not_retrace():
    traces = []

    @jax.jit
    def trace(problem):
        traces.append(0)
        return jnp.sum(problem.modes.s)

    values = [float(trace(build(input_covariance=k * VALUES))) for k in (1.0, 2.0)]
    assert values == pytest.approx([4.6, 9.2])
    assert len(traces) == 1
    with pytest.raises(ValueError, match="input_covariance"):
        dataclasses.replace(build(), input_covariance=-VALUES)
