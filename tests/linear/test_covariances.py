"""Simulation of problems with covariances: against dense NumPy, and sampled against expected."""

import dataclasses
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm
from negmaml import linear
from tests.helpers import mostly_slow, z_score
from tests.internals import input_range
from tests.linear.dense import dense_system

P = 8
rng = np.random.default_rng(0)
FRAME = np.linalg.qr(rng.standard_normal((P, P)))[0]
VALUES = 4.0 * np.arange(1, P + 1) ** -1.5
MATRIX = FRAME * VALUES @ FRAME.T
TASKS = np.cov(rng.standard_normal((P, 30)))
RATES = jnp.array([-0.3, 0.0, 0.2])
KEY = jax.random.key(3)


def build(m=2, n_v=2, **changes):
    offsets = dict(w0=np.linspace(-0.3, 0.4, P), omega0=0.2)
    sizes = dict(p=P, m=m, n_t=6, n_v=n_v, n_r=5, sigma=0.5, nu=1.0)
    return nm.MixedLinearRegression(**{**sizes, **offsets, **changes})


COLOURED = (
    dict(input_covariance=VALUES),
    dict(input_covariance=MATRIX, weight_covariance=TASKS),
    dict(weight_covariance=VALUES),
)


@pytest.mark.parametrize("changes", COLOURED)
def test_inputs_and_tasks_have_their_covariances(changes, x64):
    problem = build(m=4000, n_v=1, sigma=0.0, **changes)
    problem = dataclasses.replace(problem, n_t=1, omega0=0.0, w0=0.0)
    data = jax.jit(linear.sample)(KEY, problem)
    X, y = np.asarray(data.X_t)[:, 0], np.asarray(data.y_t)[:, 0]
    sigma = changes.get("input_covariance", np.ones(P))
    sigma = np.diag(sigma) if sigma.ndim == 1 else sigma
    omega = changes.get("weight_covariance", np.ones(P))
    omega = np.diag(omega) if omega.ndim == 1 else omega
    for u in np.eye(P)[:2], FRAME[:2]:
        for a, b in ((u[0], u[0]), (u[0], u[1])):
            assert abs(z_score((X @ a) * (X @ b), a @ sigma @ b)) < 4
    assert abs(z_score(y**2, np.trace(sigma @ omega) / P)) < 4


SHAPES = (2, 2), (6, 4), (2, 4)  # wide, tall, square


@pytest.mark.parametrize(("changes", "shape"), mostly_slow(list(product(COLOURED, SHAPES)), 0, 4))
def test_a_run_is_the_dense_solution_and_its_loss_the_quadratic_form(changes, shape, x64):
    problem, adapt = build(*shape, **changes), nm.GradientDescent(jnp.array([-0.1, 0.3]))
    ridge = 0.1 if shape == (2, 4) else 0.0
    found = nm.simulate(KEY, problem, nm.GradientDescent(RATES), adapt, runs=2, meta_ridge=ridge)
    sigma = changes.get("input_covariance", np.ones(P))
    sigma = np.diag(sigma) if sigma.ndim == 1 else sigma
    floor = nm.theory.expected_test_loss(problem, jnp.zeros(3), adapt)
    data = linear.sample(jax.random.fold_in(KEY, 0), problem)
    for i, rate in enumerate(RATES):
        Phi, r = dense_system(data, nm.GradientDescent(float(rate)))
        start = np.full(P, 0.2)
        gap = r - Phi @ start
        step = (
            np.linalg.solve(Phi.T @ Phi + ridge * np.eye(P), Phi.T @ gap)
            if ridge
            else (np.linalg.pinv(Phi) @ gap)
        )
        error = start + step - problem.w0
        assert float(found.weight_error[i, 0]) == pytest.approx(error @ error, rel=1e-8)
        for j, a in enumerate((-0.1, 0.3)):
            square = sigma @ sigma
            H = sigma - 2 * a * square + a**2 / 5 * (6 * square @ sigma + np.trace(square) * sigma)
            expected = floor[j] + error @ H @ error / 2
            assert float(found.test_loss[i, j, 0]) == pytest.approx(float(expected), rel=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("train", "adapt"),
    (
        (nm.GradientDescent(RATES), nm.GradientDescent(jnp.array([-0.15, 0.0, 0.25]))),
        pytest.param(
            nm.GradientDescent(-0.1, 2), nm.GradientDescent(0.1, 3), marks=pytest.mark.slow
        ),
        pytest.param(
            nm.Proximal(0.5), nm.GradientFlow(jnp.array([-0.1, 0.4])), marks=pytest.mark.slow
        ),
    ),
)
def test_sampled_minus_expected_loss_is_zero_on_average(train, adapt, x64):
    problem = build(4, 3, input_covariance=VALUES, weight_covariance=TASKS)
    expected, sampled = (
        nm.simulate(KEY, problem, train, adapt, runs=60, meta_ridge=0.2, evaluation=evaluation)
        for evaluation in ("expected", "sampled")
    )
    np.testing.assert_allclose(expected.weight_error, sampled.weight_error)
    gaps = np.asarray(sampled.test_loss - expected.test_loss).reshape(-1, 60)
    assert max(abs(z_score(gap, 0.0)) for gap in gaps) < 4


