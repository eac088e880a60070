"""Calls of `negmaml.theory`."""

from fractions import Fraction

import numpy as np

import negmaml as nm
from negmaml import theory
from tests.calls.form import Right, Wrong, wrong
from tests.calls.problem import (
    GIVEN,
    ONE,
    PROBLEM,
    PROBLEMS,
    RATES,
    RIDGES,
    RULES,
    TWO,
)
from tests.calls.rules import COUNTS, FLAGS

METHODS = ("x", "Proportional", None, 3, True)
SPECTRA = ("approximate", None, 3)
OVER = nm.MixedLinearRegression(**GIVEN | {"p": 30})
CORRELATED = nm.MixedLinearRegression(**GIVEN, input_covariance=np.array([1.0, 2.0, 3.0]))
LOSS = {"problem": PROBLEM, "train": ONE, "adapt": TWO}
BATCH = nm.GradientDescent(np.array([0.1, 0.2]))
PLAIN_RATES = (np.nan, np.inf, "0.1", None, 1j, {}, [], ONE)
THREE = {"covariance": np.ones(30), "weight_covariance": np.ones(30), "train": ONE, "adapt": TWO,
         "m": 2, "n_t": 2, "n_v": 2, "n_r": 2, "sigma": 0.5}  # fmt: skip
SKEW = np.eye(30) + np.eye(30, k=1)
MATRICES = (-np.ones(30), np.full(30, np.nan), SKEW, -np.eye(30), 1.0, None, "a", np.ones((30, 2)),
            1j * np.eye(30), [], {})  # fmt: skip
PHASE = {"p": 10.0, "m": 2.0, "n_t": 5.0, "n_v": 2.0, "sigma": 0.5, "nu": 1.0}
SIZES = (0.0, -1.0, np.nan, np.inf, "a", None, [1.0, 0.0], 1j, [], {})
AMOUNTS = (-1.0, np.nan, np.inf, "a", None, [1.0, -1e-3], 1j, [], {})
FEATURES = np.random.default_rng(0).standard_normal((6, 3))
ALLOCATED = {"budget": 40, "problem": PROBLEM, "tune": False, "split": 0.5}
COMPARED = {"problem": PROBLEM, "train_a": ONE, "train_b": TWO}

