"""The covariance of two losses, term by term, by finite differences of equation (19)."""

import numpy as np
import pytest

import negmaml as nm
from tests.internals import covariance_of_loss, isotropic_inputs, solve_saddle, training_set

SIZES = dict(p=20, m=3, n_t=15, n_r=10)


def loss_covariance(one, two, kappa_1, kappa_2, ridges):
    """Cov(G_1, G_2) with H and w written out for every task."""
    p, m, n_v, mean = one.p, int(one.m), one.n_v, one.mean
    r_1, r_2 = 1 / (one.b**2 + kappa_1), 1 / (two.b**2 + kappa_2)
    R, beta = r_1 * r_2, one.b * two.b
    V = one.a[0] * two.a[0] + one.a[1] * two.a[1]
    g_1, g_2 = mean(r_1), mean(r_2)
    t_1, t_2 = (n_v - p * (1 - k * g) for k, g in ((kappa_1, g_1), (kappa_2, g_2)))
    D2, r = np.sqrt(one.offset * two.offset), ridges / (t_1 * t_2)
    H, w = np.zeros((1 + 2 * m, 1 + 2 * m)), np.zeros(1 + 2 * m)
    H[0, 0], w[0] = -(m - 1) / (p * g_1 * g_2), -D2 / p * r
    for i in range(1, 2 * m, 2):
        H[0, i] = H[i, 0] = -1
        H[i, i], H[i, i + 1] = -p * mean(R), -p * mean(beta * R)
        H[i + 1, i], H[i + 1, i + 1] = -p * mean(beta * R), n_v - p * mean(beta**2 * R)
        w[i] = p * mean(V * beta * R)
        w[i + 1] = one.sigma * two.sigma + p * kappa_1 * kappa_2 * mean(V * R)
    q = D2**2 / p * r**2 * g_1 * g_2
    within_task = m * p * kappa_1 * kappa_2 * mean(V**2 * R)
    return 2 * t_1 * t_2 * (within_task + w @ np.linalg.solve(H, w) - q)


@pytest.mark.parametrize("sigma, nu, start", ((0.5, 1.0, 0.3), (0.7, 0.0, 0.0), (0.1, 1.0, 0.4)))
@pytest.mark.parametrize("n_v", (3, 12))
@pytest.mark.parametrize("rates", ((-0.4, -0.4), (-0.4, 0.3)))
def test_the_covariance_is_the_mixed_difference_of_the_equation(rates, n_v, sigma, nu, start, x64):
    problem = nm.MixedLinearRegression(**SIZES, n_v=n_v, sigma=sigma, nu=nu, omega0=start)
    pairs, law = [], "marchenko-pastur"
    for rate in rates:
        inputs, (rule,) = isotropic_inputs(problem, (nm.GradientDescent(rate),), 2.0, law)
        pairs.append(solve_saddle(training_set(inputs, rule), True))
    (one, two), (at_1, at_2) = [x.system for x in pairs], [x.at for x in pairs]
    ridges, h = at_1.t * at_1.K * at_2.t * at_2.K, 3e-4
    values = {
        (i, j): loss_covariance(one, two, 1 + i * h, 1 + j * h, ridges)
        for i in (-1, 1)
        for j in (-1, 1)
    }
    expected = (values[1, 1] - values[1, -1] - values[-1, 1] + values[-1, -1]) / (4 * h * h)
    found = float(covariance_of_loss([one, two], [at_1, at_2]))
    assert found == pytest.approx(float(expected), rel=1e-4)
