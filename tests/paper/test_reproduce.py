"""The paper's figures: their data, their optima and their files."""

import json

import jax
import numpy as np
import pytest
import xarray as xr

from negmaml import theory
from tests.internals import (
    CURVE_RATES,
    PROBLEMS,
    RATES,
    _best_by_parabola,
    best_on_grid,
    contents,
    experiments,
    figures,
    netcdf,
    plotting,
    to_dataset,
    with_jackknife,
)


@pytest.fixture(scope="module")
def results():
    return dict(experiments(list(PROBLEMS), jax.random.key(3), runs=100))


@pytest.fixture(scope="module")
def dataset(results):
    return to_dataset(results, {"seed": "3"})


def test_settings_are_those_of_the_paper():
    assert RATES.size == 25
    assert RATES[0] == -0.6
    assert RATES[-1] == 0.6
    over, under = PROBLEMS.values()
    assert (over.n_t, over.n_v, over.n_r, over.m, over.p) == (30, 2, 20, 3, 60)
    assert (over.sigma, over.nu, over.w0, over.omega0) == (1.0, 0.5, 0.0, 0.0)
    assert (under.n_t, under.n_v, under.n_r, under.m, under.p) == (5, 25, 10, 40, 30)
    assert (under.sigma, under.nu) == (0.2, 0.2)


@pytest.mark.parametrize("name", PROBLEMS)
def test_theory_meets_simulation(results, name):
    for panel in results[name].values():
        # Leading order: the theorems themselves are off by up to 3% here.
        assert np.all(np.abs(panel.mean - panel.theory) < 0.03 * panel.mean + 4 * panel.error)


@pytest.mark.parametrize("name", PROBLEMS)
def test_panels_meet_where_they_cross(results, name):
    a, b = results[name]["a"], results[name]["b"]
    at = np.flatnonzero(RATES == 0.2)[0]
    np.testing.assert_array_equal(a.losses[at], b.losses[at, : a.losses.shape[1]])


def test_optima_are_found_where_predicted(results):
    for panels in results.values():
        for panel in panels.values():
            assert abs(panel.found - panel.predicted) < 4 * panel.found_error + 0.15 * abs(
                panel.predicted
            )


def test_parabola_finds_the_minimum_of_a_quadratic():
    assert _best_by_parabola(RATES, (RATES - 0.137) ** 2) == pytest.approx(0.137)


def test_grid_search_orders_its_rates_and_interpolates():
    rates = np.array([0.6, -0.2, 0.1, 0.4])
    assert best_on_grid(rates, (rates - 0.2) ** 2) == pytest.approx(0.2)


def test_jackknife_error_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).normal(size=(1, 200))
    estimate, error = with_jackknife(lambda mean: mean[0], values, groups=200)
    assert estimate == pytest.approx(values.mean())
    assert error == pytest.approx(values.std(ddof=1) / 200**0.5)


def test_one_problem_alone_has_the_same_numbers(results):
    name = list(PROBLEMS)[1]
    alone = dict(experiments([name], jax.random.key(3), runs=100))
    np.testing.assert_array_equal(alone[name]["b"].losses, results[name]["b"].losses)


def test_dataset_is_labelled_and_survives_its_file(dataset, tmp_path):
    dataset.to_netcdf(tmp_path / "x.nc", engine="scipy")
    with xr.open_dataset(tmp_path / "x.nc") as back:
        assert set(back.dims) == {"problem", "panel", "rate", "curve_rate", "run_a", "run_b"}
        assert list(back["problem"].values) == list(PROBLEMS)
        chosen = back["loss_mean"].sel(problem="underparameterized", panel="a", rate=0.2)
        assert np.isfinite(float(chosen))
        assert back.attrs["seed"] == "3"
        np.testing.assert_allclose(back["curve_rate"], CURVE_RATES)


def test_figure_shows_every_point_and_curve(results):
    figure = figures.reproduction(results)
    assert len(figure.axes) == 4
    for axis in figure.axes:
        curve, theorem, points = *axis.lines[:2], axis.containers[0]
        assert len(curve.get_xdata()) == len(theorem.get_xdata()) == CURVE_RATES.size
        assert len(points[0].get_xdata()) == RATES.size
        assert "best" in axis.get_title(loc="left")


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_theorem_is_that_of_the_regime_and_near_the_simulation(results, dataset, name):
    """Theorem 1 or 2, to leading order, is off by up to 1.7% here, and the theory by 0.2%."""
    theorem = getattr(theory, name)
    for letter, rates in (("a", (0.2, CURVE_RATES)), ("b", (CURVE_RATES, 0.2))):
        panel = results[name][letter]
        np.testing.assert_allclose(panel.theorem, theorem(PROBLEMS[name], *rates), rtol=1e-5)
        assert 5e-4 < np.max(np.abs(panel.theorem / panel.curve - 1)) < 0.04
        stored = dataset["theorem"].sel(problem=name, panel=letter)
        np.testing.assert_array_equal(stored, panel.theorem)


def test_saving_leaves_whole_files_only(results, tmp_path):
    paths = plotting.save(figures.reproduction(results), tmp_path, "figure")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["figure.png", "figure.svg"]
    assert all(path.stat().st_size > 10_000 for path in paths)


def test_what_is_written_is_the_dataset(results, dataset, tmp_path):
    netcdf.write(tmp_path / "x.nc", *contents(results), dataset.attrs)
    with xr.open_dataset(tmp_path / "x.nc", engine="scipy") as back:
        xr.testing.assert_identical(back.load(), dataset)


def test_failing_to_save_leaves_no_file(tmp_path):
    with pytest.raises(OSError, match="disk"), plotting.atomic_write(tmp_path / "x.nc") as partial:
        partial.write_text("half")
        raise OSError("disk full")
    assert not list(tmp_path.iterdir())


def test_problem_is_json_for_the_attributes():
    from dataclasses import asdict

    assert json.loads(json.dumps(asdict(PROBLEMS["overparameterized"])))["p"] == 60
