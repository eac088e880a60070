"""The simulated points of the double descent, and the best rates of the maps."""

import jax
import numpy as np
import pytest

import negmaml as nm
from negmaml.linear import Data, meta_system
from tests.internals import Phase, best_rates_over, phase_diagram
from tests.internals import paper_phases as phases


@pytest.fixture(scope="module")
def drawn():
    with jax.enable_x64(True):
        return [phases._data(jax.random.key(0), i, 3) for i in range(len(phases.DESCENT_N_V))]


def test_a_point_has_the_minimum_norm_solutions_of_its_runs(drawn, x64):
    """Compared with least squares by singular values: wide, tall, and near the threshold."""
    for data in drawn:
        found = phases._distances(data)
        for i, rate in enumerate(phases.DESCENT_RATES):
            for run, distance in zip(zip(*data, strict=True), found[:, i], strict=True):
                Phi, r = meta_system(Data(*run), nm.GradientDescent(rate))
                omega = np.linalg.lstsq(Phi, r)[0]
                assert distance == pytest.approx(np.sum(omega**2), rel=1e-9)


def test_each_point_has_its_own_data_of_its_problem(drawn):
    for n_v, data in zip(phases.DESCENT_N_V, drawn, strict=True):
        assert data.X_v.shape == (3, phases.DESCENT.m, n_v, phases.DESCENT.p)
    first = [data.X_t[0, 0, 0, 0] for data in drawn]
    assert len(set(first)) == len(first)
    labels = np.concatenate([data.y_t for data in drawn])
    expected = phases.DESCENT.nu**2 + phases.DESCENT.sigma**2
    assert np.mean(labels**2) == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
def test_the_best_rates_are_those_of_the_phase_diagram(x64):
    cells = 100.0, 10.0, np.array([30.0, 100.0])[:, None], np.array([2.0, 30.0]), 0.5, 1.0
    np.testing.assert_allclose(best_rates_over(*cells), phase_diagram(*cells).best, rtol=1e-3)


def test_cells_whose_equations_are_not_solved_warn(monkeypatch):
    unsolved = Phase(*np.full((3, 1), np.nan, np.float32))
    monkeypatch.setattr("negmaml.theory.phases._phases", lambda *_, **__: unsolved)
    with pytest.warns(nm.ConvergenceWarning, match="equations of the theory were not solved"):
        phase_diagram(60.0, 10.0, 20.0, 3.0, 0.5, 1.0)
