"""The method for grouped data and its rates: cross-validation over groups, moments and models."""

from typing import Any

from negmaml._core.lazy import missing_name, public_names
from negmaml.advice.api import advise
from negmaml.advice.files import GroupedTable, read_table
from negmaml.advice.moments import RandomCoefficients, random_coefficients
from negmaml.advice.network import BestRates, NetworkRates, network_rates
from negmaml.advice.result import Advice
from negmaml.advice.selection import Difference

__all__ = [
    "AdaptiveGroupKFold",
    "AdaptiveScorer",
    "Advice",
    "BestRates",
    "Difference",
    "GroupedTable",
    "MetaRegressor",
    "MetaRegressorCV",
    "MixedModel",
    "NetworkRates",
    "PerGroupRidge",
    "PooledRidge",
    "RandomCoefficients",
    "adapted",
    "advise",
    "network_rates",
    "random_coefficients",
    "read_table",
]

__dir__ = public_names(__name__)


SCORING = ("AdaptiveGroupKFold", "AdaptiveScorer", "adapted")


def __getattr__(name: str) -> Any:
    """Import an estimator at its first use: the estimators need scikit-learn, `advise` does not."""
    if name in ("MetaRegressor", "MetaRegressorCV"):
        from negmaml.advice import estimator

        return getattr(estimator, name)
    if name in SCORING:
        from negmaml.advice import scoring

        return getattr(scoring, name)
    if name in ("MixedModel", "PerGroupRidge", "PooledRidge"):
        from negmaml.advice import models

        return getattr(models, name)
    raise missing_name(__name__, name, __all__)
