"""Meta-trained linear and kernel models with the conventions of scikit-learn."""

import copy
from numbers import Integral
from typing import Any

import numpy as np

from negmaml._core.checks import (
    check_choice,
    check_count,
    check_flag,
    check_nonnegative,
    check_scalar,
)
from negmaml._core.extras import require
from negmaml.advice.data import UNITS, unique_labels, unit_of
from negmaml.advice.features import kernel_features

require("sklearn", "advice")
from sklearn.base import BaseEstimator, RegressorMixin  # noqa: E402
from sklearn.utils.validation import check_is_fitted, validate_data  # noqa: E402

BLOCK = 4096  # rows of the meta-system reduced at once


class Adaptive(RegressorMixin, BaseEstimator):
    """What a meta-trained model does once it has weights: predict, and adapt by one step."""

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def predict(self, X, groups=None):
        """Predictions, (rows,) or (rows, targets).

        Without groups, those of the model before adaptation. With a label for each row, rows of
        groups seen in training get the model adapted on all their training rows, others that
        before.
        """
        check_is_fitted(self, "weights_")
        features = self._features(self._validated(X))
        out = features @ self.weights_
        if groups is not None:
            labels = np.asarray(groups)
            if labels.shape != (len(out),):
                raise ValueError(
                    f"groups must have a label for each of {len(out)} rows, got {labels.shape}"
                )
            distinct, codes = unique_labels(labels)
            for i, label in enumerate(distinct.tolist()):
                if label in self._adapted:
                    rows = codes == i
                    out[rows] = features[rows] @ self._adapted[label]
        return self._in_units_of_y(out)

    def adapt(self, X, y):
        """This model after one step on the rows of a new group: a fitted predictor.

        theta = omega - adapt_rate/n X^T (X omega - y)
        """
        check_is_fitted(self, "weights_")
        X, y = validate_data(
            self, X, y, reset=False, multi_output=True, y_numeric=True, dtype=np.float64
        )
        adapted = copy.copy(self)
        adapted._adapted = {}
        adapted.weights_ = self._stepped(self._features(X), self._scaled_y(y))
        return adapted

    @property
    def coef_(self):
        """Coefficients of the features as given, (features,) or (targets, features)."""
        self._is_linear()
        scale, y_scale = self.scales_[1], self.scales_[3]
        weights = self.weights_[int(self.fit_intercept) :] / scale[:, None] * y_scale
        return weights[:, 0] if self._single else weights.T

    @property
    def intercept_(self):
        """The prediction at x = 0, a number or (targets,)."""
        self._is_linear()
        start = self._in_units_of_y(
            self._features(np.zeros((1, self.n_features_in_))) @ self.weights_
        )
        return float(start[0]) if self._single else start[0]

    def _is_linear(self) -> None:
        check_is_fitted(self, "weights_")
        if self.kernel is not None:
            raise AttributeError("a kernel model has no coefficients of its inputs; use predict")

    def _validated(self, X):
        return validate_data(self, X, reset=False, dtype=np.float64)

    def _features(self, X):
        X = (X - self.scales_[0]) / self.scales_[1]
        if self.kernel is not None:
            X = self.features_(X)
        return np.hstack([np.ones((len(X), 1)), X]) if self.fit_intercept else X

    def _scaled_y(self, y):
        return (np.reshape(y, (len(y), -1)) - self.scales_[2]) / self.scales_[3]

    def _in_units_of_y(self, out):
        out = out * self.scales_[3] + self.scales_[2]
        return out[:, 0] if self._single else out

    def _stepped(self, features, y):
        residual = features @ self.weights_ - y
        return self.weights_ - self._raw_adapt_rate / len(y) * features.T @ residual

    def learn(self, X, y, groups, train_rate, adapt_rate, meta_ridge, n_t, n_v) -> None:
        """Meta-train on validated rows, exactly."""
        random = np.random.default_rng(self.random_state)
        self._single = np.ndim(y) == 1
        target = np.reshape(np.asarray(y, np.float64), (len(y), -1))
        self.scales_ = _scales(X, target, self.standardise)
        if self.kernel is not None:
            inputs = (X - self.scales_[0]) / self.scales_[1]
            self.features_ = kernel_features(self.kernel, inputs, random)
        features, target = self._features(X), self._scaled_y(target)
        size = unit_of(features) if self.unit == "scaled" else 1.0
        self.unit_size_ = size
        self._raw_adapt_rate = adapt_rate * size
        rows, labels = _rows_of_groups(groups, len(X))
        self.groups_ = labels
        used = [r for r in rows if len(r) >= _needed(n_t, n_v)]
        if not used:
            raise ValueError(
                f"groups must have at least {_needed(n_t, n_v)} samples to be split into support "
                f"and query, got at most n_samples = {max(map(len, rows))}; lower n_t and n_v, or "
                "pass larger groups"
            )
        self.n_groups_left_out_ = len(rows) - len(used)
        triangle = _reduced(
            features, target, used, train_rate * size, n_t, n_v, self.repeats, random
        )
        self.weights_ = _minimiser(triangle, meta_ridge, target.shape[1], int(self.fit_intercept))
        self._adapted = {
            label: self._stepped(features[r], target[r])
            for label, r in zip(labels.tolist(), rows, strict=True)
        }


