r"""Stationary points of f(theta) with gradient F(theta), from any start, by a trust region.

For a minimum the model of a step is F.p + p.J p / 2 with J the derivative of F, minimised by
truncated conjugate gradients, which use negative curvature. Every accepted step decreases f. To
solve F = 0 without a minimum, the same method minimises |F|^2 / 2 with the model
|F + J p|^2 / 2. Source: Nocedal and Wright, Numerical Optimization, chapters 4, 7 and 11.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from negmaml.rules.krylov import dot, norm, truncated_cg

ACCEPT, SHRINK, GROW = 0.1, 0.25, 0.75  # of the actual over the predicted reduction
FORCING = 0.1  # the largest relative residual of the model's slope after a step to a minimum
ROUNDING = 4  # units of rounding allowed in each part of a residual
DOUBT = 1e3  # units of rounding of f, below which a difference of two values is not significant


class Problem(NamedTuple):
    """A stationary point to find.

    Attributes:
        evaluate: theta -> (f, F, the size of the terms that cancel in f).
        linearize: theta -> (J, its transpose), functions of a vector.
        minimum: whether to minimise f, a scalar bool, traced or not; else F = 0 is solved.
        scale: theta -> the size of the terms that balance in F at a stationary point.
        radius: of the first trust region.
        forcing: the relative residual of the slope that the first step may leave.
    """

    evaluate: Callable
    linearize: Callable
    minimum: Any
    scale: Callable
    radius: Any
    forcing: float


class StationaryPoint(NamedTuple):
    """The end of a search for a stationary point.

    theta: the point.   converged: whether it is stationary.   residual: |F|.   steps: their number.
    """

    theta: Any
    converged: Any
    residual: Any
    steps: Any


class _State(NamedTuple):
    k: Any
    theta: Any
    f: Any
    residual: Any  # F
    radius: Any
    forcing: Any
    curvature: Any  # of the last step, a lower bound of |J|
    first_curvature: Any
    stalled: Any


def stationary_point(
    problem: Problem, start, max_steps, *, inner_steps: int, tolerance: float, rounding: float
) -> StationaryPoint:
    r"""The point where |F| <= tolerance scale + 4 rounding (|J| |theta| + |F(start)|).

    The last term is the rounding error of theta and F. Far from the start, where it may be large,
    it is limited to sqrt(rounding) (scale + |F(start)|). The search takes at most `max_steps`
    steps, traced or not, each of at most `inner_steps` iterations of conjugate gradients.
    """
    evaluate, linearize, minimum, scale, radius, first_forcing = problem
    f, first, _ = evaluate(start)
    first_size, start_size = norm(first), norm(start)

    def allowed(state: _State):
        size = scale(state.theta)
        floor = rounding * ROUNDING * (state.curvature * norm(state.theta) + first_size)
        at_start = rounding * ROUNDING * (state.first_curvature * start_size + first_size)
        believed = jnp.maximum(at_start, rounding**0.5 * (size + first_size))
        return tolerance * size + jnp.minimum(floor, believed)

    def unfinished(state: _State):
        error = norm(state.residual)
        return (state.k < max_steps) & ~state.stalled & (error > allowed(state))

    def step(state: _State):
        apply, transposed = linearize(state.theta)

        def model(v):
            return lax.cond(minimum, lambda u: u, transposed, apply(v))

        slope = lax.cond(minimum, lambda u: u, transposed, state.residual)
        error, slope_size = norm(state.residual), norm(slope)
        # Solving more accurately than half of the final tolerance gains nothing.
        forcing = jnp.maximum(state.forcing, allowed(state) / error / 2)
        move = truncated_cg(model, slope, state.radius, forcing * slope_size, inner_steps)
        trial = state.theta + move.step
        f, residual, cancelling = evaluate(trial)
        gain = jnp.where(minimum, state.f - f, (error**2 - dot(residual, residual)) / 2)
        # Near a minimum f changes by less than its rounding, so the gain is computed from slopes.
        noise = jnp.where(minimum, rounding * cancelling, 0)
        doubtful = (move.reduction < DOUBT * noise) & (jnp.abs(gain) <= DOUBT * noise)
        gain = jnp.where(doubtful, -dot(slope + residual, move.step) / 2, gain)
        # A ratio near one means that the model describes the function within the radius.
        ratio = gain / move.reduction
        taken = (ratio > ACCEPT) & jnp.all(jnp.isfinite(residual))
        length = norm(move.step)
        # After a bad step inside the region, a smaller radius need not shorten the next one.
        shrunk = SHRINK * jnp.where(length < state.radius, length, state.radius)
        grown = jnp.where(move.outside & (ratio > GROW), 4 * state.radius, state.radius)
        # For |F|^2/2 the model has the matrix J^T J, whose root is the size of J.
        curvature = jnp.where(minimum, move.curvature, jnp.sqrt(move.curvature))
        # Eisenstat and Walker: the error of this model sets the tolerance of the next solve.
        now = jnp.where(minimum, norm(residual), state.forcing)
        off = jnp.abs(now - move.residual) / slope_size
        forcing = jnp.where(minimum, jnp.minimum(off, FORCING), state.forcing)
        return _State(
            state.k + 1,
            jnp.where(taken, trial, state.theta),
            jnp.where(taken, f, state.f),
            jnp.where(taken, residual, state.residual),
            jnp.where(taken & (ratio >= SHRINK), grown, shrunk),
            jnp.where(taken, forcing, state.forcing),
            curvature,
            jnp.where(state.k == 0, curvature, state.first_curvature),
            length <= rounding / 2 * norm(state.theta),
        )

    nought = jnp.zeros_like(first_size)
    forcing = jnp.where(minimum, jnp.full_like(nought, first_forcing), nought)
    begin = _State(0, start, f, first, radius, forcing, nought, nought, jnp.asarray(False))
    last = lax.while_loop(unfinished, step, begin)
    error = norm(last.residual)
    return StationaryPoint(last.theta, error <= allowed(last), error, last.k)
