"""Calls of `negmaml.advice`."""

import jax
import numpy as np
import pandas as pd

import negmaml as nm
from negmaml import advice
from tests.calls.form import Wrong, wrong
from tests.calls.problem import KEY, KEYS
from tests.calls.rules import COUNTS, FLAGS

RANDOM = np.random.default_rng(0)
X, Y, GROUPS = RANDOM.normal(size=(48, 2)), RANDOM.normal(size=48), np.repeat(np.arange(8), 6)
ADVISED = {"x": X, "y": Y, "groups": GROUPS, "key": KEY, "n_t": 2, "n_v": 2, "n_r": 2}
ROWS = (X[:, 0], X[:4], X * np.nan, np.full(X.shape, "a"), None, 3, "x", np.zeros((48, 0)))
TARGETS = (Y[:4], Y * np.nan, np.full(48, "a"), None, 3, np.ones(48), np.full(48, np.inf))
LABELS = (GROUPS[:4], np.zeros(48), GROUPS[:, None], None, 3, [None] * 48, np.arange(48))
GRAM = np.stack([np.eye(3)] * 3)
FRAME = pd.DataFrame({"g": GROUPS, "x": Y, "y": Y, "t": ["a", "b"] * 24})
FIT = {"X": X, "y": Y, "groups": GROUPS}

X_TASKS, Y_TASKS = X.reshape(8, 6, 2), Y.reshape(8, 6)
TASKS = nm.Tasks((X_TASKS[:, :4], Y_TASKS[:, :4]), (X_TASKS[:, 4:], Y_TASKS[:, 4:]))


def network(params, x):
    """A linear model, one output."""
    return x @ params


def changed(array, index, value, dtype=float):
    """A copy of the array with one other entry."""
    copy = array.astype(dtype)
    copy[index] = value
    return copy


def estimator(**parameters):
    """A fit of an estimator with these parameters."""
    return nm.MetaRegressor(**parameters).fit(**FIT)


def chosen(**parameters):
    """A fit of an estimator that chooses, with these parameters."""
    return nm.MetaRegressorCV(**{"n_t": 2, "n_v": 2, "n_r": 2} | parameters).fit(**FIT)


def pooled(**parameters):
    """A fit of a pooled ridge with these parameters."""
    return advice.PooledRidge(**parameters).fit(**FIT)


def per_group(**parameters):
    """A fit of a per-group ridge with these parameters."""
    return advice.PerGroupRidge(**parameters).fit(**FIT)


def mixed(**parameters):
    """A fit of a mixed model with these parameters."""
    return advice.MixedModel(**parameters).fit(**FIT)


def predicted(**arguments):
    """Predictions of a fitted estimator."""
    return nm.MetaRegressor().fit(**FIT).predict(**arguments)


