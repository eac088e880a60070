"""One direction along which inputs are large: exact where it is alone, simulation where not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm

pytestmark = pytest.mark.usefixtures("x64")

RATES = np.array([-0.4, 0.5, 1.03])  # at the last the filter vanishes on average


@pytest.mark.parametrize("drawn", ["noise", "tasks", "start"])
def test_one_direction_alone_is_exact(drawn):
    """p = 1 and so many query rows that they do not fluctuate: a two-dimensional integral is left.

    The limit is off by up to 35% there, and with the 1/p term by up to 50%.
    """
    n_t, n_v, strength = 14, 10**6, 0.1
    sigma, nu, omega0 = (float(drawn == name) for name in ("noise", "tasks", "start"))
    problem = nm.MixedLinearRegression(
        p=1, m=2, n_t=n_t, n_v=n_v, n_r=1, sigma=sigma, nu=nu, omega0=omega0,
        input_covariance=np.ones(1),
    )  # fmt: skip
    found = nm.theory.distance(problem, nm.GradientDescent(RATES), meta_ridge=strength * n_v)

    from scipy.special import roots_genlaguerre

    x, weight = roots_genlaguerre(60, n_t / 2 - 1)
    c, weight = 2 * x / n_t, weight / weight.sum()
    b = (1 - RATES[:, None] * c) ** 2
    total = strength + b[:, :, None] + b[:, None]
    of_task = sigma**2 * b * RATES[:, None] ** 2 * c / n_t + nu**2 * b**2
    squares = of_task[:, :, None] + of_task[:, None] + (strength * omega0) ** 2
    exact = np.einsum("rij,i,j->r", squares / total**2, weight, weight)
    np.testing.assert_allclose(found, exact, rtol=4e-3)


@pytest.mark.slow
def test_spikes_whose_filter_vanishes_against_simulation():
    """Excess of the test loss; without the exact average the theory is 4% low here."""
    s = np.arange(1, 61.0) ** -1.3
    problem = nm.MixedLinearRegression(
        p=60, m=20, n_t=10, n_v=12, n_r=20, sigma=0.15, nu=1.0, input_covariance=s / s.mean()
    )
    rule = nm.GradientDescent(s.mean())
    runs = nm.simulate(jax.random.key(0), problem, rule, rule, runs=8000)
    found = nm.theory.test_loss(problem, rule, rule)
    error = runs.test_loss.std() / 8000**0.5
    assert abs(found - runs.test_loss.mean()) < 4 * error + 0.005 * jnp.abs(found)
