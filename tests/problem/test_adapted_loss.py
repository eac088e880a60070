"""Mean losses after adaptation, against test tasks simulated in plain NumPy."""

from functools import cache
from math import comb

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm
from tests.helpers import RATES, z_score
from tests.internals import (
    adapted,
    expected_test_loss,
    filter_means,
    normalized_moment,
    shrinkage,
    wishart_quadrature,
)

P, SIGMA, NU, TASKS, POINTS = 6, 0.6, 0.8, 15_000, 8
W0 = np.linspace(-1, 1, P)
OMEGA = W0 + np.linspace(0.5, -0.2, P)
DISTANCE = np.sum((OMEGA - W0) ** 2)


@cache
def drawn_tasks(n_r):
    """Adaptation inputs and labels, test inputs and labels."""
    rng = np.random.default_rng(n_r)
    w = W0 + NU / P**0.5 * rng.standard_normal((TASKS, P))
    X, X_v = (rng.standard_normal((TASKS, n, P)) for n in (n_r, POINTS))
    y, y_v = (
        np.einsum("tnp,tp->tn", x, w) + SIGMA * rng.standard_normal(x.shape[:2]) for x in (X, X_v)
    )
    return X, y, X_v, y_v


@cache
def spectra(n_r):
    """Eigenvalues and eigenvectors of S, and X^T y / n."""
    X, y, _, _ = drawn_tasks(n_r)
    return *np.linalg.eigh(X.swapaxes(1, 2) @ X / n_r), np.einsum("tnp,tn->tp", X, y) / n_r


def descent(rate, steps):
    def adapted(n_r):
        X, y, _, _ = drawn_tasks(n_r)
        theta = np.broadcast_to(OMEGA, (TASKS, P))
        for _ in range(steps):
            error = np.einsum("tnp,tp->tn", X, theta) - y
            theta = theta - rate * np.einsum("tnp,tn->tp", X, error) / n_r
        return theta

    return adapted


def flow(time):
    """The solution of d theta / d time = X^T y / n - S theta."""

    def adapted(n_r):
        values, vectors, right = spectra(n_r)
        start = np.einsum("tpk,p->tk", vectors, OMEGA)
        drive = np.einsum("tpk,tp->tk", vectors, right)
        safe = np.where(values > 1e-9, values, 1.0)
        forced = np.where(values > 1e-9, (1 - np.exp(-time * safe)) / safe, time)
        return np.einsum("tpk,tk->tp", vectors, np.exp(-time * values) * start + forced * drive)

    return adapted


def proximal(strength):
    """The stationary point of |X theta - y|^2 / n + strength |theta - omega|^2."""

    def adapted(n_r):
        X, y, _, _ = drawn_tasks(n_r)
        matrix = X.swapaxes(1, 2) @ X / n_r + strength * np.eye(P)
        right = np.einsum("tnp,tn->tp", X, y) / n_r + strength * OMEGA
        return np.linalg.solve(matrix, right[..., None])[..., 0]

    return adapted


# A negative proximal strength has a pole inside the spectrum: its mean loss is infinite.
@pytest.mark.parametrize("n_r", (4, 15))
@pytest.mark.parametrize(
    ("rule", "adapted"),
    (
        *((nm.GradientDescent(a), descent(a, 1)) for a in (-0.4, 0.0, 0.3, 1.7)),
        *((nm.GradientDescent(a, 3), descent(a, 3)) for a in (-0.1, 0.25)),
        *((nm.GradientFlow(t), flow(t)) for t in (-0.2, 0.8)),
        *((nm.Proximal(s), proximal(s)) for s in (0.7, 3.0)),
    ),
)
def test_the_expected_loss_agrees_with_simulated_tasks(rule, adapted, n_r, x64):
    problem = nm.MixedLinearRegression(p=P, m=1, n_t=1, n_v=1, n_r=n_r, sigma=SIGMA, nu=NU)
    _, _, X_v, y_v = drawn_tasks(n_r)
    residual = np.einsum("tnp,tp->tn", X_v, adapted(n_r)) - y_v
    losses = np.mean(residual**2, axis=1) / 2
    assert abs(z_score(losses, float(expected_test_loss(problem, DISTANCE, rule)))) < 4


