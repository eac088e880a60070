"""Options that a function of the theory does not take, and covariances of phase diagrams."""

import numpy as np
import pytest

import negmaml as nm

PROBLEM = nm.MixedLinearRegression(p=32, m=3, n_t=14, n_v=5, n_r=10, sigma=0.5, nu=1.0)
RULE = nm.GradientDescent(0.2)
CELL = (60.0, 10.0, 20.0, 3.0, 0.5, 1.0)


@pytest.mark.parametrize(
    "call",
    (
        lambda **o: nm.theory.train_task_error(PROBLEM, RULE, **o),
        lambda **o: nm.theory.standard_deviation(PROBLEM, RULE, RULE, **o),
        lambda **o: nm.theory.required_runs(PROBLEM, RULE, nm.GradientDescent(0.0), **o),
        lambda **o: nm.theory.best_train_rate(PROBLEM, **o),
        lambda **o: nm.theory.phase_diagram(*CELL, **o),
    ),
)
def test_an_option_of_others_is_refused_with_the_functions_that_take_it(call):
    message = r"split is no option of .*theory\.test_loss.*theory\.weight_error"
    with pytest.raises(ValueError, match=message):
        call(split="train-train")


def test_the_default_of_an_option_asks_for_nothing():
    plain = nm.theory.train_task_error(PROBLEM, RULE)
    options = dict(split="train-validation", method="proportional")
    assert nm.theory.train_task_error(PROBLEM, RULE, **options) == plain


def test_a_phase_diagram_takes_covariances_in_every_form():
    found = nm.theory.phase_diagram(*CELL, input_covariance=np.array([1.0, 2.0]))
    # The limit of the theory at p = 60 with 30 eigenvalues of each, at the same rate.
    assert float(found.weight_error) == pytest.approx(1.7590, rel=1e-4)
    assert float(found.at_zero) == pytest.approx(1.7763, rel=1e-4)
    for same in ([1, 2], np.diag([1.0, 2.0])):
        np.testing.assert_allclose(
            nm.theory.phase_diagram(*CELL, input_covariance=same), found, rtol=1e-4
        )
    with pytest.raises(ValueError, match=r"weight_covariance must be .* shape"):
        nm.theory.phase_diagram(*CELL, input_covariance=[1, 2], weight_covariance=[1, 2, 3])
