"""Inner rules: the interface `InnerRule`, and the rules that come with the package.

One object serves the theory (which integrates its filters), the exact simulation (which applies
them to data) and meta-training of any model (which runs its updates). Rates of either sign and zero
are allowed everywhere.
"""

from negmaml._core.deprecation import renamed_exports
from negmaml._core.lazy import public_names
from negmaml.rules.base import InnerRule
from negmaml.rules.base import accepted as accepted
from negmaml.rules.base import check_filters as check_filters
from negmaml.rules.base import check_rule as check_rule
from negmaml.rules.base import check_scalar_rule as check_scalar_rule
from negmaml.rules.base import flat_batch as flat_batch
from negmaml.rules.base import solve_with as solve_with
from negmaml.rules.bilevel import Implicit
from negmaml.rules.descent import GradientDescent, Momentum, Preconditioned
from negmaml.rules.filters import Filter, PolynomialFilter, UndefinedMethodError
from negmaml.rules.flow import GradientFlow
from negmaml.rules.optimizer import InnerOptimizer
from negmaml.rules.optimizer import as_rule as as_rule
from negmaml.rules.proximal import Proximal
from negmaml.rules.schedule import Schedule
from negmaml.rules.schedule import combine as combine
from negmaml.rules.schedule import separate as separate
from negmaml.rules.solution import UNSOLVED as UNSOLVED
from negmaml.rules.solution import Solution, SolveInfo
from negmaml.rules.solution import as_solution as as_solution
from negmaml.rules.unroll import run as run

# Imports by `as` are for other folders of the package; users can rely on these.
__all__ = [
    "Filter",
    "GradientDescent",
    "GradientFlow",
    "Implicit",
    "InnerOptimizer",
    "InnerRule",
    "Momentum",
    "PolynomialFilter",
    "Preconditioned",
    "Proximal",
    "Schedule",
    "Solution",
    "SolveInfo",
    "UndefinedMethodError",
]

__dir__ = public_names(__name__)
__getattr__ = renamed_exports(__name__, {"Rule": "InnerRule"})
