r"""The proximal inner problem and its implicit derivative (implicit MAML).

    theta*(params):   F(theta, params) = grad loss(theta) + strength (theta - params) = 0

For a strength above zero, theta* is a minimum of loss(theta) + strength/2 |theta - params|^2, found
by `negmaml.rules.trust_region` from params. For a negative strength this function need not have a
minimum, and theta* is a point where F = 0.

By the implicit function theorem d theta* = -(H + strength)^{-1} dF, with H the Hessian of the
loss at theta*: the derivative needs the solution, not the path to it. H + strength I may be
indefinite, so its systems are solved by MINRES. Source: Rajeswaran et al., NeurIPS 2019.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from negmaml._core.convergence import warn_unless
from negmaml.rules.krylov import dot, minres, norm
from negmaml.rules.solution import Solution, SolveInfo
from negmaml.rules.trust_region import FORCING, ROUNDING, Problem, StationaryPoint, stationary_point

DENSE = 64  # number of parameters up to which the Hessian is formed, in one batched pass
FARTHEST = 1e3  # radius of the first trust region, in units of 1 + |params|
INEXACT = (
    "the implicit derivative of Proximal was not solved to its tolerance on some task, so that "
    "meta-gradients there are inexact: H + strength I may be close to singular; try another "
    "strength, more max_steps or float64"
)


class Settings(NamedTuple):
    """Options of the solver of a proximal problem, as in `Proximal`."""

    max_steps: int
    tolerance: float | None


class _Flat(NamedTuple):
    """The proximal problem of flat vectors of at least single precision."""

    loss: Callable
    start: Any
    strength: Any
    settings: Settings
    rounding: float  # of the coarsest leaf
    unravel: Callable

    @property
    def tolerance(self) -> float:
        """The given tolerance, or rounding^(3/4)."""
        own = self.settings.tolerance
        return self.rounding**0.75 if own is None else own

    def residual(self, theta):
        """F(theta, start)."""
        return jax.grad(self.loss)(theta) + self.strength * (theta - self.start)


def _flat(loss: Callable, params, strength, settings: Settings) -> _Flat:
    start, unravel_as = ravel_pytree(params)
    # Half precision would not resolve the residual, so the solver works in at least float32.
    work = jnp.promote_types(start.dtype, jnp.float32)
    rounding = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(params))

    def unravel(flat):
        return unravel_as(flat.astype(start.dtype))

    def flat_loss(flat):
        return loss(unravel(flat)).astype(work)

    strength = jnp.asarray(strength, work)
    return _Flat(flat_loss, start.astype(work), strength, settings, rounding, unravel)


def proximal_point(loss: Callable, params, strength, settings: Settings) -> Solution:
    r"""Return the minimum of loss(theta) + strength/2 |theta - params|^2 reached from `params`.

    For a negative strength it is the stationary point that Gauss-Newton steps from `params` reach.
    It is differentiable in `params`, `strength` and everything the loss closes over, at the cost of
    one linear solve.
    """
    flat = _flat(loss, params, strength, settings)

    def solve(_, start):
        found = _solve(flat)
        info = found.converged, found.residual, found.steps
        return found.theta, tuple(jnp.asarray(x, start.dtype) for x in info)

    def tangent_solve(linear, right):
        def iterate(linear, right):
            # custom_root passes the linearised residual, which is H + strength I and symmetric.
            found = _symmetric_solve(flat, linear, linear, right)
            warn_unless(found.converged, INEXACT)
            return found.x

        return lax.custom_linear_solve(linear, right, iterate, symmetric=True)

    theta, info = lax.custom_root(flat.residual, flat.start, solve, tangent_solve, has_aux=True)
    # Information on the solver has no derivative.
    converged, residual, steps = map(lax.stop_gradient, info)
    return Solution(flat.unravel(theta), SolveInfo(converged > 0, residual, steps.astype(int)))


def adjoint(loss: Callable, params, strength, settings: Settings, at, cotangent):
    """Return (v, whether it is accurate), v = (H + strength I)^{-1} cotangent, with H at `at`."""
    flat = _flat(loss, params, strength, settings)
    theta, right = (ravel_pytree(tree)[0].astype(flat.start.dtype) for tree in (at, cotangent))
    apply, transposed = _linearize(flat.residual, theta)
    found = _symmetric_solve(flat, apply, transposed, right)
    return flat.unravel(found.x), found.converged


def _symmetric_solve(flat: _Flat, apply, transposed, right):
    return minres(
        apply, transposed, right, flat.tolerance, ROUNDING * flat.rounding,
        20 * flat.settings.max_steps,
    )  # fmt: skip


def _solve(flat: _Flat) -> StationaryPoint:
    """Minimise from the start; for a negative strength solve F = 0, and failing that, maximise."""
    loss, start, strength, settings, rounding, _ = flat
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
            return _linearize(lambda theta: sign * flat.residual(theta), theta)

        problem = Problem(evaluate, linearize, ~negative | (number > 0), scale, radius, forcing)
        limit = jnp.where(found.converged, 0, settings.max_steps)
        own = stationary_point(
            problem, start, limit, inner_steps=20 * settings.max_steps,
            tolerance=flat.tolerance, rounding=rounding,
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


def _linearize(function: Callable, theta):
    """The derivative of a function at a point, and its transpose."""
    apply = jax.linearize(function, theta)[1]
    if theta.size > DENSE:
        return apply, lambda v: jax.linear_transpose(apply, theta)(v)[0]
    # For few parameters one batched pass forms the matrix, and products with it are cheap.
    rows = jax.vmap(apply)(jnp.eye(theta.size, dtype=theta.dtype))  # of the transpose

    def times(matrix, v):
        return jnp.matmul(matrix, v, precision=lax.Precision.HIGHEST)

    return lambda v: times(rows.T, v), lambda v: times(rows, v)
