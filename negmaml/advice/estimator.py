"""Meta-trained linear and kernel models with the conventions of scikit-learn."""

import copy
import warnings
from collections.abc import Callable
from numbers import Integral
from typing import Any, ClassVar, Self

import numpy as np

from negmaml._core.calls import explain_calls
from negmaml._core.checks import (
    check_choice,
    check_count,
    check_flag,
    check_nonnegative,
    check_optional,
    check_scalar,
)
from negmaml._core.extras import require
from negmaml._core.keys import key_of
from negmaml._core.types import Numbers
from negmaml.advice import Advice, advise
from negmaml.advice.data import UNITS
from negmaml.advice.features import kernel_features
from negmaml.advice.labels import listed, unique_labels
from negmaml.advice.meta_system import FOLDS, MetaSystem
from negmaml.advice.rowblocks import check_sizes, no_scales, rate_unit, standard_scales

require("sklearn", "advice")
from sklearn.base import BaseEstimator, RegressorMixin  # noqa: E402
from sklearn.metrics import r2_score  # noqa: E402
from sklearn.utils.validation import check_is_fitted, validate_data  # noqa: E402

AUTO = "auto"


class MetaLinearModel(RegressorMixin, BaseEstimator):
    """Base of both estimators: weights that predict, and adapt to a group by one gradient step.

    A subclass chooses the rates and the ridge in `fit` and calls `_meta_train`. Private methods
    work in scaled units of features and targets, public ones in the user's.
    """

    # With metadata routing, labels reach these methods without a request by the user.
    __metadata_request__fit: ClassVar = {"groups": True}
    __metadata_request__predict: ClassVar = {"groups": True}
    __metadata_request__score: ClassVar = {"groups": True}

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        # scikit-learn reads from the tags that y may have several columns.
        tags.target_tags.multi_output = True
        return tags

    def predict(self, X: Any, groups: Any = None) -> np.ndarray:
        """Predict targets, (rows,) or (rows, targets).

        Without groups, by the model before adaptation. With a label for each row, rows of groups
        seen in training are predicted by the model adapted to all their training rows, other rows
        by the model before adaptation.
        """
        check_is_fitted(self, "weights_")
        features = self._features(validate_data(self, X, reset=False, dtype=np.float64))
        out = features @ self.weights_
        if groups is not None:
            _, names, codes = unique_labels(groups, len(out))
            new = [name for name in names if name not in self._adapted]
            if new:
                warnings.warn(
                    f"{len(new)} of {len(names)} groups were not in training ({listed(new)}): the "
                    "model before adaptation predicts them; use adapt, in cross-validation "
                    "AdaptiveScorer",
                    stacklevel=2,
                )
            for i, name in enumerate(names):
                if name in self._adapted:
                    rows = codes == i
                    out[rows] = features[rows] @ self._adapted[name]
        return self._unscaled_y(out)

    def score(self, X: Any, y: Any, sample_weight: Any = None, groups: Any = None) -> float:
        """Return R^2 of `predict(X, groups)`."""
        return r2_score(y, self.predict(X, groups), sample_weight=sample_weight)

    def adapt(self, X: Any, y: Any) -> Any:
        """Return this model adapted to the rows of a new group, a fitted predictor.

        One step, theta = omega - adapt_rate/n X^T (X omega - y), unless the class says otherwise.

        Raises ValueError for X and y that do not have the columns of the training data.
        """
        check_is_fitted(self, "weights_")
        X, y = validate_data(
            self, X, y, reset=False, multi_output=True, y_numeric=True, dtype=np.float64
        )
        targets = self.weights_.shape[1]
        # Another number would be broadcast to all targets.
        if y[:1].size != targets:
            raise ValueError(
                f"y must have the {targets} target(s) of training in each row, got shape {y.shape}"
            )
        # A shallow copy: parameters and scales are shared, and only the weights are replaced.
        adapted = copy.copy(self)
        adapted._adapted = {}  # its weights already belong to one group
        adapted.weights_ = self._adapted_weights(self._features(X), self._scaled_y(y))
        return adapted

    @property
    def coef_(self) -> np.ndarray:
        """Coefficients of the features as given, (features,) or (targets, features)."""
        self._check_linear()
        scale, y_scale = self.scales_[1], self.scales_[3]
        # The weights are for scaled features and targets; these are in the user's units.
        weights = self.weights_[int(self.fit_intercept) :] / scale[:, None] * y_scale
        return weights[:, 0] if self._single else weights.T

    @property
    def intercept_(self) -> Any:
        """The prediction at x = 0, a number or (targets,)."""
        self._check_linear()
        # The user's x = 0 is not zero in scaled units.
        zero = self._features(np.zeros((1, self.n_features_in_)))
        start = self._unscaled_y(zero @ self.weights_)
        return float(start[0]) if self._single else start[0]

    def _check_linear(self) -> None:
        check_is_fitted(self, "weights_")
        if self.kernel is not None:
            raise AttributeError("a kernel model has no coefficients of its inputs; use predict")

    def _features(self, X):
        X = (X - self.scales_[0]) / self.scales_[1]
        if self.kernel is not None:
            X = self.features_(X)
        return np.hstack([np.ones((len(X), 1)), X]) if self.fit_intercept else X

    def _scaled_y(self, y):
        return (np.reshape(y, (len(y), -1)) - self.scales_[2]) / self.scales_[3]

    def _unscaled_y(self, out):
        out = out * self.scales_[3] + self.scales_[2]
        return out[:, 0] if self._single else out

    def _adapted_weights(self, features, y):
        """The weights after one gradient step on rows of a group."""
        residual = features @ self.weights_ - y
        return self.weights_ - self._raw_adapt_rate / len(y) * features.T @ residual

    def _prepare(self, X, y, groups, random):
        """Scale validated rows: features, targets, and the rows of each group by its name."""
        self._single = np.ndim(y) == 1
        target = np.reshape(np.asarray(y, np.float64), (len(y), -1))
        if not self.standardise:
            check_sizes("X", X)
            check_sizes("y", target)
        scales = standard_scales(X, target)
        self.scales_ = scales if self.standardise else no_scales(scales)
        if self.kernel is not None:
            inputs = (X - self.scales_[0]) / self.scales_[1]
            self.features_ = kernel_features(self.kernel, inputs, random)
        rows, names, self.groups_ = _rows_of_groups(groups, len(X))
        return self._features(X), self._scaled_y(target), dict(zip(names, rows, strict=True))

    def _set_unit(self, features) -> None:
        # After scaling and the kernel, since the inner step acts on these features.
        self.unit_size_ = rate_unit(features) if self.unit == "scaled" else 1.0

    def _remember_groups(self, features, target, rows) -> None:
        """Adapt to each training group, for predictions with its label."""
        self._adapted = {
            name: self._adapted_weights(features[r], target[r]) for name, r in rows.items()
        }

    def _meta_train(
        self, X, y, groups, train_rate, adapt_rate, meta_ridge, n_t, n_v, n_r=None
    ) -> None:
        """Meta-train exactly on validated rows; the adaptation rate may be "auto"."""
        # One generator for landmarks and splits, so that `random_state` fixes both.
        random = np.random.default_rng(self.random_state)
        features, target, rows = self._prepare(X, y, groups, random)
        self._set_unit(features)
        # With defaults a group is cut in halves, for which two rows are enough.
        needed = (n_t or 1) + (n_v or 1)
        large = [r for r in rows.values() if len(r) >= needed]
        if not large:
            raise ValueError(
                f"groups must have at least {needed} samples to be split into support and query, "
                f"got at most n_samples = {max(map(len, rows.values()))}; lower n_t and n_v, or "
                "pass larger groups"
            )
        if adapt_rate == AUTO and n_r is not None and max(map(len, large)) <= n_r:
            raise ValueError(
                f"n_r must leave rows of a group to measure on, got {n_r} with at most n_samples = "
                f"{max(map(len, large))} in a group"
            )
        self.n_groups_left_out_ = len(rows) - len(large)
        orders = [random.permutation(r) for _ in range(self.repeats) for r in large]
        system = MetaSystem(
            features, target, orders, self.repeats, train_rate * self.unit_size_, meta_ridge,
            n_t, n_v, int(self.fit_intercept),
        )  # fmt: skip
        if adapt_rate == AUTO and len(large) > 1:
            folds = np.random.default_rng(self.random_state).permutation(len(large)) % FOLDS
            self.weights_, raw = system.with_best_adapt_rate(np.tile(folds, self.repeats), n_r)
            self.adapt_rate_ = raw / self.unit_size_
        else:
            self.weights_ = system.minimizer()
            # One group shows nothing on how groups differ.
            self.adapt_rate_ = 0.0 if adapt_rate == AUTO else adapt_rate
        self._raw_adapt_rate = self.adapt_rate_ * self.unit_size_
        # Small groups did not train, but their rows adapt the model.
        self._remember_groups(features, target, rows)


