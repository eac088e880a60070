"""Names of the last release warn, and give what the new names give."""

import importlib

import pytest

import negmaml as nm
from negmaml.training import FitResult
from tests.internals import ByMethod, Difference, Phase, Simulation, StandardDeviation

EXPORTS = [
    ("negmaml", "Fit", "FitResult"),
    ("negmaml", "LearnedRates", "MetaSGDParams"),
    ("negmaml", "convolution", "im2col_convolution"),
    ("negmaml", "state_per_step", "per_step_state"),
    ("negmaml.meta", "LearnedRates", "MetaSGDParams"),
    ("negmaml.meta", "state_per_step", "per_step_state"),
    ("negmaml.theory", "distance", "weight_error"),
    ("negmaml.theory", "runs_needed", "required_runs"),
    ("negmaml.theory", "task_error", "train_task_error"),
    ("negmaml.training", "Fit", "FitResult"),
]
# Function, old argument, new argument. Called with nothing else, so that the call ends there.
ARGUMENTS = [
    (nm.evaluate, "by_step", "per_step"),
    (nm.fit, "checkpoint_of", "resume"),
    (nm.theory.expected_test_loss, "distance", "weight_error"),
]
ATTRIBUTES = [
    (FitResult(*range(9)), "stopped", "stopped_early"),
    (Difference(1.0, 0.1, 0.8, 1.2, 0.5), "told", "significant"),
    (Difference(1.0, 0.1, 0.8, 1.2, 0.5), "positive", "significantly_better"),
    (nm.Verification(()), "roads", "methods"),
    *(
        (result(*range(len(result._fields))), "distance", "weight_error")
        for result in (Simulation, Phase, StandardDeviation)
    ),
]
# Names of baselines in `Advice.gain` and `Advice.loss`.
BASELINES = [
    ("rate zero", "zero inner rate"),
    ("equal rates", "shared rate"),
    ("ridge alone", "per-group ridge"),
]


@pytest.mark.parametrize(("module", "old", "new"), EXPORTS)
def test_an_old_export_is_the_new_one(module, old, new):
    home = importlib.import_module(module)
    with pytest.warns(DeprecationWarning, match=rf"\.{old} was renamed: use {module}\.{new}"):
        assert getattr(home, old) is getattr(home, new)
    assert old not in home.__all__ and new in home.__all__


@pytest.mark.parametrize(("function", "old", "new"), ARGUMENTS)
def test_an_old_argument_is_passed_by_its_new_name(function, old, new):
    with (
        pytest.warns(DeprecationWarning, match=rf"{old}=\.\.\.\) was renamed: use {new}="),
        pytest.raises(TypeError, match="missing"),
    ):
        function(**{old: True})


def test_an_old_value_of_an_argument_names_the_new_one():
    with (
        pytest.warns(DeprecationWarning, match=r"checkpoint_of='this'\).*use resume='strict'"),
        pytest.raises(TypeError, match="missing"),
    ):
        nm.fit(checkpoint_of="this")


@pytest.mark.parametrize(("result", "old", "new"), ATTRIBUTES)
def test_an_old_attribute_is_the_new_one(result, old, new):
    with pytest.warns(DeprecationWarning, match=rf"\.{old} was renamed: use {new}"):
        assert getattr(result, old) is getattr(result, new)


@pytest.mark.parametrize(("old", "new"), BASELINES)
def test_an_old_baseline_is_the_new_one(old, new):
    gains = ByMethod({new: 1.0})
    with pytest.warns(DeprecationWarning, match=f"'{old}' was renamed: use '{new}'"):
        assert gains[old] == gains[new]
    with pytest.raises(KeyError, match=old):
        ByMethod()[old]
