"""Where a negative rate pays: the maps against the isotropic theory and against simulation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm
from negmaml.problem import adapted, named_spectrum
from tests.internals import gain_map as payoff

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.slow]


def lowest(losses):
    """Of a quadratic in a rate at test time, from its values at -1, 0 and 1 along the last axis."""
    low, middle, high = jnp.moveaxis(losses, -1, 0)
    return middle - (high - low) ** 2 / (8 * (low + high - 2 * middle))


def gain(exponent, noise, losses_of):
    """1 - excess at the best negative rate over that at zero, of a function of the problem."""
    s = named_spectrum("power", payoff.P, exponent=exponent)
    sizes = dict(p=payoff.P, m=payoff.M, n_t=payoff.N_T, n_v=payoff.N_V, n_r=payoff.N_R)
    problem = nm.MixedLinearRegression(
        **sizes, sigma=noise, nu=1.0, omega0=payoff.P**-0.5, input_covariance=s
    )
    top = s[0] * (1 + jnp.sqrt(payoff.P / (s[0] * payoff.N_T))) ** 2
    train = nm.GradientDescent(jnp.append(payoff.NEGATIVE, 0.0) / top)
    adapt = nm.GradientDescent(jnp.array([-1.0, 0.0, 1.0]))
    excess = lowest(losses_of(problem, train, adapt)) - lowest(adapted(problem, adapt).floor)
    return float(1 - excess[:-1].min() / excess[-1])


@pytest.mark.parametrize(("exponent", "noise", "sign"), ((0.0, 10**0.5, 1), (1.5, 10**-0.5, -1)))
def test_a_cell_of_the_map_is_what_simulation_finds(exponent, noise, sign):
    def simulated(problem, train, adapt):
        found = nm.simulate(jax.random.key(0), problem, train, adapt, runs=1000)
        return found.test_loss.mean(-1)

    cell = jnp.array([[exponent, noise, payoff.N_T, payoff.N_V]])
    predicted = float(np.asarray(payoff._cells(cell)["over_zero"])[0, 0])
    assert np.sign(predicted) == sign
    assert predicted == pytest.approx(gain(exponent, noise, simulated), abs=0.02)
