"""Rates from your own grouped data: cross-validation over groups, moments, an estimator."""

from typing import Any

from negmaml.advice.api import advise
from negmaml.advice.moments import RandomCoefficients, random_coefficients
from negmaml.advice.result import Advice
from negmaml.advice.selection import Difference

__all__ = [
    "Advice",
    "Difference",
    "MetaRegressor",
    "MetaRegressorCV",
    "RandomCoefficients",
    "advise",
    "random_coefficients",
]


def __getattr__(name: str) -> Any:
    """The estimators, when they are asked for: they need scikit-learn."""
    if name == "MetaRegressor":
        from negmaml.advice.estimator import MetaRegressor

        return MetaRegressor
    if name == "MetaRegressorCV":
        from negmaml.advice.estimator_cv import MetaRegressorCV

        return MetaRegressorCV
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