class MetaRegressor(Adaptive):
    r"""A linear or kernel model, meta-trained exactly, that adapts to a new group by one step.

        omega = argmin sum_groups |y_v - X_v theta(omega)|^2 + meta_ridge |omega|^2
        theta(omega) = omega - train_rate/n_t X_t^T (X_t omega - y_t)

    Arguments:
        train_rate, adapt_rate: inner rates of meta-training and of `adapt`, of any sign.
        meta_ridge: at least 0; an intercept is not shrunk. Zero gives the solution of least norm.
        kernel: kernel(x1, x2) -> (rows 1, rows 2), for a model in its space.
        n_t, n_v: support and query rows of a group; None: half of its rows, and the others.
        repeats: how often every group is split at random; the meta-loss is the mean over splits.
        unit: of both rates: "scaled", 1 over the largest eigenvalue of the second moments of the
            features, or "raw".
        fit_intercept: a constant feature, which adaptation moves.
        standardise: put features and targets in units of their standard deviations.
        random_state: seed of the splits.

    Attributes after `fit`: coef_ and intercept_ (without a kernel), weights_, unit_size_, groups_,
    n_groups_left_out_ (too small to be split), n_features_in_.
    """

    def __init__(
        self,
        train_rate=0.0,
        adapt_rate=0.0,
        meta_ridge=0.0,
        *,
        kernel=None,
        n_t=None,
        n_v=None,
        repeats=5,
        unit="scaled",
        fit_intercept=True,
        standardise=False,
        random_state=0,
    ):
        self.train_rate = train_rate
        self.adapt_rate = adapt_rate
        self.meta_ridge = meta_ridge
        self.kernel = kernel
        self.n_t = n_t
        self.n_v = n_v
        self.repeats = repeats
        self.unit = unit
        self.fit_intercept = fit_intercept
        self.standardise = standardise
        self.random_state = random_state

    def fit(self, X, y, groups=None):
        """Meta-train on rows X (rows, features), y (rows,) or (rows, targets); one group if None.

        Raises TypeError or ValueError for what cannot be used, before any computing.
        """
        check_parameters(self)
        for name in ("train_rate", "adapt_rate"):
            check_scalar(name, getattr(self, name), "a rate")
        check_nonnegative("meta_ridge", self.meta_ridge, "a ridge strength")
        X, y = validate_data(self, X, y, multi_output=True, y_numeric=True, dtype=np.float64)
        rates = float(self.train_rate), float(self.adapt_rate), float(self.meta_ridge)
        self.learn(X, y, groups, *rates, self.n_t, self.n_v)
        return self


def check_parameters(estimator: Any) -> None:
    """Raise for what both estimators refuse, at `fit` as scikit-learn has it."""
    check_choice("unit", estimator.unit, UNITS)
    check_count("repeats", estimator.repeats)
    for name in ("fit_intercept", "standardise"):
        check_flag(name, getattr(estimator, name))
    seed = estimator.random_state
    if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
        raise ValueError(f"random_state must be an integer of at least 0, got {seed!r}")
    for name in ("n_t", "n_v"):
        if getattr(estimator, name) is not None:
            check_count(name, getattr(estimator, name))


def _scales(X, y, standardise):
    """Means and spreads of features and targets, 0 and 1 if they are used as they are."""
    if not standardise:
        return np.zeros(X.shape[1]), np.ones(X.shape[1]), np.zeros(y.shape[1]), np.ones(y.shape[1])
    spreads = [np.where(np.ptp(a, axis=0) > 0, a.std(0), 1.0) for a in (X, y)]
    return X.mean(0), spreads[0], y.mean(0), spreads[1]


def _rows_of_groups(groups, size: int):
    """The rows of every group, and the labels."""
    if groups is None:
        return [np.arange(size)], np.zeros(1, int)
    labels = np.asarray(groups)
    if labels.shape != (size,):
        raise ValueError(f"groups must have a label for each of {size} rows, got {labels.shape}")
    distinct, codes = unique_labels(labels)
    order = np.argsort(codes, kind="stable")
    return np.split(order, np.cumsum(np.bincount(codes))[:-1]), distinct


def _needed(n_t, n_v) -> int:
    return (n_t or 1) + (n_v or 1)


def _reduced(features, y, groups, rate, n_t, n_v, repeats, random):
    """R of the QR decomposition of the meta-system [Phi, r] over all groups and repeats.

    Phi = X_v - rate/n_t X_v X_t^T X_t and r = y_v - rate/n_t X_v X_t^T y_t, each over
    sqrt(repeats).
    """
    z, p = np.hstack([features, y]), features.shape[1]
    reduced: np.ndarray = np.zeros((0, z.shape[1]))
    pending: list[np.ndarray] = []
    for _ in range(repeats):
        for rows in groups:
            order = random.permutation(rows)
            support = n_t or len(rows) // 2
            query = z[order[support : support + n_v if n_v else None]]
            few = z[order[:support]]
            step = rate / support * (query[:, :p] @ few[:, :p].T) @ few
            pending.append((query - step) / np.sqrt(repeats))
            if sum(map(len, pending)) >= max(BLOCK, 2 * z.shape[1]):
                reduced, pending = _triangle([reduced, *pending]), []
    return _triangle([reduced, *pending])


def _minimiser(triangle, ridge, targets: int, free: int):
    """The least squares solution, of least norm, with a ridge on all but `free` weights."""
    p = triangle.shape[1] - targets
    shrunk = np.sqrt(ridge) * np.eye(p)[free:]
    system = np.vstack([triangle[:, :p], shrunk])
    right = np.vstack([triangle[:, p:], np.zeros((len(shrunk), targets))])
    return np.linalg.lstsq(system, right, rcond=None)[0]


def _triangle(parts: list[np.ndarray]) -> np.ndarray:
    return np.asarray(np.linalg.qr(np.vstack(parts), mode="r"))
