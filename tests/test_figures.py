"""The committed figures show what the package computes now."""

import struct
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from negmaml import theory
from negmaml.problem import MixedLinearRegression
from negmaml.rules import GradientDescent
from tests.internals import best_rates_over, canonicalize, gain_map, reproduce
from tests.internals import paper_phases as phases
from tests.pictures import assert_readable

FOLDER = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(FOLDER))  # the scripts import each other
import diagrams  # noqa: E402
import features  # noqa: E402
import figures  # noqa: E402
import harness  # noqa: E402
import lazy  # noqa: E402

sys.path.remove(str(FOLDER))


def stored(name):
    return np.load(FOLDER / f"{name}.npz")


def test_theory_at_the_top_of_the_readme(x64):
    data = stored("reproduction")
    for i, problem in enumerate(reproduce.PROBLEMS.values()):
        found = reproduce._predict(canonicalize(problem, np.float64))
        curves, theorems, best_adapt, best_train = found
        np.testing.assert_allclose(data["theory"][i], curves, rtol=1e-5)
        np.testing.assert_allclose(data["theorem"][i], theorems, rtol=1e-5)
        np.testing.assert_allclose(
            data["best_rate_predicted"][i], [best_adapt, best_train], rtol=1e-3
        )


def test_simulation_agrees_with_the_theory_that_is_shown():
    """The worst of 100 points is within four standard errors of the simulation, or 0.5%."""
    data = stored("reproduction")
    gap = np.abs(data["loss_mean"] - data["theory_at_rate"])
    assert data["loss_mean"].shape == (2, 2, 25)
    assert np.all(gap < np.maximum(4 * data["loss_error"], 0.005 * data["loss_mean"]))


def test_double_descent_of_the_phases(x64):
    train = GradientDescent(np.asarray(phases.DESCENT_RATES))
    problems = [replace(phases.DESCENT, n_v=n) for n in phases.CURVE_N_V]
    curve = phases._finite(np.array([theory.weight_error(problem, train) for problem in problems]))
    np.testing.assert_allclose(stored("phases")["descent_theory"], curve, rtol=1e-4)


def test_map_of_the_best_rates(shipped_options, x64):
    """Every eighth cell along each axis; the minimum is flat, and known to 2%."""
    data = stored("phases")
    ratios = phases.RATIOS[:: figures.MAP_STEP]
    n_v = phases.P / phases.M * ratios
    found = best_rates_over(phases.P, phases.M, phases.P * ratios[:, None], n_v, phases.NOISE, 1.0)
    assert found.shape == (25, 25) and np.all(found < 0)
    np.testing.assert_allclose(data["best_by_data"], found, rtol=0.02, atol=1e-3)


def test_gains_of_isotropic_inputs_are_those_of_the_isotropic_theory(x64):
    """The map is computed by the theory of any covariance: the row without decay by the other."""
    top = (1 + np.sqrt(gain_map.P / gain_map.N_T)) ** 2
    rates = np.append(gain_map.NEGATIVE, 0.0) / top
    sizes = {"p": gain_map.P, "m": gain_map.M, "n_t": gain_map.N_T, "n_v": gain_map.N_V}
    three = GradientDescent(np.array([0.0, 0.5, 1.0]))  # the loss is a parabola in the rate
    for noise, gain in zip(
        gain_map.NOISES, stored("gain_map")["over_zero_noise"][0, 0], strict=True
    ):
        problem = MixedLinearRegression(
            **sizes, n_r=gain_map.N_R, sigma=noise, nu=1.0, omega0=gain_map.P**-0.5
        )
        loss = least(theory.test_loss(problem, GradientDescent(rates), three))
        excess = loss - least(theory.expected_test_loss(problem, 0.0, three))
        assert gain == pytest.approx(1 - excess[:-1].min() / excess[-1], abs=5e-4)