class MetaRegressor(MetaLinearModel):
    r"""A linear or kernel model, meta-trained exactly, that adapts to a new group by one step.

        omega = argmin sum_groups |y_v - X_v theta(omega)|^2 + meta_ridge |omega|^2
        theta(omega) = omega - train_rate/n_t X_t^T (X_t omega - y_t)

    Arguments:
        train_rate: inner rate of meta-training, of any sign.
        adapt_rate: rate of `adapt` and of predictions for known groups, of any sign; "auto": the
            rate with the least squared error on groups that did not train, in five folds.
        meta_ridge: at least 0; an intercept is not penalized. Zero gives the least-norm solution.
        kernel: kernel(x1, x2) -> (rows 1, rows 2), for a model in its space.
        n_t, n_v: support and query rows of a group; None: half of its rows, and the others.
        n_r: rows that a new group will have to adapt on, for which "auto" chooses; None: n_t.
        repeats: number of random splits of every group; the meta-loss is the mean over splits.
        unit: unit of both rates: "scaled", 1 over the largest eigenvalue of the second moments of
            the features, or "raw".
        fit_intercept: add a constant feature, which adaptation moves.
        standardise: put features and targets in units of their standard deviations.
        random_state: seed of the splits.

    Attributes after `fit`: adapt_rate_, coef_ and intercept_ (without a kernel), weights_,
    unit_size_, groups_, n_groups_left_out_ (too small to be split), n_features_in_.

    >>> import numpy as np
    >>> random = np.random.default_rng(0)
    >>> school = np.repeat(np.arange(50), 20)
    >>> X = random.normal(size=(1000, 2))
    >>> slopes = 1 + random.normal(size=(50, 2))
    >>> y = np.sum(X * slopes[school], axis=1) + random.normal(size=1000)
    >>> model = MetaRegressor().fit(X, y, groups=school)
    >>> bool(model.adapt_rate_ > 0), model.adapt(X[:9], y[:9]).predict(X[9:20]).shape
    (True, (11,))
    """

    @explain_calls
    def __init__(
        self,
        train_rate: float = 0.0,
        adapt_rate: float | str = AUTO,
        meta_ridge: float = 0.0,
        *,
        kernel: Callable[..., Any] | None = None,
        n_t: int | None = None,
        n_v: int | None = None,
        n_r: int | None = None,
        repeats: int = 5,
        unit: str = "scaled",
        fit_intercept: bool = True,
        standardise: bool = False,
        random_state: int = 0,
    ) -> None:
        # Stored as given: scikit-learn clones an estimator by its parameters. `fit` checks them.
        self.train_rate = train_rate
        self.adapt_rate = adapt_rate
        self.meta_ridge = meta_ridge
        self.kernel = kernel
        self.n_t = n_t
        self.n_v = n_v
        self.n_r = n_r
        self.repeats = repeats
        self.unit = unit
        self.fit_intercept = fit_intercept
        self.standardise = standardise
        self.random_state = random_state

    def fit(self, X: Any, y: Any, groups: Any = None) -> Self:
        """Meta-train on X (rows, features) and y (rows,) or (rows, targets).

        Arguments:
            groups: a label for each row. None: all rows are one group, with a warning; the rate
                "auto" is then 0.

        Raises TypeError or ValueError for invalid arguments, before any computing.
        """
        check_parameters(self)
        check_scalar("train_rate", self.train_rate, "a rate")
        adapt_rate: float | str = AUTO
        if isinstance(self.adapt_rate, str):
            check_choice("adapt_rate", self.adapt_rate, (AUTO,))
        else:
            adapt_rate = float(check_scalar("adapt_rate", self.adapt_rate, 'a rate, or "auto"'))
        check_nonnegative("meta_ridge", self.meta_ridge, "a ridge strength")
        check_optional(check_count, "n_r", self.n_r)
        X, y = validate_data(self, X, y, multi_output=True, y_numeric=True, dtype=np.float64)
        if groups is None:
            warnings.warn(
                "fit without groups takes all rows as one group, so that nothing can be learned "
                "about others; pass groups=, in a pipeline metaregressor__groups=, or enable "
                "metadata routing in scikit-learn",
                stacklevel=2,
            )
        rates = float(self.train_rate), adapt_rate, float(self.meta_ridge)
        self._meta_train(X, y, groups, *rates, self.n_t, self.n_v, self.n_r)
        return self


