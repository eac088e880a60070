"""Mixed linear regression, and the exact mean effect of adaptation at finite size."""

from negmaml.problem.adapted_loss import (
    Adapted,
    adapted,
    expected_test_loss,
    filter_means,
    shrinkage,
)
from negmaml.problem.covariance import Modes
from negmaml.problem.model import MixedLinearRegression
from negmaml.problem.spectra import SPECTRA, named_spectrum
from negmaml.problem.wishart import normalized_moment, wishart_moment, wishart_quadrature

__all__ = [
    "SPECTRA",
    "Adapted",
    "MixedLinearRegression",
    "Modes",
    "adapted",
    "expected_test_loss",
    "filter_means",
    "named_spectrum",
    "normalized_moment",
    "shrinkage",
    "wishart_moment",
    "wishart_quadrature",
]
