"""The result of a rule that solves an inner problem."""

from typing import Any, NamedTuple

UNSOLVED = (
    "the inner problem was not solved on some task: values and meta-gradients there are not those "
    "of the rule; give it more steps, a larger tolerance or another strength, and see "
    "nm.adapt(..., return_info=True) for which tasks"
)


class SolveInfo(NamedTuple):
    """Convergence of the solver of an inner problem.

    Attributes:
        converged: whether the parameters are those that the rule defines, to its tolerance; True
            for a rule that takes steps.
        residual: the norm of the equation that the parameters solve, zero for a rule that takes
            steps; for `Proximal` and `Implicit` |grad loss(theta) + strength (theta - params)|.
        steps: number of steps that were taken.
    """

    converged: Any
    residual: Any
    steps: Any


class Solution(NamedTuple):
    """The adapted parameters with information on the solver.

    params: a pytree.   info: a `SolveInfo`.
    """

    params: Any
    info: SolveInfo


def as_solution(solved, steps) -> Solution:
    """The result of `InnerRule.solve` as a `Solution`; plain parameters count as converged."""
    return solved if isinstance(solved, Solution) else Solution(solved, SolveInfo(True, 0.0, steps))