class MetaRegressorCV(MetaLinearModel):
    """`MetaRegressor` with the rates and the ridge of `advise`, stored in `advice_` after `fit`.

    Arguments are those of `advise` and `MetaRegressor`. `fit` needs labels of at least 4 groups.
    The choice is in `train_rate_`, `adapt_rate_` and `meta_ridge_`.

    >>> import negmaml as nm
    >>> random = np.random.default_rng(0)
    >>> groups, X = np.repeat(np.arange(40), 12), random.normal(size=(480, 3))
    >>> y = np.sum(X * (1 + random.normal(size=(40, 3)))[groups], 1) + random.normal(size=480)
    >>> model = nm.MetaRegressorCV(n_r=6).fit(X, y, groups)
    >>> bool(model.adapt_rate_ > 0), model.advice_.recommended
    (True, 'mixed model')
    """

    @explain_calls
    def __init__(
        self,
        *,
        rates: Numbers | None = None,
        adapt_rates: Numbers | None = None,
        meta_ridges: Numbers | None = None,
        n_t: int | None = None,
        n_v: int | None = None,
        n_r: int | None = None,
        m: int | None = None,
        splits: int | None = None,
        kernel: Callable[..., Any] | None = None,
        repeats: int = 5,
        unit: str = "scaled",
        fit_intercept: bool = True,
        standardise: bool = False,
        random_state: int = 0,
    ) -> None:
        # Stored as given, as in `MetaRegressor`.
        self.rates = rates
        self.adapt_rates = adapt_rates
        self.meta_ridges = meta_ridges
        self.n_t = n_t
        self.n_v = n_v
        self.n_r = n_r
        self.m = m
        self.splits = splits
        self.kernel = kernel
        self.repeats = repeats
        self.unit = unit
        self.fit_intercept = fit_intercept
        self.standardise = standardise
        self.random_state = random_state

    def fit(self, X: Any, y: Any, groups: Any = None) -> Self:
        """Choose rates and ridge by cross-validation over groups, then meta-train on all."""
        check_parameters(self)
        if groups is None:
            raise ValueError(
                "groups must be given, a label for each row, got None: rates are chosen by holding "
                "out groups"
            )
        X, y = validate_data(self, X, y, multi_output=True, y_numeric=True, dtype=np.float64)
        shared = ("n_t", "n_v", "n_r", "m", "kernel", "rates", "adapt_rates", "meta_ridges",
                  "splits", "standardise", "unit")  # fmt: skip
        options = {name: getattr(self, name) for name in shared}
        self.advice_: Advice = advise(
            X, y, groups, **options, intercept=self.fit_intercept, key=key_of(self.random_state)
        )
        self.train_rate_: float = self.advice_.train_rate
        self.meta_ridge_: float = self.advice_.meta_ridge
        # The advised rates are the best ones for these numbers of support and query rows.
        sizes = self.advice_.sizes
        rates = self.train_rate_, self.advice_.adapt_rate, self.meta_ridge_
        self._meta_train(X, y, groups, *rates, sizes.n_t, sizes.n_v)
        return self


def check_parameters(estimator: Any) -> None:
    """Check parameters that estimators share: at `fit`, as scikit-learn asks for."""
    given = estimator.get_params(deep=False)
    check_choice("unit", given.get("unit", UNITS[0]), UNITS)
    check_count("repeats", given.get("repeats", 1))
    for name in ("fit_intercept", "standardise"):
        check_flag(name, given[name])
    seed = given["random_state"]
    if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
        raise ValueError(f"random_state must be an integer of at least 0, got {seed!r}")
    for name in ("n_t", "n_v"):
        check_optional(check_count, name, given.get(name))


def _rows_of_groups(groups, size: int):
    """Return the row indices of every group, its name as a text, and the labels."""
    if groups is None:
        return [np.arange(size)], ["0"], np.zeros(1, int)
    labels, names, codes = unique_labels(groups, size)
    order = np.argsort(codes, kind="stable")
    return np.split(order, np.cumsum(np.bincount(codes))[:-1]), names, labels
