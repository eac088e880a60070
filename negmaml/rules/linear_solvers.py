r"""Linear solvers of the implicit derivative by name, for a symmetric system A x = b.

- "minres": minimal residuals (`negmaml.rules.krylov`), for any A.
- "cg": conjugate gradients, for A positive or negative definite; warns if it is neither.
- "neumann": x = sum_k a (I - a A)^k b with a = 1 / (largest eigenvalue), for the same A.
- "dense": forms A in one batched pass and factorises it, for any A of few rows.

A solver of lineax, such as `lineax.GMRES(rtol, atol)`, stops by its own tolerances; whether the
solution is accurate is then checked by the tolerance of the rule, as for all others.

Sources: "cg" as in implicit MAML, Rajeswaran et al., NeurIPS 2019; "neumann" as in Lorraine,
Vicol and Duvenaud, "Optimizing millions of hyperparameters by implicit differentiation",
AISTATS 2020.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from negmaml._core.convergence import warn_unless
from negmaml.rules.implicit import tolerance_or_default
from negmaml.rules.krylov import LinearSolution, conjugate_gradients, dot, minres, norm
from negmaml.rules.trust_region import ROUNDING

POWER_STEPS = 12  # of the power iteration for the size of A; half of the true size suffices
INDEFINITE = (
    "conjugate gradients met curvatures of both signs on some task: H + strength I is indefinite, "
    "so that the adapted parameters are no minimum; use linear_solver='minres' if that is meant"
)


class LinearSettings(NamedTuple):
    """A solver by name, of lineax, or a function (matvec, b) -> x; options as in `Implicit`."""

    solver: Any
    max_steps: int
    tolerance: float | None

    def solve_linear(self, rounding: float, apply, transposed, right) -> LinearSolution:
        """Solve a symmetric system; a `negmaml.rules.implicit.LinearSolver`."""
        tolerance = tolerance_or_default(self.tolerance, rounding)
        slack = ROUNDING * rounding
        if self.solver == "minres":
            return minres(apply, transposed, right, tolerance, slack, self.max_steps)
        if is_lineax(self.solver):
            x, size = _by_lineax(self.solver, apply, right), 0.0
        elif callable(self.solver):
            x, size = jnp.asarray(self.solver(apply, right), right.dtype), 0.0
            if x.shape != right.shape:
                raise ValueError(
                    f"linear_solver must return a vector like b, {right.shape}, got {x.shape}"
                )
        else:
            solve = NAMED[self.solver]
            x, size = solve(apply, right, tolerance / 2 * norm(right), self.max_steps)
        # As in `minres`, the transpose in the check reveals an A that is not symmetric.
        error = norm(right - transposed(x))
        allowed = tolerance * norm(right) + slack * size * norm(x)
        return LinearSolution(x, error, error <= allowed)


def definite_conjugate_gradients(apply: Callable, b, least, max_steps: int):
    """Return (x, an estimate of |A|) by conjugate gradients, until |b - A x| <= `least`."""
    x, smallest, largest = conjugate_gradients(apply, b, least, max_steps)
    # A singular matrix may have curvatures of the other sign by rounding.
    size = jnp.maximum(largest, -smallest)
    slack = ROUNDING * jnp.finfo(b.dtype).eps * size
    warn_unless((smallest >= -slack) | (largest <= slack), INDEFINITE)
    return x, size


def neumann(apply: Callable, b, least, max_steps: int):
    """Return (x, an estimate of |A|) by the Neumann series, until |b - A x| <= `least`."""
    tiny = jnp.finfo(b.dtype).tiny

    def power(_, carry):
        v, _ = carry
        image = apply(v)
        return image / jnp.maximum(norm(image), tiny), dot(v, image)

    # The series converges for a between 0 and twice the inverse, for either sign of A.
    v = b / jnp.maximum(norm(b), tiny)
    _, largest = lax.fori_loop(0, POWER_STEPS, power, (v, jnp.zeros_like(b[0])))
    a = jnp.where(largest != 0, 1 / largest, 0)

    def unfinished(carry):
        k, _, r = carry
        return (k < max_steps) & (norm(r) > least)

    # The residual b - A x is (I - a A)^k b, so adding a r adds the next term.
    def step(carry):
        k, x, r = carry
        return k + 1, x + a * r, r - a * apply(r)

    _, x, _ = lax.while_loop(unfinished, step, (0, jnp.zeros_like(b), b))
    return x, jnp.abs(largest)


def dense(apply: Callable, b, least, max_steps: int):
    """Return (x, |A|) by factorising A, whose columns come from one batched pass."""
    matrix = jax.vmap(apply, out_axes=1)(jnp.eye(b.size, dtype=b.dtype))
    return jnp.linalg.solve(matrix, b), norm(matrix.ravel())


def is_lineax(solver) -> bool:
    """Return whether this is a linear solver of lineax, which is imported if one exists."""
    lineax = sys.modules.get("lineax")
    return lineax is not None and isinstance(solver, lineax.AbstractLinearSolver)


def _by_lineax(solver, apply: Callable, b):
    """Return the solution of A x = b by a solver of lineax."""
    lineax: Any = sys.modules["lineax"]
    # These two refuse matrices that are not known to be definite; the residual shows a wrong claim.
    definite = isinstance(solver, lineax.CG | lineax.Cholesky)
    tags = lineax.positive_semidefinite_tag if definite else lineax.symmetric_tag
    operator = lineax.FunctionLinearOperator(apply, jax.eval_shape(lambda: b), tags)
    # A failure is reported by the residual, like that of other solvers.
    return lineax.linear_solve(operator, b, solver, throw=False).value


NAMED = {"cg": definite_conjugate_gradients, "neumann": neumann, "dense": dense}
NAMES = ("minres", *NAMED)