@pytest.mark.slow
def test_identity_covariances_simulate_what_the_isotropic_problem_does(x64):
    train, adapt = nm.GradientDescent(RATES), nm.GradientDescent(RATES)
    plain = nm.simulate(KEY, build(), train, adapt, runs=5)
    given = build(input_covariance=np.eye(P), weight_covariance=np.ones(P))
    found = nm.simulate(KEY, given, train, adapt, runs=5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10), plain, found)


@pytest.mark.slow
@pytest.mark.parametrize("shape", mostly_slow((((2, 2),), ((6, 4),)), 0))
def test_directions_without_variance_are_never_left(shape, x64):
    zeros = np.where(np.arange(P) < 5, VALUES, 0.0)
    diagonal = build(*shape, input_covariance=zeros, weight_covariance=TASKS)
    turned = dataclasses.replace(
        diagonal,
        input_covariance=FRAME * zeros @ FRAME.T,
        weight_covariance=FRAME @ TASKS @ FRAME.T,
        w0=FRAME @ diagonal.w0,
        omega0=FRAME @ np.full(P, 0.2),
    )
    train, adapt = nm.GradientDescent(RATES), nm.GradientDescent(0.2)
    for problem in (diagonal, turned):
        reduced, unmoved = input_range(problem)
        assert reduced.p == 5
        assert float(unmoved) == pytest.approx(np.sum((0.2 - diagonal.w0[5:]) ** 2))
        found = nm.simulate(KEY, problem, train, adapt, runs=300)
        assert bool(found.well_conditioned.all())
        assert float(found.weight_error.min()) > float(unmoved)
        means = found.test_loss.mean(-1), found.test_loss.std(-1, ddof=1) / 300**0.5
        if problem is diagonal:
            first = means
    gap = np.abs(means[0] - first[0]) / np.hypot(means[1], first[1])
    assert gap.max() < 4  # the same problem in other coordinates, other draws


@pytest.mark.slow
def test_gradients_in_covariances_and_the_rest_are_finite_differences(x64):
    def loss(scale, sigma, rate):
        problem = build(input_covariance=scale * MATRIX, sigma=sigma, weight_covariance=TASKS)
        rule = nm.GradientDescent(rate)
        return nm.simulate(KEY, problem, rule, rule, runs=3).test_loss.mean()

    point = 1.2, 0.4, -0.1
    loss = jax.jit(loss)
    slopes = jax.grad(loss, (0, 1, 2))(*point)
    for i, slope in enumerate(slopes):
        step = 1e-5 * np.eye(3)[i]
        difference = (loss(*(point + step)) - loss(*(point - step))) / 2e-5
        assert float(slope) == pytest.approx(float(difference), rel=1e-6)


def test_a_spectrum_of_condition_1e8_is_solved_reliably(x64):
    problem = build(6, 4, input_covariance=np.geomspace(1, 1e-8, P))
    found = nm.simulate(KEY, problem, nm.GradientDescent(RATES), nm.GradientDescent(0.2), runs=3)
    data = linear.sample(jax.random.fold_in(KEY, 0), problem)
    Phi, r = dense_system(data, nm.GradientDescent(float(RATES[0])))
    exact = np.full(P, 0.2) + np.linalg.lstsq(Phi, r - Phi @ np.full(P, 0.2), rcond=1e-15)[0]
    assert bool(found.well_conditioned.all())
    assert float(found.weight_error[0, 0]) == pytest.approx(
        np.sum((exact - problem.w0) ** 2), rel=1e-5
    )
