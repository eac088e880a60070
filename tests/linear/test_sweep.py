"""The linear model as a function of a sweep: each of its fields has the effect it has in a run."""

import jax
import numpy as np
import pytest

import negmaml as nm
from negmaml.problem import named_spectrum

SIZES = {"p": 12, "m": 3, "n_t": 5, "n_v": 2, "n_r": 4}
RATES = np.array([-0.4, 0.0, 0.3])
FIELDS = {"sigma": 0.5, "nu": 0.8, "w0": 0.3, "omega0": -0.4, "meta_ridge": 0.7}
STEPS = {"train_steps": 2, "adapt_steps": 3, "spectrum": "power", "exponent": 0.6}


MORE = [
    pytest.param({}, id="one step", marks=pytest.mark.slow),
    pytest.param(STEPS, id="steps of coloured inputs"),
]


@pytest.mark.parametrize("more", MORE)
def test_a_cell_with_every_field_is_a_run_of_simulate(more, x64):
    point = SIZES | FIELDS | more
    key = jax.random.key(5)
    cell = nm.linear.LinearModel()(key, **point, train_rate=RATES, adapt_rate=0.2)
    numbers = {name: point[name] for name in ("sigma", "nu", "w0", "omega0")}
    if more:
        numbers["input_covariance"] = named_spectrum("power", SIZES["p"], exponent=0.6)
    train = nm.GradientDescent(RATES, point.get("train_steps", 1))
    adapt = nm.GradientDescent(0.2, point.get("adapt_steps", 1))
    problem = nm.MixedLinearRegression(**SIZES, **numbers)
    run = nm.simulate(key, problem, train, adapt, runs=1, meta_ridge=point["meta_ridge"])
    np.testing.assert_allclose(cell["test_loss"], run.test_loss[..., 0], rtol=1e-9)
    np.testing.assert_allclose(cell["weight_error"], run.weight_error[..., 0], rtol=1e-9)


def test_a_sweep_over_starts_and_means_depends_on_how_far_apart_they_are():
    """Without noise and spread, directions that no data reach keep the distance of the start."""
    grid = SIZES | {"sigma": 0.0, "nu": 0.0, "omega0": [-1.0, 0.0, 2.0], "w0": [0.0, 0.5],
                    "train_rate": [-0.3], "adapt_rate": [0.2]}  # fmt: skip
    result = nm.sweep(nm.sweeps.linear, grid, seeds=3, common_random_numbers=["omega0", "w0"])
    squared = (result["omega0"] - result["w0"]) ** 2
    unit = result["weight_error"].sel(omega0=2.0, w0=0.0) / 4
    expected = (unit * squared).transpose(*result["weight_error"].dims)
    np.testing.assert_allclose(result["weight_error"], expected, rtol=1e-4, atol=1e-6)
    share = float(unit.mean()) / SIZES["p"]
    assert 0.3 < share < 0.7  # 6 of 12 directions
