"""Mixed linear regression, and what adaptation does to it on average, exactly at finite size."""

from negmaml.problem.adaptation import expected_test_loss, filter_means, shrinkage
from negmaml.problem.model import MixedLinearRegression
from negmaml.problem.wishart import normalized_moment, wishart_moment, wishart_quadrature

__all__ = [
    "MixedLinearRegression",
    "expected_test_loss",
    "filter_means",
    "normalized_moment",
    "shrinkage",
    "wishart_moment",
    "wishart_quadrature",
]