ADVICE = advice.advise(**ADVISED, splits=10)
WRONG = [
    *wrong(advice.advise, ADVISED, x=ROWS, y=TARGETS, groups=LABELS, key=KEYS,
           n_t=(*COUNTS, 50), n_v=(*COUNTS, 50), n_r=(*COUNTS, 6), m=(*COUNTS, 8),
           kernel=(3, "rbf", lambda a, b: 1.0, lambda a, b: -(a @ b.T)),
           rates=("a", [np.nan], [], np.ones((2, 2)), {}, [None]), splits=(*COUNTS, 9),
           adapt_rates=("a", [np.inf], [], {}), meta_ridges=([-1.0], "a", [], [np.nan], {}),
           intercept=FLAGS, standardise=FLAGS, unit=("none", None, 3), progress=(3, "bar", True)),
    *[
        Wrong(advice.advise, ADVISED | rows, said)
        for rows, said in (
            ({"x": changed(X, (3, 1), np.nan)}, "x must be finite, got nan in row 3"),
            ({"x": changed(X, (2, 0), "many", object)}, "x must hold numbers, got 'many'"),
            ({"y": changed(Y, 5, np.inf)}, "y must be finite, got inf in row 5"),
            ({"y": np.full(48, 2.0)}, "y must vary"),
            ({"y": Y[:-1]}, "same number of rows"),
            ({"groups": np.zeros(48)}, "at least 4 labels"),
            ({"groups": np.arange(48)}, "at least 4 of 4 rows"),
            ({"x": pd.DataFrame(X), "y": pd.Series(Y)[::-1]}, "rows in the same order"),
            ({"groups": changed(GROUPS, 7, None, object)}, "missing label in row 7"),
            ({"n_t": 20, "n_v": 20}, "at least 4 of 40 rows"),
            ({"m": 7}, "m must be at most 5"),
            ({"kernel": lambda a, b: a @ b.T - 100.0}, "positive semidefinite"),
            ({"kernel": lambda a, b: a}, "kernel must return a matrix"),
        )
    ],
    *wrong(advice.random_coefficients, {"gram": GRAM, "counts": np.full(3, 4)},
           gram=(GRAM[:1], None, "a", np.eye(3), np.ones((3, 2, 3)), GRAM * np.nan),
           counts=(np.ones(2), None, "a", [4, 4, 0], [4, 4, np.nan]),
           tau=(0.0, -1.0, np.nan, "a", [1.0]), structure=("none", None, 3)),
    *wrong(pooled, {},
           ridge=(-1.0, np.nan, "a", None, [0.1]), adapt_rate=(np.nan, "a", None, [0.1]),
           unit=("none", None), fit_intercept=("yes", None), random_state=("a", -1, 1.5)),
    *wrong(per_group, {},
           ridge=(-1.0, np.nan, "a", None), standardise=("yes", None)),
    *wrong(mixed, {},
           structure=("none", None, 3), fit_intercept=("yes", None)),
    Wrong(mixed, {"structure": "intercept", "fit_intercept": False},
          "structure must not be 'intercept' without intercept"),
    Wrong(advice.MixedModel().fit, FIT | {"groups": np.zeros(48)}, "at least 2 labels"),
    Wrong(ADVICE.report, {"format": "pdf"}, "format must be"),
    Wrong(ADVICE.report, {"theory": "yes"}, "theory must be"),
    Wrong(ADVICE.plot, {"theory": 2}, "theory must be"),
    Wrong(ADVICE.model, {"method": "lasso"}, "method must be"),
    Wrong(ADVICE.settings, {"method": 3}, "method must be"),
    Wrong(ADVICE.compare,
          {"method": "mixed model", "other": "lasso"}, "other must be"),
    *wrong(estimator, {}, train_rate=(np.nan, "a", None, [0.1]),
           adapt_rate=(np.nan, "a", None, "Auto", "", [0.1]),
           meta_ridge=(-1.0, np.nan, "a", None, [0.1]), n_t=(*COUNTS, 50), n_v=(*COUNTS, 50),
           n_r=(*COUNTS, 6), repeats=COUNTS, unit=("none", None), kernel=(3, "rbf", np.eye(2)),
           fit_intercept=("yes", None, 3), standardise=("yes", None, 3),
           random_state=("a", -1, 1.5)),
    *wrong(chosen, {}, rates=("a", [np.nan], []), meta_ridges=([-1.0], "a"), splits=COUNTS,
           m=(*COUNTS, 8), n_r=(*COUNTS, 6), unit=("none",), kernel=(3, "rbf"),
           random_state=("a", -1, 1.5), fit_intercept=("yes",), standardise=("yes",)),
    *wrong(nm.MetaRegressor().fit, FIT, groups=(GROUPS[:4], 3, [None] * 48)),
    *wrong(nm.MetaRegressorCV().fit, FIT, groups=(None, GROUPS[:4], [None] * 48)),
    Wrong(nm.MetaRegressor().fit, FIT | {"groups": GROUPS[:-1]}, "label for each"),
    Wrong(estimator, {"n_t": 6}, "at least 7 samples"),
    Wrong(predicted, {"X": X, "groups": GROUPS[:3]}, "groups"),
]  # fmt: skip
WRONG += wrong(advice.read_table, {"data": FRAME, "group": "g", "target": "y"},
               group=("h", "y", 3), target=("z", "t", None), features=("x", ["u"], [3], []),
               drop=("x", ["g"]), numeric=("x", ["u"]), categorical=("x", ["u"]), na=("x", [1]),
               missing=("none", None), decimal=(";", "", 3), data=("nothing.csv", 3))  # fmt: skip
WRONG += [
    *wrong(advice.network_rates, {"apply": network, "params": np.ones(2), "tasks": TASKS},
           apply=(None, 3, "net", lambda w, x: x), features=COUNTS,
           params=(None, 3, "w", np.ones(2) * 1j, {}, np.ones(2, int)),
           tasks=(None, 3, "tasks", TASKS[0], nm.Tasks(TASKS[0], TASKS[0][0]))),
    *[
        Wrong(advice.network_rates, {"apply": network, "params": np.ones(2), "tasks": tasks}, said)
        for tasks, said in (
            (jax.tree.map(lambda a: a[:1], TASKS), "tasks must be at least 2"),
            (nm.Tasks((X_TASKS[:, :1], Y_TASKS[:, :1]), TASKS[1]), "at least 2 support points"),
            (nm.Tasks(*[(x, np.stack([y, y], -1)) for x, y in TASKS]), "one output"),
            (nm.Tasks(TASKS[0], (X_TASKS * np.nan, Y_TASKS)), "must be finite"),
        )
    ],
]  # fmt: skip
RIGHT = []
