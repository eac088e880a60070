"""The task error of filters that vary by powers of ten within the spectrum."""

import dataclasses

import jax
import numpy as np
import pytest

import negmaml as nm
from tests.internals import (
    Spectrum,
    evaluate_filters,
    isotropic_inputs,
    leading,
    log_scatter_factor,
    solve_saddle,
)

FEW = nm.MixedLinearRegression(p=32, m=3, n_t=14, n_v=5, n_r=10, sigma=0.5, nu=1.0)
FEWER = nm.MixedLinearRegression(p=24, m=2, n_t=10, n_v=4, n_r=10, sigma=0.5, nu=1.0)


@pytest.mark.parametrize(
    ("problem", "rule", "simulated", "error"),
    (
        (FEW, nm.GradientDescent(1.0, 2), 7.217, 0.026),
        (FEW, nm.GradientDescent(1.0, 4), 57.95, 0.91),
        (FEW, nm.GradientDescent(1.0, 5), 201.9, 4.7),
        (FEW, nm.GradientDescent(1.0, 7), 3618, 303),
        (FEW, nm.GradientFlow(-1.0), 119.5, 0.82),
        (FEW, nm.GradientFlow(-1.5), 2037.7, 29.4),
        (FEWER, nm.GradientDescent(-0.6, 4), 655.9, 7.2),
        (FEWER, nm.GradientDescent(-0.6, 6), 35442, 816),
        (FEWER, nm.GradientFlow(-1.0), 89.8, 1.4),
    ),
)
def test_the_task_error_is_that_of_thirty_thousand_runs_of_numpy(problem, rule, simulated, error):
    """The mean and its error over 30,000 runs, by code that is not the package's."""
    found = float(nm.theory.train_task_error(problem, rule))
    assert abs(found - simulated) < 2 * error + 0.06 * simulated


def run(rng, problem, filters):
    """The error on fresh query rows of the training tasks, exactly, and |omega* - w0|^2."""
    p, Phi, e, adapted = problem.p, [], [], []
    for _ in range(problem.m):
        X = rng.standard_normal((problem.n_t, p))
        x, V = np.linalg.eigh(X.T @ X / problem.n_t)
        b, q = (V * f @ V.T for f in filters(np.maximum(x, 0)))
        noise = problem.sigma * rng.standard_normal(problem.n_t)
        u = b @ rng.standard_normal(p) * problem.nu / p**0.5 - q @ X.T @ noise / problem.n_t
        Z = rng.standard_normal((problem.n_v, p))
        Phi.append(Z @ b)
        e.append(Z @ u + problem.sigma * rng.standard_normal(problem.n_v))
        adapted.append((b, u))
    omega = np.linalg.lstsq(np.concatenate(Phi), np.concatenate(e), rcond=None)[0]
    gaps = [np.sum((b @ omega - u) ** 2) for b, u in adapted]
    return problem.sigma**2 + np.mean(gaps)


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "allowed"), ((3, 0.03), (4, 0.06)))
def test_simulation_is_met_where_the_filter_is_steep(steps, allowed):
    def filters(x):
        b = (1 - x) ** steps
        return b, np.where(x > 1e-12, (1 - b) / np.where(x > 1e-12, x, 1), steps)

    rng = np.random.default_rng(0)
    errors = np.array([run(rng, FEW, filters) for _ in range(3000)])
    found = float(nm.theory.train_task_error(FEW, nm.GradientDescent(1.0, steps)))
    mean = errors.mean()
    assert abs(found - mean) < 3 * errors.std() / len(errors) ** 0.5 + allowed * mean


def test_the_pole_is_at_the_threshold_and_nowhere_else(x64):
    """Without task weights and inner step the mean is that of an inverse Wishart matrix."""
    p, sigma = 30, 0.5
    for m, n_v in ((2, 5), (13, 2), (28, 1), (2, 40), (33, 1)):
        N = m * n_v
        exact = (max(p, N) - 1) / (abs(p - N) - 1) * sigma**2
        problem = nm.MixedLinearRegression(p=p, m=m, n_t=20, n_v=n_v, n_r=9, sigma=sigma, nu=0.0)
        found = float(nm.theory.train_task_error(problem, nm.GradientDescent(0.0)))
        assert found == pytest.approx(exact, rel=1e-9)
    rates = nm.GradientDescent(np.linspace(-1.5, 1.5, 13), 7)
    assert np.isfinite(nm.theory.train_task_error(FEW, rates)).all()


@pytest.mark.parametrize("rate", (-0.4, 0.5, 1.1))
def test_one_task_with_rows_enough_has_the_task_error_of_least_squares(rate, x64):
    problem = nm.MixedLinearRegression(p=46, m=1, n_t=31, n_v=141, n_r=10, sigma=0.5, nu=1.0)
    expected = 0.25 * 140 / 94
    found = nm.theory.train_task_error(problem, nm.GradientDescent(rate, 2))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_the_variance_over_spectra_is_that_of_the_limit(x64):
    """v against the task errors of the limit at 300 spectra of Wishart matrices."""
    rule = nm.GradientDescent(-0.6, 4)
    inputs, (rule,) = isotropic_inputs(FEWER, (rule,), 0.0, "marchenko-pastur")

    def limit(inputs):
        found = solve_saddle(evaluate_filters(inputs, rule).training, False)
        error = leading(found.system, found.at)[1]
        unit = np.exp(2 * found.system.log_amplitude + found.root.log_kappa)
        return found, error, np.log(error * unit)

    found, error, _ = limit(inputs)
    v = 2 * log_scatter_factor(found.system, found.at, error, 0.0)
    rng = np.random.default_rng(0)
    logs = []
    for _ in range(300):
        X = rng.standard_normal((FEWER.n_t, FEWER.p))
        x = np.append(np.linalg.eigvalsh(X @ X.T / FEWER.n_t), 0.0)
        share = np.append(np.full(FEWER.n_t, 1 / FEWER.p), 1 - FEWER.n_t / FEWER.p)
        spectrum = Spectrum(x, share)
        logs.append(limit(dataclasses.replace(inputs, quadrature=spectrum))[2])
    assert v == pytest.approx(np.var(logs), rel=0.25)


@pytest.mark.slow
def test_derivatives_of_the_task_error_are_those_of_differences(x64):
    def error(rate):
        return nm.theory.train_task_error(FEW, nm.GradientDescent(rate, 5))

    slope = jax.jit(jax.grad(error))(0.9)
    assert slope == pytest.approx(float(error(0.9001) - error(0.8999)) / 2e-4, rel=1e-5)