def least(losses):
    """The minimum of the parabola through losses at 0, 1/2 and 1 along the last axis."""
    low, middle, high = np.moveaxis(np.asarray(losses), -1, 0)
    curvature = 2 * (high - 2 * middle + low)
    return low - (high - low - curvature) ** 2 / (4 * curvature)


def test_a_negative_rate_lowers_the_excess_loss_at_the_highest_noise_of_every_map():
    data = stored("gain_map")
    assert all((data[f"{gain}_noise"][..., -1] > 0).all() for gain in ("over_zero", "over_same"))


def test_theory_of_features_is_near_the_simulation_on_them():
    for name, rows in stored("features").items():
        rate, predicted, mean, error = rows[:, 1:].T
        assert set(rate) == set(features.RATES), name
        assert np.all(np.abs(predicted - mean) < 4 * error + 0.06 * mean), name


def test_numbers_of_the_picture_of_a_negative_rate():
    found = diagrams.negative_rate_numbers()
    for name, values in stored("negative_rate").items():
        np.testing.assert_allclose(values, found[name], rtol=1e-5, err_msg=name)
    best, worst = found["stationary"]
    quotient = found["quotient"]
    at = found["rates"][[np.argmin(quotient), np.argmax(quotient)]]
    np.testing.assert_allclose(at, [best, worst], atol=0.02)  # the grid has steps of 0.025


@pytest.mark.parametrize("name", figures.NAMES)
def test_a_committed_picture_is_large_enough_and_its_file_small(name):
    path = FOLDER / f"{name}.png"
    assert struct.unpack(">I", path.read_bytes()[16:20])[0] >= 1200  # the width in the header
    assert path.stat().st_size < 200_000


def test_every_committed_picture_is_drawn_by_the_script():
    assert {path.stem for path in FOLDER.glob("*.png")} == set(figures.NAMES)


@pytest.mark.parametrize("name", ("features", "lazy", "negative_rate", "maml"))
def test_pictures_of_scripts_can_be_read(name):
    assert_readable(figures.figure(name)[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", figures.COMMANDS)
def test_whole_figures(name, tmp_path):
    (tmp_path / name).mkdir()
    picture, found = figures.draw(name, tmp_path)
    assert picture.exists()
    data = stored(name)
    assert set(data.files) == set(found)
    for key, values in found.items():
        if not key.endswith("error"):
            np.testing.assert_allclose(data[key], values, rtol=0.02, atol=2e-3, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("name", lazy.FAMILIES)
@pytest.mark.parametrize("depth", (1, 2))
def test_exact_losses_and_the_theory_at_infinite_width(name, depth):
    _, _, predicted, *first = stored("lazy")[f"{name} {depth} exact"]
    np.testing.assert_allclose(first, lazy.limits(name, depth, len(first)), rtol=1e-3)
    np.testing.assert_allclose(predicted, lazy.theory(name, depth), rtol=1e-3)


@pytest.mark.slow
def test_losses_of_a_narrow_network_and_of_its_kernel(tmp_path):
    found = np.asarray(lazy.losses("sinusoid", 1, 64, 1.0, 2, tmp_path))
    expected = stored("lazy")["sinusoid 1 64 1"][:, :2]
    # Narrow networks amplify rounding at larger rates, where other options of XLA move single runs.
    small = np.asarray(lazy.UNITS) <= 0.4
    np.testing.assert_allclose(expected[..., small], found[..., small], rtol=0.02)


@pytest.mark.slow
def test_theory_and_simulation_of_features(x64):
    report = harness.Report()
    report.table("features")
    rows = features.compare(report, "tanh", features.random_features("tanh"), 3, 2)
    data = stored("features")["tanh"]
    np.testing.assert_allclose(rows[:, :3], data[:, :3], rtol=1e-6)
    assert np.all(np.abs(rows[:, 3] - data[:, 3]) < 5 * rows[:, 4] + 5 * data[:, 4])
