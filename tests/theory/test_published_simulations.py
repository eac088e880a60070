"""Predictions against numbers that other people's code and theory produced."""

import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm
from tests.internals import PencilSystem, chain, expand, solve_and_linearize

# The simulation script of Cioba, Bromberg, Wang, Niyogi, Batzolis, Garcia, Shiu and Bernacchia,
# "How to distribute data across tasks for meta-learning?" (2021), run as published: mixed linear
# regression, loss half the mean squared error, rate over the number of points, meta-training by
# the pseudoinverse from zero. Mean test loss and its standard error.
NAMES = ("p", "m", "n_t", "n_v", "n_r", "train_rate", "adapt_rate", "steps", "sigma", "nu", "w0")
SIMULATED = [
    ((128, 3, 10, 2, 20, 0.3, 0.3, 1, 0.2, 0.2, 0.05), 0.21883, 0.00035),
    ((128, 3, 10, 2, 20, -0.3, 0.3, 1, 0.2, 0.2, 0.05), 0.21781, 0.00035),
    ((60, 3, 30, 2, 20, 0.5, 0.2, 1, 1.0, 0.5, 0.0), 0.75191, 0.00199),
    ((30, 40, 5, 25, 10, 0.3, 0.2, 1, 0.2, 0.2, 0.0), 0.0397, 5e-05),
    ((40, 6, 20, 10, 20, 0.4, 0.3, 1, 1.0, 0.5, 0.0), 2.29536, 0.02394),
    ((40, 6, 20, 10, 20, -0.4, 0.3, 1, 1.0, 0.5, 0.0), 1.28847, 0.00904),
    ((40, 5, 20, 4, 20, -0.1, 0.1, 3, 0.5, 0.7, 0.05), 0.53267, 0.0039),
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("covariance", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("numbers", "mean", "error"), SIMULATED)
def test_simulation_of_others(numbers, mean, error, covariance):
    values = dict(zip(NAMES, numbers, strict=True))
    rates, steps = [values.pop(f"{name}_rate") for name in ("train", "adapt")], values.pop("steps")
    if covariance:
        values["input_covariance"] = np.ones(values["p"])
    problem = nm.MixedLinearRegression(**values)
    train, adapt = (nm.GradientDescent(rate, steps) for rate in rates)
    predicted = float(nm.theory.test_loss(problem, train, adapt))
    assert abs(predicted - mean) < 3.5 * error


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_many_tasks_without_inner_steps():
    """m E|omega* - w0|^2 -> nu^2 (1 + (d + 1)/n) at rate and noise zero, for m large.

    Bai et al., "How important is the train-validation split in meta-learning?" (2021): n points a
    task, all in the outer loss. The limit and the 1/p term add up to it exactly; the resummation,
    made for the threshold, adds 0.07% here.
    """
    d, n, m = 20, 19, 1e6
    one = jnp.ones(1)
    numbers = jnp.array([m, 5.0, n, 0.0, 0.0])
    system = PencilSystem(
        one, d * one, one / d, 0 * one, one[None], *numbers, chain(jnp.array(0.0))
    )
    found = expand(system, *solve_and_linearize(system, False))
    exact = 1 + (d + 1) / n
    np.testing.assert_allclose(m * (found.limit[0] + found.first[0]), exact, rtol=1e-4)