WRONG = [
    *wrong(theory.test_loss, LOSS, problem=PROBLEMS, train=RULES, adapt=RULES, method=METHODS,
           meta_ridge=RIDGES, measure=SPECTRA),
    *wrong(theory.test_loss, LOSS | {"problem": CORRELATED}, train=RULES, adapt=RULES,
           method=(*METHODS, "expansion"), meta_ridge=RIDGES, measure=(*SPECTRA, "exact")),
    *wrong(theory.weight_error, {"problem": PROBLEM, "train": ONE}, problem=PROBLEMS, train=RULES,
           method=METHODS, meta_ridge=RIDGES, measure=SPECTRA),
    *wrong(theory.weight_error, {"problem": PROBLEM, "train": ONE, "method": "expansion"},
           meta_ridge=(0.5, *RIDGES), measure=SPECTRA, train=(*RULES, nm.GradientFlow(1.0))),
    *wrong(theory.train_task_error, {"problem": PROBLEM, "train": ONE}, problem=PROBLEMS,
           train=RULES, meta_ridge=RIDGES, measure=SPECTRA),
    *wrong(theory.overparameterized, {"problem": OVER, "train_rate": 0.1, "adapt_rate": 0.1},
           problem=(*PROBLEMS,), train_rate=PLAIN_RATES, adapt_rate=PLAIN_RATES),
    *wrong(theory.underparameterized, {"problem": PROBLEM, "train_rate": 0.1, "adapt_rate": 0.1},
           problem=PROBLEMS, train_rate=PLAIN_RATES, adapt_rate=PLAIN_RATES),
    Wrong(theory.overparameterized, {"problem": PROBLEM, "train_rate": 0, "adapt_rate": 0},
          "p > n_v m"),
    Wrong(theory.underparameterized, {"problem": OVER, "train_rate": 0, "adapt_rate": 0},
          "p < n_v m"),
    *wrong(theory.expansion_parameter, {"problem": PROBLEM, "train": ONE}, problem=PROBLEMS,
           train=(*RULES, nm.GradientFlow(1.0), nm.GradientDescent(0.1, 2))),
    *wrong(theory.stationary_train_rates, {"p": 3, "n_t": 2}, p=COUNTS, n_t=COUNTS),
    *wrong(theory.best_train_rate, {"problem": PROBLEM}, problem=PROBLEMS, method=METHODS,
           train=[rule for rule in RULES if rule is not None], meta_ridge=RIDGES, measure=SPECTRA,
           adapt=[rule for rule in RULES if rule is not None]),
    *wrong(theory.best_train_rate, {"problem": CORRELATED}, method=(*METHODS, "expansion"),
           adapt=(0.1, "sgd", BATCH), measure=("exact",), meta_ridge=RIDGES),
    *wrong(theory.best_adapt_rate, {"problem": PROBLEM, "train": ONE}, problem=PROBLEMS,
           train=RULES, adapt=(0.1, "sgd", 3, nm.GradientDescent), method=METHODS,
           meta_ridge=RIDGES, measure=SPECTRA),
    *wrong(theory.best_adapt_rate, {"problem": PROBLEM, "adapt": nm.Proximal(1.0), "train": ONE},
           train=(BATCH,)),
    *wrong(theory.best_rates, {"problem": PROBLEM}, problem=PROBLEMS, method=METHODS,
           train=(0.1, "sgd"), adapt=(0.1, "sgd"), meta_ridge=RIDGES, measure=SPECTRA),
    *wrong(theory.best_meta_ridge, {"problem": PROBLEM, "train": ONE}, problem=PROBLEMS,
           train=(*RULES, BATCH), adapt=(0.1, "sgd"), measure=SPECTRA),
    *wrong(theory.standard_deviation, LOSS, problem=PROBLEMS, train=RULES,
           adapt=RULES, meta_ridge=RIDGES, measure=SPECTRA),
    *wrong(theory.standard_deviation, LOSS | {"problem": CORRELATED}, train=RULES, adapt=RULES,
           meta_ridge=RIDGES, measure=(*SPECTRA, "exact")),
    *wrong(theory.required_runs, COMPARED | {"problem": CORRELATED}, adapt=(*RULES, BATCH)),
    *wrong(theory.required_runs, COMPARED, problem=PROBLEMS, train_a=(*RULES, BATCH),
           train_b=(*RULES, BATCH, nm.GradientFlow(1.0), nm.Momentum(0.1, 0.0, 1)),
           meta_ridge=RIDGES, measure=SPECTRA, shared=FLAGS,
           standard_errors=(-1, 0, np.nan, np.inf, "a", None)),
    *wrong(theory.phase_diagram, PHASE, **dict.fromkeys(("p", "m", "n_t", "n_v"), SIZES),
           **dict.fromkeys(("sigma", "nu", "offset", "meta_ridge"), AMOUNTS),
           train=(0.1, "sgd", BATCH, nm.GradientDescent)),
    Wrong(theory.phase_diagram, PHASE | {"p": [10.0, 20.0], "sigma": [1.0, 2.0, 3.0]},
          r"p .*\(2,\).* sigma .*\(3,\)|broadcast"),
    *wrong(theory.general_inputs, THREE, covariance=MATRICES, weight_covariance=MATRICES,
           fourth_moment=[value for value in MATRICES if value is not None and
                          not np.array_equal(value, -np.ones(30))],
           train=(*RULES, nm.GradientFlow(1.0), nm.GradientDescent(0.1, 2)),
           adapt=(*RULES, nm.Proximal(1.0)), **dict.fromkeys(("m", "n_t", "n_v", "n_r"), COUNTS),
           sigma=(-1.0, np.nan, "a", None)),
    *(row for name in ("covariance", "weight_covariance", "fourth_moment")
      for row in wrong(theory.general_inputs,
                       THREE | {"covariance": np.eye(30), "weight_covariance": np.eye(30)},
                       **{name: (SKEW, np.eye(30)[:, :2], np.full((30, 30), np.nan))})),
    Wrong(theory.general_inputs, THREE | {"m": 20}, "p > n_v m"),
    *wrong(theory.feature_moments, {"features": FEATURES}, kernel=(FEATURES @ FEATURES.T,),
           features=(None, np.ones(3), np.zeros((6, 3)), FEATURES * np.nan, "a", np.ones((1, 3)))),
    *wrong(theory.feature_moments, {"kernel": FEATURES @ FEATURES.T, "p": 3},
           kernel=(FEATURES, np.ones(3), "a", np.triu(np.ones((4, 4)))), p=(None, *COUNTS)),
    *wrong(theory.best_allocation, ALLOCATED, budget=(1, -3, np.nan, "a", None, [100]),
           problem=PROBLEMS, train=(0.1, BATCH), adapt=(0.1, BATCH),
           meta_ridge=(-1.0, np.nan, "a", [0.1]), task_cost=(-1.0, np.nan, "a", None),
           point_cost=(0.0, -1.0, np.nan, "a", None), split=(0.0, 1.0, 1.5, np.nan, "a", -0.5),
           tune=FLAGS),
    *wrong(theory.expected_test_loss, {"problem": PROBLEM, "weight_error": 1.0, "adapt": ONE},
           adapt=(0.1,), problem=(None,)),
    Wrong(theory.best_train_rate, {"problem": nm.MixedLinearRegression(**GIVEN | {"p": 8})},
          "p = n_v m = 8: without meta_ridge every mean is infinite there; give a"),
]  # fmt: skip


