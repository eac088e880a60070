"""One interface to both solvers, and one place that chooses between them."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import negmaml as nm
from tests.internals import (
    AnisotropicModel,
    ExpansionModel,
    IsotropicModel,
    MeanModel,
    TheoryModel,
    mean_model,
    theory_model,
)

PROBLEM = nm.MixedLinearRegression(p=32, m=3, n_t=40, n_v=5, n_r=10, sigma=0.5, nu=1.0)
CORRELATED = dataclasses.replace(PROBLEM, input_covariance=np.linspace(0.5, 1.5, 32))


def members(protocol):
    return {name for name in vars(protocol) if not name.startswith("_")}


@pytest.mark.parametrize("model", (IsotropicModel, AnisotropicModel))
def test_both_models_have_every_member_of_the_protocol(model):
    assert members(TheoryModel) | members(MeanModel) <= set(dir(model))
    assert members(MeanModel) <= set(dir(ExpansionModel))


def test_the_model_follows_from_problem_split_and_method():
    assert isinstance(theory_model(PROBLEM), IsotropicModel)
    assert isinstance(theory_model(CORRELATED), AnisotropicModel)
    assert theory_model(PROBLEM, split="train-train").train_train
    chosen = mean_model(PROBLEM, 0.0, "expansion", "auto", "train-validation")
    assert isinstance(chosen, ExpansionModel)


def test_the_theory_asks_in_one_place_whether_a_problem_is_isotropic():
    """Two other modules ask too, to refuse a problem or to give it a covariance."""
    folder = Path(nm.theory.__file__).parent
    asking = {
        str(path.relative_to(folder))
        for path in folder.rglob("*.py")
        if ".isotropic" in path.read_text().replace("theory.isotropic", "")
    }
    assert asking == {"model.py", "anisotropic/inputs.py", "isotropic/inputs.py"}


def test_both_solvers_agree_on_the_leading_order_of_an_isotropic_problem(x64):
    rule, adapt = nm.GradientDescent(-0.2), nm.GradientDescent(0.1)
    one, other = (theory_model(PROBLEM, 1.0), AnisotropicModel(
        dataclasses.replace(PROBLEM, input_covariance=np.ones(32)), 1.0
    ))  # fmt: skip
    pairs = zip(other.loss_terms(rule, adapt), one.loss_terms(rule, adapt), strict=True)
    for found, expected in pairs:
        assert float(found) == pytest.approx(float(expected), rel=0.02)
