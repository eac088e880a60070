"""Closed-form predictions for mixed linear regression; every real argument is differentiable."""

from negmaml._core.deprecation import renamed_exports
from negmaml._core.lazy import public_names
from negmaml.problem import expected_test_loss, shrinkage, wishart_moment, wishart_quadrature
from negmaml.theory.allocation import Allocation, best_allocation
from negmaml.theory.api import test_loss, train_task_error, weight_error
from negmaml.theory.features import FeatureMoments, feature_moments
from negmaml.theory.optima import (
    RatePair,
    best_adapt_rate,
    best_meta_ridge,
    best_rates,
    best_train_rate,
    stationary_train_rates,
)
from negmaml.theory.phases import Phase, phase_diagram
from negmaml.theory.theorems import (
    expansion_parameter,
    general_inputs,
    overparameterized,
    underparameterized,
)
from negmaml.theory.variance import required_runs, standard_deviation

__all__ = [
    "Allocation",
    "FeatureMoments",
    "Phase",
    "RatePair",
    "best_adapt_rate",
    "best_allocation",
    "best_meta_ridge",
    "best_rates",
    "best_train_rate",
    "expansion_parameter",
    "expected_test_loss",
    "feature_moments",
    "general_inputs",
    "overparameterized",
    "phase_diagram",
    "required_runs",
    "shrinkage",
    "standard_deviation",
    "stationary_train_rates",
    "test_loss",
    "train_task_error",
    "underparameterized",
    "weight_error",
    "wishart_moment",
    "wishart_quadrature",
]

__dir__ = public_names(__name__)
__getattr__ = renamed_exports(
    __name__,
    {"distance": "weight_error", "task_error": "train_task_error", "runs_needed": "required_runs"},
)
