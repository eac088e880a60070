"""Models of the methods that `advise` compares, besides meta-learning.

All have the conventions of `MetaRegressor`: `fit(X, y, groups)`, `predict(X, groups)`, and
`adapt(X, y)` for a new group.
"""

from collections.abc import Callable
from typing import Any, Self

import numpy as np

from negmaml._core.checks import check_choice, check_nonnegative, check_scalar
from negmaml.advice.baselines import mixed_structures, predicted_coefficients
from negmaml.advice.estimator import (
    MetaLinearModel,
    MetaRegressor,
    check_parameters,
    validate_data,
)
from negmaml.advice.meta_system import ridge_minimizer
from negmaml.advice.methods import JOINT, MIXED, POOLED, SINGLE
from negmaml.advice.moments import STRUCTURES, random_coefficients


class GroupedLinearModel(MetaLinearModel):
    """Base of the models of this module: a subclass fits weights, and adapts them to a group."""

    kernel: Any

    def fit(self, X: Any, y: Any, groups: Any = None) -> Self:
        """Fit to X (rows, features) and y (rows,) or (rows, targets).

        Arguments:
            groups: a label for each row; None: all rows are one group.

        Raises TypeError or ValueError for invalid arguments, before any computing.
        """
        check_parameters(self)
        self._check_options()
        X, y = validate_data(self, X, y, multi_output=True, y_numeric=True, dtype=np.float64)
        random = np.random.default_rng(self.random_state)
        features, target, rows = self._prepare(X, y, groups, random)
        self._fit_weights(features, target, rows)
        self._remember_groups(features, target, rows)
        return self

    def _check_options(self) -> None:
        """Raise for options of the subclass."""
        raise NotImplementedError

    def _fit_weights(self, features, target, rows) -> None:
        """Set `weights_` from scaled features and targets, and the rows of each group."""
        raise NotImplementedError

    def _ridge(self, features, target):
        return ridge_minimizer(
            np.hstack([features, target]), self.ridge, target.shape[1], int(self.fit_intercept)
        )


class PooledRidge(GroupedLinearModel):
    """A ridge regression on the rows of all groups; `adapt` takes one gradient step from it.

    Arguments:
        ridge: at least 0; an intercept is not penalized.
        adapt_rate: rate of the step, of any sign; 0: the model does not adapt.
        kernel, unit, fit_intercept, standardise, random_state: as for `MetaRegressor`.

    >>> import negmaml as nm
    >>> X, groups = np.arange(8.0)[:, None], np.repeat(["a", "b"], 4)
    >>> model = nm.advice.PooledRidge(ridge=0.0).fit(X, 2 * X[:, 0], groups)
    >>> model.predict(np.array([[3.0]])).round(3).tolist()
    [6.0]
    """

    def __init__(
        self,
        ridge: float = 0.0,
        adapt_rate: float = 0.0,
        *,
        kernel: Callable[..., Any] | None = None,
        unit: str = "scaled",
        fit_intercept: bool = True,
        standardise: bool = False,
        random_state: int = 0,
    ) -> None:
        # Stored as given: scikit-learn clones an estimator by its parameters.
        self.ridge = ridge
        self.adapt_rate = adapt_rate
        self.kernel = kernel
        self.unit = unit
        self.fit_intercept = fit_intercept
        self.standardise = standardise
        self.random_state = random_state

    def _check_options(self) -> None:
        check_nonnegative("ridge", self.ridge, "a ridge strength")
        check_scalar("adapt_rate", self.adapt_rate, "a rate")

    def _fit_weights(self, features, target, rows) -> None:
        self._set_unit(features)
        self._raw_adapt_rate = self.adapt_rate * self.unit_size_
        self.weights_: np.ndarray = self._ridge(features, target)


class PerGroupRidge(GroupedLinearModel):
    """A ridge regression for each group on its own rows.

    Without rows of a group it predicts the mean of the training targets, or zero without intercept.

    Arguments:
        ridge: at least 0; an intercept is not penalized.
        kernel, fit_intercept, standardise, random_state: as for `MetaRegressor`.

    >>> import negmaml as nm
    >>> X, groups = np.arange(8.0)[:, None], np.repeat(["up", "down"], 4)
    >>> y = np.where(groups == "up", X[:, 0], -X[:, 0])
    >>> model = nm.advice.PerGroupRidge().fit(X, y, groups)
    >>> model.predict(np.array([[3.0], [3.0]]), ["up", "down"]).round(3).tolist()
    [3.0, -3.0]
    """

    def __init__(
        self,
        ridge: float = 0.0,
        *,
        kernel: Callable[..., Any] | None = None,
        fit_intercept: bool = True,
        standardise: bool = False,
        random_state: int = 0,
    ) -> None:
        self.ridge = ridge
        self.kernel = kernel
        self.fit_intercept = fit_intercept
        self.standardise = standardise
        self.random_state = random_state

    def _check_options(self) -> None:
        check_nonnegative("ridge", self.ridge, "a ridge strength")

    def _fit_weights(self, features, target, rows) -> None:
        self.weights_: np.ndarray = np.zeros((features.shape[1], target.shape[1]))
        self.weights_[: int(self.fit_intercept)] = target.mean(0)

    def _adapted_weights(self, features, y):
        return self._ridge(features, y)