@pytest.mark.parametrize(("n", "p"), ((3, 7), (7, 7), (20, 7)))
def test_one_step_in_closed_form_equals_the_quadrature(n, p, x64):
    rates = jnp.array(RATES)
    rule = nm.GradientDescent(rates)
    nodes, weights = wishart_quadrature(n, p)
    h, noise = filter_means(rule, n, p)
    np.testing.assert_allclose(h, rule.init_filter(nodes) ** 2 @ weights, rtol=1e-12)
    np.testing.assert_allclose(noise, rule.label_filter(nodes) ** 2 * nodes @ weights, rtol=1e-12)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("steps", (2, 4))
def test_several_steps_have_the_binomial_sum_of_wishart_moments(steps, rate, x64):
    n, p = 5, 9
    moments = [normalized_moment(n, p, (k,)) for k in range(2 * steps + 1)]
    expected = sum(comb(2 * steps, k) * (-rate) ** k * s for k, s in enumerate(moments))
    size = sum(comb(2 * steps, k) * abs(rate) ** k * s for k, s in enumerate(moments))
    h, _ = filter_means(nm.GradientDescent(rate, steps), n, p)
    assert float(h) == pytest.approx(expected, abs=1e-12 * size)


@pytest.mark.parametrize("rate", RATES)
def test_shrinkage_is_the_mean_of_a_squared_trace(rate):
    n, p = 5, 9
    first, second = (normalized_moment(n, p, (k,)) for k in (1, 2))
    assert shrinkage(rate, n, p) == pytest.approx(1 - 2 * rate * first + rate**2 * second)


@pytest.mark.parametrize("steps", (1, 2))
@pytest.mark.parametrize("distance_shape", ((), (3,), (3, 1)))
@pytest.mark.parametrize("shape", ((), (2,), (2, 4)))
def test_the_loss_has_the_shape_of_the_distance_and_then_of_the_rule(shape, distance_shape, steps):
    problem = nm.MixedLinearRegression(p=P, m=1, n_t=1, n_v=1, n_r=4, sigma=SIGMA, nu=NU)
    rule = nm.GradientDescent(jnp.full(shape, 0.1), steps)
    loss = jax.eval_shape(expected_test_loss, problem, jnp.ones(distance_shape), rule)
    assert loss.shape == distance_shape + shape


def test_without_adaptation_the_loss_is_noise_plus_spread_plus_distance():
    problem = nm.MixedLinearRegression(p=P, m=1, n_t=1, n_v=1, n_r=4, sigma=2.0, nu=3.0)
    assert float(expected_test_loss(problem, 5.0, nm.GradientDescent(0.0))) == (4 + 9 + 5) / 2


@pytest.mark.parametrize("rule", (nm.GradientDescent, nm.GradientFlow, nm.Proximal))
def test_the_gradient_in_the_strength_is_the_finite_difference(rule, x64):
    problem = nm.MixedLinearRegression(p=P, m=1, n_t=1, n_v=1, n_r=4, sigma=SIGMA, nu=NU)

    @jax.jit
    def loss(strength):
        return expected_test_loss(problem, DISTANCE, rule(strength))

    step = 1e-5
    difference = (loss(0.6 + step) - loss(0.6 - step)) / (2 * step)
    assert float(jax.grad(loss)(0.6)) == pytest.approx(float(difference), rel=1e-7)


def test_a_time_without_a_mean_leaves_the_losses_of_others(monkeypatch):
    """An uphill flow without finite means leaves the losses of other times as they are."""
    monkeypatch.setattr("negmaml.problem.filter_moments.SAMPLED_EIGENVALUES", 64)
    problem = nm.MixedLinearRegression(
        p=20, m=3, n_t=40, n_v=4, n_r=40, sigma=1.0, nu=0.5, input_covariance=1 / np.arange(1.0, 21)
    )
    both = jax.jit(lambda times: adapted(problem, nm.GradientFlow(times)))
    after, alone = both(np.array([-400.0, 1.0])), both(np.array([1.0, 1.0]))
    losses = after.test_loss(jnp.full(len(after.weights), 0.3))
    expected = alone.test_loss(jnp.full(len(alone.weights), 0.3))
    assert not np.isfinite(losses[0])
    np.testing.assert_allclose(losses[1], expected[0], rtol=1e-6)
