"""Mixed linear regression, and the exact mean effect of adaptation at finite size."""

from negmaml._core.lazy import public_names, suggesting
from negmaml.problem.adapted_loss import Adapted as Adapted
from negmaml.problem.adapted_loss import adapted as adapted
from negmaml.problem.adapted_loss import expected_test_loss, filter_means, shrinkage
from negmaml.problem.covariance import Modes
from negmaml.problem.model import MixedLinearRegression
from negmaml.problem.spectra import SPECTRA as SPECTRA
from negmaml.problem.spectra import named_spectrum
from negmaml.problem.wishart import normalized_moment as normalized_moment
from negmaml.problem.wishart import wishart_moment, wishart_quadrature

# Imports by `as` are for other folders of the package; users can rely on these.
__all__ = [
    "MixedLinearRegression",
    "Modes",
    "expected_test_loss",
    "filter_means",
    "named_spectrum",
    "shrinkage",
    "wishart_moment",
    "wishart_quadrature",
]

__dir__ = public_names(__name__)
__getattr__ = suggesting(__name__)
