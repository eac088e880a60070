r"""The proximal inner problem and the implicit derivative of a stationary point (implicit MAML).

    theta*(params):   F(theta, params) = grad loss(theta) + strength (theta - params) = 0

For a strength above zero, theta* is a minimum of loss(theta) + strength/2 |theta - params|^2, found
by `negmaml.rules.trust_region` from params. For a negative strength this function need not have a
minimum, and theta* is a point where F = 0.

By the implicit function theorem d theta* = -(H + strength)^{-1} dF, with H the Hessian of the
loss at theta*: the derivative needs the solution, not the path to it. H + strength I may be
indefinite, so its systems are solved by MINRES. Source: Rajeswaran et al., NeurIPS 2019.

`differentiable_root` and `pull_back` attach this derivative to a point that any search has found.
They serve `Implicit` with other searches and linear solvers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from negmaml._core.convergence import warn_unless
from negmaml._core.keys import fixed_key
from negmaml.rules.krylov import LinearSolution, conjugate_gradients, dot, minres, norm
from negmaml.rules.solution import Solution, SolveInfo
from negmaml.rules.trust_region import FORCING, ROUNDING, Problem, StationaryPoint, stationary_point

DENSE = 64  # number of parameters up to which the Hessian is formed, in one batched pass
CURVATURE_STEPS = 32  # products with H that look for a negative curvature, above that number
FARTHEST = 1e3  # radius of the first trust region, in units of 1 + |params|
INEXACT = (
    "the implicit derivative of the rule was not solved to its tolerance on some task, so that "
    "meta-gradients there are inexact: H + strength I may be close to singular; try another "
    "strength, more steps of the linear solver or float64"
)

# (rounding, A, its transpose, b) -> the solution of A x = b, for a symmetric A.
LinearSolver: TypeAlias = Callable[[float, Callable, Callable, Any], LinearSolution]


class Settings(NamedTuple):
    """Options of the solver of a proximal problem, as in `Proximal`."""

    max_steps: int
    tolerance: float | None

    def solve_linear(self, rounding: float, apply, transposed, right) -> LinearSolution:
        """Solve a symmetric system by MINRES; a `LinearSolver`."""
        return minres(
            apply, transposed, right, tolerance_or_default(self.tolerance, rounding),
            ROUNDING * rounding, 20 * self.max_steps,
        )  # fmt: skip


class FlatProblem(NamedTuple):
    """The equation F(theta, start) = 0 for flat vectors of at least single precision."""

    loss: Callable
    start: Any
    strength: Any
    rounding: float  # of the coarsest leaf
    unravel: Callable

    def flatten(self, params):
        """A pytree of parameters as a flat vector of the problem."""
        return ravel_pytree(params)[0].astype(self.start.dtype)

    def residual(self, theta):
        """F(theta, start)."""
        return jax.grad(self.loss)(theta) + self.strength * (theta - self.start)


def flat_problem(loss: Callable, params, strength) -> FlatProblem:
    """The `FlatProblem` of a loss of a pytree, with `params` as the start."""
    start, unravel_as = ravel_pytree(params)
    # Half precision would not resolve the residual, so the solver works in at least float32.
    work = jnp.promote_types(start.dtype, jnp.float32)
    rounding = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(params))

    def unravel(flat):
        return unravel_as(flat.astype(start.dtype))

    def flat_loss(flat):
        return loss(unravel(flat)).astype(work)

    return FlatProblem(
        flat_loss, start.astype(work), jnp.asarray(strength, work), rounding, unravel
    )


def tolerance_or_default(own: float | None, rounding: float) -> float:
    """The given tolerance, or rounding^(3/4)."""
    return rounding**0.75 if own is None else own


def proximal_point(loss: Callable, params, strength, settings: Settings) -> Solution:
    r"""Return the minimum of loss(theta) + strength/2 |theta - params|^2 reached from `params`.

    For a negative strength it is the stationary point that Gauss-Newton steps from `params` reach.
    It is differentiable in `params`, `strength` and everything the loss closes over, at the cost of
    one linear solve.
    """
    problem = flat_problem(loss, params, strength)
    return differentiable_root(problem, lambda: _solve(problem, settings), settings.solve_linear)


def differentiable_root(
    problem: FlatProblem, search: Callable[[], StationaryPoint], solve_linear: LinearSolver
) -> Solution:
    """Return the point that `search` finds, with the derivative of the root of F."""

    def solve(_, start):
        found = search()
        curved = curves_down(problem, found.theta)
        info = found.converged, found.residual, found.steps, curved
        return found.theta, tuple(jnp.asarray(x, start.dtype) for x in info)

    def tangent_solve(linear, right):
        def iterate(linear, right):
            # custom_root passes the linearised residual, which is H + strength I and symmetric.
            found = solve_linear(problem.rounding, linear, linear, right)
            warn_unless(found.converged, INEXACT)
            return found.x

        return lax.custom_linear_solve(linear, right, iterate, symmetric=True)

    theta, info = lax.custom_root(
        problem.residual, problem.start, solve, tangent_solve, has_aux=True
    )
    # Information on the solver has no derivative.
    converged, residual, steps, curved = map(lax.stop_gradient, info)
    solved = SolveInfo(converged > 0, residual, steps.astype(int), curved > 0)
    return Solution(problem.unravel(theta), solved)


def curves_down(problem: FlatProblem, theta):
    """Return whether conjugate gradients meet a negative curvature of H + strength I at theta."""
    apply, _ = jacobian_products(problem.residual, theta)
    right = jax.random.normal(fixed_key(), theta.shape, theta.dtype)
    steps = theta.size if theta.size <= DENSE else CURVATURE_STEPS
    least = problem.rounding * norm(right)
    _, smallest, largest = conjugate_gradients(apply, right, least, steps)
    # A singular matrix may have a negative curvature by rounding.
    return smallest < -ROUNDING * problem.rounding * jnp.maximum(largest, -smallest)


def pull_back(loss: Callable, start, frozen, strength, at, solve_linear: LinearSolver) -> Callable:
    """Return cotangent -> (those of start, frozen and strength, accuracy) at a root `at` of F."""
    problem = flat_problem(lambda theta: loss(theta, frozen), start, strength)

    def pull(cotangent):
        apply, transposed = jacobian_products(problem.residual, problem.flatten(at))
        right = problem.flatten(cotangent)
        found = solve_linear(problem.rounding, apply, transposed, right)
        v = problem.unravel(found.x)
        # The implicit function theorem, c the strength:
        # d theta* = (H + c)^-1 (c d start - d gradient + (start - theta*) dc).
        of_start = jax.tree.map(lambda x: (strength * x).astype(x.dtype), v)
        of_gradient = jax.tree.map(jnp.negative, v)
        (of_frozen,) = jax.vjp(lambda frozen: jax.grad(loss)(at, frozen), frozen)[1](of_gradient)
        of_strength = dot(found.x, problem.start - problem.flatten(at))
        return of_start, of_frozen, of_strength, found.converged

    return pull


def _solve(problem: FlatProblem, settings: Settings) -> StationaryPoint:
    """Minimise from the start; for a negative strength solve F = 0, and failing that, maximise."""
    loss, start, strength, rounding, _ = problem
    negative = strength < 0

    def attempt(number, found: StationaryPoint) -> StationaryPoint:
        # The second attempt for a negative strength is a maximum: the sign turns it into a minimum.
        sign = jnp.where(negative & (number > 0), -1, 1).astype(start.dtype)

        def evaluate(theta):
            value, gradient = jax.value_and_grad(loss)(theta)
            away = theta - start
            term = strength / 2 * dot(away, away)
            size = jnp.abs(value) + jnp.abs(term)
            return sign * (value + term), sign * (gradient + strength * away), size

        def scale(theta):
            return jnp.abs(strength) * norm(theta - start)

        def linearize(theta):
            return jacobian_products(lambda theta: sign * problem.residual(theta), theta)

        model = Problem(evaluate, linearize, ~negative | (number > 0), scale, radius, forcing)
        limit = jnp.where(found.converged, 0, settings.max_steps)
        own = stationary_point(
            model, start, limit, inner_steps=20 * settings.max_steps,
            tolerance=tolerance_or_default(settings.tolerance, rounding), rounding=rounding,
        )  # fmt: skip
        # Keep the attempt with the smaller residual unless the first one converged.
        better = ~found.converged & (own.converged | (own.residual < found.residual))
        steps = found.steps + own.steps
        return jax.tree.map(partial(jnp.where, better), own, found)._replace(steps=steps)

    # If the loss is at least zero, the minimum is within the first of these distances.
    value, gradient = jax.value_and_grad(loss)(start)
    size = jnp.maximum(jnp.abs(strength), jnp.finfo(start.dtype).tiny)
    farthest = FARTHEST * (1 + norm(start))
    radius = jnp.maximum(jnp.sqrt(2 * jnp.abs(value) / size), norm(gradient) / size)
    radius = jnp.where(negative, farthest, jnp.minimum(radius, farthest))
    forcing = 0.0 if start.size <= DENSE else FORCING  # products with a dense matrix are cheap
    # No attempt yet: an infinite residual, which any attempt improves.
    nothing = StationaryPoint(start, jnp.asarray(False), jnp.full_like(radius, jnp.inf), 0)
    return lax.fori_loop(0, jnp.where(negative, 2, 1), attempt, nothing)


def jacobian_products(function: Callable, theta):
    """The derivative of a function at a point, and its transpose."""
    apply = jax.linearize(function, theta)[1]
    if theta.size > DENSE:
        return apply, lambda v: jax.linear_transpose(apply, theta)(v)[0]
    # For few parameters one batched pass forms the matrix, and products with it are cheap.
    rows = jax.vmap(apply)(jnp.eye(theta.size, dtype=theta.dtype))  # of the transpose

    def times(matrix, v):
        return jnp.matmul(matrix, v, precision=lax.Precision.HIGHEST)

    return lambda v: times(rows.T, v), lambda v: times(rows, v)
