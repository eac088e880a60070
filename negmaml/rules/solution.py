"""The result of a rule that solves an inner problem."""

from typing import Any, NamedTuple

from negmaml._core.display import add_fields_repr

UNSOLVED = (
    "the inner problem was not solved on some task: values and meta-gradients there are not those "
    "of the rule; give it more steps, a larger tolerance or another strength, and see "
    "nm.adapt(..., return_info=True) for which tasks"
)


@add_fields_repr
class SolveInfo(NamedTuple):
    """Convergence of the solver of an inner problem.

    Attributes:
        converged: whether the parameters are those that the rule defines, to its tolerance; True
            for a rule that takes steps.
        residual: the norm of the equation that the parameters solve, zero for a rule that takes
            steps; for `Proximal` and `Implicit` |grad loss(theta) + strength (theta - params)|.
        steps: number of steps that were taken.
        negative_curvature: for `Proximal` and `Implicit`, whether H + strength I, with H the
            Hessian of the loss, was found to have a negative eigenvalue at the solution. It is then
            no minimum of loss(theta) + strength/2 |theta - params|^2, but a saddle point or a
            maximum; its implicit derivative is still exact. False means for up to 64 parameters
            that all eigenvalues are at least zero, up to rounding; for more, that 32 steps of
            conjugate gradients met no negative curvature. It is False for other rules, and where
            derivative rules in the loss may make H asymmetric. A compiled program that does not
            return it does not compute it.

    >>> import negmaml as nm
    >>> square = lambda w, target: (w - target) ** 2 / 2
    >>> adapted, info = nm.adapt(square, 0.0, 1.0, nm.Proximal(3.0), return_info=True)
    >>> bool(info.converged), bool(info.residual < 1e-5), bool(info.negative_curvature)
    (True, True, False)
    """

    converged: Any
    residual: Any
    steps: Any
    negative_curvature: Any = False


@add_fields_repr
class Solution(NamedTuple):
    """The adapted parameters with information on the solver.

    Attributes:
        params: a pytree.
        info: a `SolveInfo`.

    >>> import negmaml as nm
    >>> class Halfway(nm.InnerRule):
    ...     def solve(self, loss, start):
    ...         info = nm.rules.SolveInfo(converged=True, residual=0.0, steps=0)
    ...         return nm.rules.Solution(start / 2, info)
    >>> float(nm.adapt(lambda w, data: w**2, 1.0, None, Halfway()))
    0.5
    """

    params: Any
    info: SolveInfo


def as_solution(solved, steps) -> Solution:
    """The result of `InnerRule.solve` as a `Solution`; plain parameters count as converged."""
    return solved if isinstance(solved, Solution) else Solution(solved, SolveInfo(True, 0.0, steps))
