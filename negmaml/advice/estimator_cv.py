"""The estimator that chooses its rates and ridge as `advise` does."""

import numpy as np

from negmaml._core.keys import key_of
from negmaml.advice.api import advise
from negmaml.advice.estimator import Adaptive, check_parameters, validate_data


class MetaRegressorCV(Adaptive):
    """`MetaRegressor` with the rates and the ridge of `advise`, which is in `advice_` after `fit`.

    Arguments: those of `advise` and `MetaRegressor`; `train_rate_`, `adapt_rate_` and `meta_ridge_`
    are what was chosen. `fit` needs groups, at least 4 of them.
    """

    def __init__(
        self,
        *,
        rates=None,
        adapt_rates=None,
        meta_ridges=None,
        n_t=None,
        n_v=None,
        n_r=None,
        m=None,
        splits=None,
        kernel=None,
        repeats=5,
        unit="scaled",
        fit_intercept=True,
        standardise=False,
        random_state=0,
    ):
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

    def fit(self, X, y, groups=None):
        """Choose rates and ridge by cross-validation over groups, then meta-train on all."""
        check_parameters(self)
        if groups is None:
            raise ValueError(
                "groups must be given, a label for each row, got None: rates are chosen by which "
                "groups are held out"
            )
        X, y = validate_data(self, X, y, multi_output=True, y_numeric=True, dtype=np.float64)
        self.advice_ = advise(
            X, y, groups, n_t=self.n_t, n_v=self.n_v, n_r=self.n_r, m=self.m, kernel=self.kernel,
            rates=self.rates, adapt_rates=self.adapt_rates, meta_ridges=self.meta_ridges,
            splits=self.splits, intercept=self.fit_intercept, standardise=self.standardise,
            unit=self.unit, key=key_of(self.random_state),
        )  # fmt: skip
        chosen, sizes = self.advice_, self.advice_.sizes
        self.train_rate_, self.adapt_rate_ = chosen.train_rate, chosen.adapt_rate
        self.meta_ridge_ = chosen.meta_ridge
        rates = chosen.train_rate, chosen.adapt_rate, chosen.meta_ridge
        self.learn(X, y, groups, *rates, sizes.n_t, sizes.n_v)
        return self
