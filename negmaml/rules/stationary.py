"""The parts that all rules share whose adapted parameters solve one equation."""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.checks import short_repr
from negmaml._core.pytree import split_floating
from negmaml._core.types import PyTree
from negmaml.rules.base import InnerRule
from negmaml.rules.field import is_field
from negmaml.rules.implicit import LinearSolver, pull_back
from negmaml.rules.schedule import combine
from negmaml.rules.solution import Solution


class StationaryRule(InnerRule):
    """A rule with grad loss(theta) + strength (theta - start) = 0 at the adapted parameters.

    A rule defines `solve`, and the solver of the linear system of the derivative.
    """

    strength: Any

    tunable: ClassVar[str] = "strength"
    implicit: ClassVar[bool] = True

    @property
    def _solve_linear(self) -> LinearSolver:
        raise NotImplementedError

    def check(self, params: PyTree) -> None:
        # On a general model one problem is solved, so an array would have no meaning.
        if np.shape(self.strength) != ():
            raise ValueError(
                f"strength must be one number on a general model, got {short_repr(self.strength)}; "
                "for a batch of rules use jax.vmap"
            )

    def solve_and_pull_back(  # type: ignore[override]
        self, loss: Callable[..., Any], start: PyTree, frozen: PyTree
    ) -> tuple[Solution, Callable[..., Any]]:
        """The solution and its pull-back by one linear system, whose accuracy is checked."""
        # The symmetric solver needs a symmetric Hessian; a field is differentiated in reverse mode.
        if is_field(lambda theta: loss(theta, frozen), start):
            return super().solve_and_pull_back(loss, start, frozen)
        solution = self.solve(lambda theta: loss(theta, frozen), start)
        at, (numbers, others) = solution.params, split_floating(self)
        pull_to_strength = pull_back(loss, start, frozen, self.strength, at, self._solve_linear)

        def pull(cotangent):
            of_start, of_frozen, of_strength, accurate = pull_to_strength(cotangent)

            # All other numbers belong to the search, which has no effect on the solution.
            def strength(numbers):
                return jnp.asarray(combine(numbers, others).strength, of_strength.dtype)

            return of_start, of_frozen, jax.vjp(strength, numbers)[1](of_strength)[0], accurate

        return solution, pull
