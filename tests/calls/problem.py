"""Calls of `negmaml.problem` and `negmaml.linear`."""

from fractions import Fraction

import jax
import numpy as np

import negmaml as nm
from negmaml import linear
from negmaml import problem as problems
from tests.calls.form import Right, Wrong, wrong
from tests.calls.rules import COUNTS
from tests.internals import short_repr

KEY = jax.random.key(0)
KEYS = (0, np.int64(3), None, "seed", 0.5, np.zeros(2), np.zeros(2, int), [0, 1], True,
        jax.random.split(KEY, 2), jax.random.PRNGKey(0)[None], KEY[None])  # fmt: skip
RULES = (0.1, -1, "sgd", None, nm.GradientDescent, [nm.GradientDescent(0.1)], np.array([0.1]))
SIZES = {"p": 3, "m": 2, "n_t": 2, "n_v": 4, "n_r": 2}
GIVEN = SIZES | {"sigma": 0.5, "nu": 1.0}
PROBLEM = nm.MixedLinearRegression(**GIVEN)
ONE, TWO = nm.GradientDescent(-0.2), nm.GradientDescent(0.2)
PROBLEMS = (None, 3, GIVEN, "problem", nm.MixedLinearRegression)
DEVIATIONS = (-1.0, -1e-9, np.nan, np.inf, "a", [0.1, 0.2], np.ones(3), None, 1j, {}, [])
RIDGES = (-1.0, -1e-12, np.nan, np.inf, "a", None, 1j, [0.1, 0.2], {}, [])
VECTORS = ([1.0, 2.0], np.ones(2), np.ones((3, 1)), np.nan, [0.0, np.inf, 1.0], "a", None, 1j, {},
           [], ["a", "b", "c"])  # fmt: skip
COVARIANCES = (-np.eye(3), np.array([1.0, -1.0, 1.0]), np.diag([1.0, np.nan, 1.0]), np.eye(2), 1.0,
               np.array([[1, 2, 0], [0, 1, 0], [0, 0, 1.0]]), np.ones((3, 3, 3)), "identity", {},
               np.array([[0, 2, 0], [2, 0, 0], [0, 0, 1.0]]), np.full(3, np.inf), [],
               1j * np.eye(3), [1.0, 2.0])  # fmt: skip
SIMULATED = {"key": KEY, "problem": PROBLEM, "train": ONE, "adapt": TWO}
DATA = linear.Data(np.ones((2, 2, 3)), np.ones((2, 2)), np.ones((2, 4, 3)), np.ones((2, 4)))
WRONG = [
    *wrong(nm.MixedLinearRegression, GIVEN, **dict.fromkeys(SIZES, COUNTS), sigma=DEVIATIONS,
           nu=DEVIATIONS, w0=VECTORS, omega0=VECTORS, input_covariance=COVARIANCES,
           weight_covariance=COVARIANCES),
    *wrong(problems.wishart_moment, {"n": 2, "p": 2, "exponents": (1,)}, n=COUNTS, p=COUNTS,
           exponents=((-1,), (1.5,), (True,), ("1",), 2, None, "12")),
    *wrong(problems.normalized_moment, {"n": 2, "p": 2, "exponents": (1,)}, n=COUNTS, p=COUNTS,
           exponents=((-1,), 2, None)),
    *wrong(problems.wishart_quadrature, {"n": 2, "p": 2}, n=COUNTS, p=COUNTS, order=COUNTS),
    *wrong(problems.shrinkage, {"rate": 0.1, "n": 3, "p": 3}, n=(0, -3, "a", np.nan, None),
           p=(0, -3, "a", np.nan, None), rate=(np.nan, "a", None, [], {}, 1j)),
    *wrong(problems.filter_means, {"rule": ONE, "n": 2, "p": 2}, rule=RULES, n=COUNTS, p=COUNTS),
    *wrong(problems.expected_test_loss, {"problem": PROBLEM, "weight_error": 1.0, "adapt": ONE},
           problem=PROBLEMS, adapt=RULES, distance=(-1.0, np.nan, "a", None, 1j)),
    *wrong(problems.adapted, {"problem": PROBLEM, "adapt": ONE}, problem=PROBLEMS, adapt=RULES),
    *wrong(problems.named_spectrum, {"name": "power", "p": 3}, p=COUNTS, exponent=(np.nan, "a"),
           level=(-1.0, np.inf), share=(np.nan, None), spikes=(1j, "2")),
    *(Wrong(problems.named_spectrum, {"name": name, "p": 3}, "spectrum must be one of")
      for name in ("powers", None, 3, "")),
    *(row for function in (nm.simulate, linear.compile_simulation)
      for row in wrong(
          function, SIMULATED, key=KEYS, problem=PROBLEMS, train=RULES, adapt=RULES, runs=COUNTS,
          meta_ridge=RIDGES, evaluation=("exact", None, 3, True), split=("train", None, []))),
    *wrong(linear.sample, {"key": KEY, "problem": PROBLEM}, key=KEYS, problem=PROBLEMS),
    *wrong(linear.minimiser, {"Phi": np.eye(3), "r": np.ones(3)},
           Phi=(np.ones(3), None, "a", np.eye(3) * 1j, 2.0), r=(np.ones(2), None, "a", 1.0, 1j),
           omega0=(np.ones(2), "a", None, np.ones((3, 3))), meta_ridge=RIDGES),
    *wrong(linear.sampled_test_loss,
           {"key": KEY, "problem": PROBLEM, "omega": np.zeros(3), "adapt": ONE},
           key=KEYS, problem=PROBLEMS, adapt=RULES, omega=(np.zeros(2), 0.0, None, "a")),
    *wrong(linear.meta_system, {"data": DATA, "rule": ONE}, rule=RULES,
           data=(None, 3, np.ones((2, 3)), (np.ones(2), np.ones(2)))),
    *wrong(linear.LinearModel, {}, evaluation=("exact", None, 3)),
    *wrong(nm.tasks.Linear, {}, problem=PROBLEMS),
]  # fmt: skip


