"""The committed figures show what the package computes now."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from negmaml import theory
from negmaml.rules import GradientDescent
from tests.internals import best_rates_over, canonicalize, reproduce
from tests.internals import paper_phases as phases

FOLDER = Path(__file__).parents[1] / "benchmarks"
spec = importlib.util.spec_from_file_location("figures", FOLDER / "figures.py")
figures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(figures)


def short_repr(name):
    return np.load(FOLDER / f"{name}.npz")


def test_theory_at_the_top_of_the_readme(x64):
    data = short_repr("reproduction")
    for i, problem in enumerate(reproduce.PROBLEMS.values()):
        curves, best_adapt, best_train = reproduce._predict(canonicalize(problem, np.float64))
        np.testing.assert_allclose(data["theory"][i], curves, rtol=1e-5)
        np.testing.assert_allclose(
            data["best_rate_predicted"][i], [best_adapt, best_train], rtol=1e-3
        )


def test_simulation_agrees_with_the_theory_that_is_shown():
    """The worst of 100 points is within four standard errors of the simulation, or 0.5%."""
    data = short_repr("reproduction")
    gap = np.abs(data["loss_mean"] - data["theory_at_rate"])
    assert data["loss_mean"].shape == (2, 2, 25)
    assert np.all(gap < np.maximum(4 * data["loss_error"], 0.005 * data["loss_mean"]))


def test_double_descent_of_the_phases(x64):
    train = GradientDescent(np.asarray(phases.DESCENT_RATES))
    problems = [replace(phases.DESCENT, n_v=n) for n in phases.CURVE_N_V]
    curve = phases._finite(np.array([theory.weight_error(problem, train) for problem in problems]))
    np.testing.assert_allclose(short_repr("phases")["descent_theory"], curve, rtol=1e-4)


def test_map_of_the_best_rates(shipped_options, x64):
    """Every eighth cell along each axis; the minimum is flat, and known to 2%."""
    data = short_repr("phases")
    ratios = phases.RATIOS[:: figures.MAP_STEP]
    n_v = phases.P / phases.M * ratios
    found = best_rates_over(phases.P, phases.M, phases.P * ratios[:, None], n_v, phases.NOISE, 1.0)
    assert found.shape == (25, 25) and np.all(found < 0)
    np.testing.assert_allclose(data["best_by_data"], found, rtol=0.02, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", figures.FIGURES)
def test_whole_figures(name, tmp_path):
    (tmp_path / name).mkdir()
    picture, found = figures.draw(name, tmp_path)
    assert picture.exists()
    data = short_repr(name)
    assert set(data.files) == set(found)
    for key, values in found.items():
        if not key.endswith("error"):
            np.testing.assert_allclose(data[key], values, rtol=0.02, atol=2e-3, err_msg=key)