class MixedModel(GroupedLinearModel):
    r"""A linear mixed model: coefficients of groups vary around their mean.

        y = x . w_i + noise,     w_i of mean w0 and covariance Omega,    noise of variance sigma^2

    The moments are those of `random_coefficients`. `adapt` predicts the coefficients of a group
    from its rows, as w0 + Omega (sigma^2 + A Omega)^-1 (X^T y - A w0) with A = X^T X, the best
    linear unbiased prediction (Henderson 1975).

    Arguments:
        structure: of Omega, see `random_coefficients`: "intercept" (a random intercept), "equal"
            (random slopes of equal variances), or "full".
        kernel, fit_intercept, standardise, random_state: as for `MetaRegressor`.

    Attributes after `fit`: covariance_ (targets, p, p) and noise_variance_ (targets,), in scaled
    units, the intercept first; and those of `MetaRegressor`.

    >>> import negmaml as nm
    >>> random = np.random.default_rng(0)
    >>> groups, X = np.repeat(np.arange(50), 10), random.normal(size=(500, 2))
    >>> slopes = 1 + random.normal(size=(50, 2))
    >>> y = np.sum(X * slopes[groups], axis=1) + random.normal(size=500)
    >>> model = nm.advice.MixedModel().fit(X, y, groups)
    >>> model.noise_variance_.round(1).tolist(), model.adapt(X[:5], y[:5]).predict(X[5:9]).shape
    ([1.0], (4,))
    """

    def __init__(
        self,
        structure: str = "full",
        *,
        kernel: Callable[..., Any] | None = None,
        fit_intercept: bool = True,
        standardise: bool = False,
        random_state: int = 0,
    ) -> None:
        self.structure = structure
        self.kernel = kernel
        self.fit_intercept = fit_intercept
        self.standardise = standardise
        self.random_state = random_state

    def _check_options(self) -> None:
        check_choice("structure", self.structure, STRUCTURES)
        if self.structure not in mixed_structures(self.fit_intercept):
            raise ValueError(
                f"structure must not be {self.structure!r} without intercept; pass "
                "fit_intercept=True or another structure"
            )

    def _fit_weights(self, features, target, rows) -> None:
        if len(rows) < 2:
            raise ValueError(
                "groups must have at least 2 labels, between which coefficients vary, got "
                f"{len(rows)}"
            )
        counts = np.array([len(r) for r in rows.values()])
        z = [np.hstack([features[r], target[r]]) for r in rows.values()]
        gram, p = np.stack([part.T @ part for part in z]), features.shape[1]
        moments = []
        for column in range(p, gram.shape[-1]):
            keep = [*range(p), column]
            one = gram[:, keep][..., keep]
            moments.append(random_coefficients(one, counts, structure=self.structure))
        mean, covariance, noise = (np.stack(parts) for parts in zip(*moments, strict=True))
        self.covariance_: np.ndarray = covariance
        self.noise_variance_: np.ndarray = noise
        self.weights_: np.ndarray = mean.T

    def _adapted_weights(self, features, y):
        moments = self.weights_.T, self.covariance_, self.noise_variance_
        A = np.broadcast_to(features.T @ features, self.covariance_.shape)
        c = (features.T @ y).T
        return predicted_coefficients(*moments, A[:, None], c[:, None, :, None])[:, 0, :, 0].T


def model_of(advice, method: str):
    """The model of a method with the settings of an `Advice`, fitted to all its rows."""
    x, y, groups, kernel = advice.input
    options = advice.settings(method) | {
        "kernel": kernel,
        "fit_intercept": advice.data.intercept,
        "standardise": bool(np.any(advice.data.scales[1] != 1)),
    }
    model: MetaLinearModel
    if method == MIXED:
        model = MixedModel(**options)
    elif method == SINGLE:
        model = PerGroupRidge(**options)
    elif method in (POOLED, JOINT):
        model = PooledRidge(unit=advice.unit, **options)
    else:
        n_t, n_v = advice.sizes.n_t, advice.sizes.n_v
        model = MetaRegressor(n_t=n_t, n_v=n_v, unit=advice.unit, **options)
    return model.fit(x, y, groups)