def loss(train=ONE, adapt=TWO, **changes):
    """The exact test loss, by the theory."""
    return nm.theory.test_loss(nm.MixedLinearRegression(**(GIVEN | changes)), train, adapt)


def runs(train=ONE, adapt=TWO, **changes):
    """Four simulated runs."""
    problem = nm.MixedLinearRegression(**(GIVEN | changes))
    return nm.simulate(KEY, problem, train, adapt, runs=4).test_loss


def modes(**changes):
    """The variances of a problem along its eigenvectors."""
    problem = nm.MixedLinearRegression(**(GIVEN | changes))
    return problem.modes[:3], problem.offset_squared


VECTOR, RATES = np.array([1.0, 0.5, -0.25]), np.array([-0.5, 0.0, 0.25])
MATRIX = [[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]]
GIVEN_AS = [
    # (function, name, as given, as an array)
    *((loss, name, given, plain) for name in ("w0", "omega0") for given, plain in (
        ([1.0, 0.5, -0.25], VECTOR), ((1, 0.5, -0.25), VECTOR),
        ([1, Fraction(1, 2), Fraction(-1, 4)], VECTOR), (Fraction(1, 2), 0.5), (1, 1.0))),
    *((loss, name, given, plain) for name, given, plain in (
        ("sigma", Fraction(1, 2), 0.5), ("nu", 1, 1.0), ("sigma", np.float32(0.5), 0.5),
        ("sigma", np.array(0.5), 0.5), ("sigma", 0, 0.0), ("p", np.int32(3), 3))),
    *((modes, name, given, plain) for name in ("input_covariance", "weight_covariance")
      for given, plain in (
        ([1.0, 2.0, 0.5], np.array([1.0, 2.0, 0.5])), (MATRIX, np.array(MATRIX)),
        ((1, Fraction(1, 2), 2), np.array([1, 0.5, 2])), ([0, 0, 1], np.array([0.0, 0.0, 1.0])))),
    (runs, "w0", [1, Fraction(1, 2), Fraction(-1, 4)], VECTOR),
    *((loss, name, nm.GradientDescent(given), nm.GradientDescent(RATES))
      for name in ("train", "adapt")
      for given in ([-0.5, 0.0, 0.25], (-0.5, 0, 0.25), [Fraction(-1, 2), 0, Fraction(1, 4)])),
    (runs, "train", nm.GradientDescent((-0.5, 0, Fraction(1, 4))), nm.GradientDescent(RATES)),
    (runs, "adapt", nm.GradientDescent([-0.5, 0, 0.25]), nm.GradientDescent(RATES)),
    (loss, "train", nm.GradientDescent([[-0.5], [0.25]]),
     nm.GradientDescent(np.array([[-0.5], [0.25]]))),
    (loss, "train", nm.GradientFlow([1, -0.5]), nm.GradientFlow(np.array([1, -0.5]))),
    (loss, "train", nm.Proximal((1, 0.5)), nm.Proximal(np.array([1, 0.5]))),
    (loss, "train", nm.GradientDescent(Fraction(-1, 2)), nm.GradientDescent(-0.5)),
]  # fmt: skip


def simulated(**changes):
    """The distances of four runs."""
    return nm.simulate(**SIMULATED | {"runs": 4} | changes).weight_error


RIGHT = [
    *(Right(f"{call.__name__}, {name}={short_repr(given)}",
            lambda f=call, n=name, g=given: f(**{n: g}),
            lambda f=call, n=name, p=plain: f(**{n: p})) for call, name, given, plain in GIVEN_AS),
    Right("a raw key", lambda: simulated(key=jax.random.PRNGKey(0)), simulated),
    Right("a key of NumPy", lambda: simulated(key=np.array([0, 0], np.uint32)), simulated),
    Right("runs of NumPy", lambda: simulated(runs=np.int16(4)), simulated),
    Right("a ridge of a fraction", lambda: simulated(meta_ridge=Fraction(0)), simulated),
    Right("shrinkage of a list", lambda: problems.shrinkage([0.5, -1], 3, 3),
          lambda: problems.shrinkage(np.array([0.5, -1.0]), 3, 3)),
    Right("exponents in a list", lambda: problems.wishart_moment(5, 30, [4]), lambda: 10122000),
    Right("a list of distances", lambda: problems.expected_test_loss(PROBLEM, [0.5, 1], ONE),
          lambda: problems.expected_test_loss(PROBLEM, np.array([0.5, 1.0]), ONE)),
    Right("an infinite distance", lambda: problems.expected_test_loss(PROBLEM, np.inf, ONE),
          lambda: np.inf),
    Right("lists of a system", lambda: linear.minimiser([[1.0, 0], [0, 2]], [1, 1], [0, 1]).omega,
          lambda: np.array([1.0, 0.5])),
]  # fmt: skip
