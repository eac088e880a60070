"""Inner rules: the interface `InnerRule`, and the rules that come with the package.

One object serves the theory (which integrates its filters), the exact simulation (which applies
them to data) and meta-training of any model (which runs its updates). Rates of either sign and zero
are allowed everywhere.
"""

from negmaml._core.deprecation import renamed_exports
from negmaml.rules.base import (
    InnerRule,
    accepted,
    check_filters,
    check_rule,
    check_scalar_rule,
    flat_batch,
    solve_with,
)
from negmaml.rules.bilevel import Implicit
from negmaml.rules.descent import GradientDescent, Momentum, Preconditioned
from negmaml.rules.filters import Filter, PolynomialFilter, UndefinedMethodError
from negmaml.rules.flow import GradientFlow
from negmaml.rules.optimizer import InnerOptimizer, as_rule
from negmaml.rules.proximal import Proximal
from negmaml.rules.schedule import Schedule, combine, separate
from negmaml.rules.solution import UNSOLVED, Solution, SolveInfo, as_solution
from negmaml.rules.unroll import run

__all__ = [
    "UNSOLVED",
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
    "accepted",
    "as_rule",
    "as_solution",
    "check_filters",
    "check_rule",
    "check_scalar_rule",
    "combine",
    "flat_batch",
    "run",
    "separate",
    "solve_with",
]

__getattr__ = renamed_exports(__name__, {"Rule": "InnerRule"})