def under(rate, adapt=0.2):
    """Theorem 2."""
    return theory.underparameterized(PROBLEM, rate, adapt)


RIGHT = [
    *(Right(f"a {type(given).__name__} of rates in {function.__name__}",
            lambda f=function, g=given: f(PROBLEM, nm.GradientDescent(g)),
            lambda f=function: f(PROBLEM, nm.GradientDescent(RATES)))
      for function in (theory.weight_error, theory.train_task_error, theory.expansion_parameter,
                       theory.best_adapt_rate)
      for given in ([-0.5, 0, 0.25], (-0.5, 0.0, Fraction(1, 4)))),
    *(Right(f"{given!r} in Theorem 2", lambda g=given: under(g), lambda p=plain: under(p))
      for given, plain in (
          (Fraction(1, 2), 0.5), ([-0.5, 0, 0.25], RATES), ((-0.5, 0, 0.25), RATES), (1, 1.0))),
    Right("a list in Theorem 1", lambda: theory.overparameterized(OVER, [-0.5, 0, 0.25], (0, 1)),
          lambda: theory.overparameterized(OVER, RATES, np.array([0.0, 1.0]))),
    *(Right(f"a ridge of {given!r}",
            lambda g=given: theory.weight_error(PROBLEM, ONE, meta_ridge=g),
            lambda p=plain: theory.weight_error(PROBLEM, ONE, meta_ridge=p))
      for given, plain in ((Fraction(1, 2), 0.5), (1, 1.0), (np.float32(0.5), 0.5),
                           (np.array(0.5), 0.5))),
    Right("a standard deviation of a list of rates",
          lambda: theory.standard_deviation(PROBLEM, nm.GradientDescent([-0.5, 0, 0.25]), TWO),
          lambda: theory.standard_deviation(PROBLEM, nm.GradientDescent(RATES), TWO)),
    Right("lists of covariances", lambda: theory.general_inputs(**THREE | {
              "covariance": [1] * 30, "weight_covariance": (1.0,) * 30}),
          lambda: theory.general_inputs(**THREE)),
    Right("phases of lists", lambda: theory.phase_diagram(**PHASE | {"sigma": [0.5, 1]}),
          lambda: theory.phase_diagram(**PHASE | {"sigma": np.array([0.5, 1.0])})),
    Right("as many standard errors as two fractions",
          lambda: theory.required_runs(PROBLEM, ONE, TWO, standard_errors=Fraction(4)),
          lambda: theory.required_runs(PROBLEM, ONE, TWO)),
]  # fmt: skip
