"""Search for an optimum on a signed grid that is refined about its lowest point.

The test loss can have two minima in the training rate, so a search looks at a grid that covers
every scale of the spectrum in both signs, and then refines it about the lowest point. The
objectives are those of `negmaml.theory.optima`.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax

from negmaml._core.arrays import namespace
from negmaml._core.convergence import warn_unless
from negmaml._core.jit import is_concrete, jit_fast_compile
from negmaml._core.jit import on_host as run_on_host
from negmaml.rules import InnerRule
from negmaml.theory.sensitivity import (
    along,
    host_sensitivity,
    nested_sensitivity,
    sensitivity_by_parts,
)

POINTS = 18  # of each sign
ROUNDS = 4  # each covers the two intervals around the lowest point, with the same number of points


def signed_grid(rule: InnerRule, largest, points: int = POINTS):
    """Return an increasing grid of both signs for the tuned parameter of `rule`.

    largest: the largest eigenvalue, which sets the scale of the parameter.
    """
    xp = namespace(largest)
    smallest, largest = rule.search_range(largest)
    # Zero is a point of its own: the scales of both signs are logarithmic and never reach it.
    steps = np.linspace(0, 1, points, dtype=smallest.dtype)
    positive = smallest * (largest / smallest) ** steps
    return xp.concatenate([-positive[::-1], xp.zeros(1, smallest.dtype), positive])


def minimise(function: Callable, grid, rounds: int = ROUNDS):
    """Return the lowest minimum of a function of a scalar, among those that `grid` separates.

    `function` maps an array of points to values of the same shape. Values that are not finite count
    as infinite; the result is NaN where all are. The grid is refined, and the vertex of the
    parabola through its lowest points is returned, accurate to about the square root of the
    precision. On the host the search ends a round earlier where a quartic confirms the parabola.
    """
    xp = namespace(grid)
    steps = np.linspace(0, 1, grid.size, dtype=grid.dtype)

    def evaluate(points):
        values = function(points)
        return xp.where(xp.isfinite(values), values, xp.inf)

    def refine(state, values):
        points, _, lowest, value = state
        i = xp.argmin(values)
        nearest = xp.clip(i, 1, grid.size - 2) + np.arange(-1, 2)
        # The next grid spans the two intervals around the lowest point, at an end only one.
        low, high = points[xp.maximum(i - 1, 0)], points[xp.minimum(i + 1, grid.size - 1)]
        # A point that no later one reaches is kept: a minimum may be a single point, such as zero.
        better = values[i] <= value
        vertex = xp.where(better, _vertex(points[nearest], values[nearest], points[i]), lowest)
        lowest, value = xp.where(better, points[i], lowest), xp.minimum(values[i], value)
        return low + (high - low) * steps, vertex, lowest, value

    # (points, vertex, lowest point so far, its value)
    state = grid, grid[0], grid[0], xp.full_like(grid[0], xp.inf)
    # A fixed number of rounds in a program; the host may end earlier.
    if xp is not np:
        state = lax.fori_loop(0, rounds, lambda _, s: refine(s, evaluate(s[0])), state)
        return xp.where(xp.isfinite(state[3]), state[1], xp.nan)
    for count in range(rounds):
        points, *_, value = state
        values = evaluate(points)
        state = refine(state, values)
        # The first grid is logarithmic; the quartic needs even spacing.
        if 0 < count < rounds - 1 and values.min() <= value:  # the first points are not even
            found = _quartic_vertex(points, values)
            if found is not None:
                return found
    return state[1] if np.isfinite(state[3]) else np.full_like(state[1], np.nan)


def warn_unless_minimum(name: str, found, grid, losses: Callable) -> None:
    """Warn if the optimum `found` on a grid is known and is not a minimum.

    That is so if it is NaN, or an end of the grid towards which the loss falls: by more than 1e-6
    of it from half way between that end and the middle. `losses` is as for `minimise`.
    """
    if not is_concrete((found, grid)):
        return
    value = float(found)
    warn_unless(not np.isnan(value), f"{name} found no value with a finite loss and returns NaN")
    ends = np.asarray(grid, float)[[0, -1]]
    if np.isclose(value, ends, rtol=1e-5, atol=0).any():
        # Flat to rounding is no fall: a loss may have reached its limit within the range.
        inside, end = np.asarray(losses(np.array([(value + ends.mean()) / 2, value])), float)
        warn_unless(
            not inside - end > 1e-6 * abs(inside),
            f"{name} returns an end of its range: the tuned parameter (of a ridge its logarithm) "
            f"is {value:.3g}, of {ends[0]:.3g} to {ends[1]:.3g}, where the loss still falls",
        )


def _vertex(x, f, lowest):
    """Return the vertex of the parabola through three points, or `lowest` if it is not reliable.

    Near a flat minimum the values differ by rounding only, so the parabola may bend down or have
    its vertex outside. Where the lowest value is far below its neighbours, the minimum is a single
    point.
    """
    xp = namespace(x)
    left, right = (f[1] - f[0]) / (x[1] - x[0]), (f[2] - f[1]) / (x[2] - x[1])
    bends = (right > left) & xp.isfinite(f).all() & (xp.max(f) - f[1] <= xp.abs(f[1]))
    found = (x[0] + x[1] - left * (x[2] - x[0]) / xp.where(bends, right - left, 1.0)) / 2
    return xp.where(bends & (found > x[0]) & (found < x[2]), found, lowest)


def _quartic_vertex(x, f):
    """Return the minimum of the quartic through five evenly spaced points, None if not reliable.

    With h their spacing, its error is of order h^4 where that of the parabola is of order h^2. If
    both agree to 0.1% of h, the error is below 1e-5 h.
    """
    i = int(np.argmin(f))
    if not 2 <= i < len(f) - 2:
        return None
    # Five-point differences of first to fourth order, in units of the spacing.
    far, left, middle, right, off = f[i - 2 : i + 3].tolist()
    if not max(far, left, right, off) - middle <= abs(middle):
        return None
    first = (8 * (right - left) - (off - far)) / 12
    second = (16 * (right + left) - (off + far) - 30 * middle) / 12
    third = (off - far) / 2 - (right - left)
    fourth = off + far - 4 * (right + left) + 6 * middle
    if not abs(fourth) <= second / 10 or right + left <= 2 * middle:  # a kink, or no minimum
        return None
    parabola = u = (left - right) / (right + left - 2 * middle) / 2
    for _ in range(2):  # Newton's method on the slope
        slope = first + u * (second + u * (third / 2 + u * fourth / 6))
        u -= slope / (second + u * (third + u * fourth / 2))
    if not abs(u - parabola) <= 1e-3 or abs(u) > 1:
        return None
    return x[i] + u * (x[i + 1] - x[i])


class ImplicitArgmin:
    r"""The x that minimises objective(x, numbers, fixed), as a function (numbers, fixed) -> x.

    Its derivatives are those of the condition f_x = 0, never of the search:

        dx = -(d f_x / d numbers) . d numbers / f_xx

    No derivatives flow into `fixed`, and none out of an x that is infinite. All leaves are arrays
    of one real type.

    objective: (x, numbers, fixed) -> a scalar, differentiable; None if `by_parts` has it.
    search: (numbers, fixed) -> x.
    on_host: True if both are written over `negmaml._core.arrays.namespace`. Known numbers then stay
        on the host, where there is nothing to compile, and so do their first derivatives.
    by_parts: for a long objective, a function of a tree of arrays that `negmaml._core.taylor` can
        run, and (x, numbers, fixed) -> that tree. Derivatives, up to the second order, are then a
        short program that calls the host.
    """

    def __init__(
        self,
        objective: Any,
        search: Callable,
        on_host: bool = True,
        by_parts: tuple[Callable, Callable] | None = None,
    ):
        known = run_on_host(search) if on_host else None
        traced = jax.jit(search) if on_host else jit_fast_compile(search)
        derivative = run_on_host(host_sensitivity(objective)) if on_host else None
        program = (
            nested_sensitivity(objective) if by_parts is None else sensitivity_by_parts(*by_parts)
        )
        # Derivatives never go through the search: JAX sees only this rule.
        best = jax.custom_jvp(traced)

        def sensitivity(at, fixed):
            if derivative is not None and is_concrete((at, fixed)):
                try:
                    return derivative(at, fixed)
                except (TypeError, AttributeError):  # a user's rule that takes only arrays
                    pass
            return program(at, fixed)

        @best.defjvp
        def _(primals, tangents):
            found = self(*primals)
            return found, along(sensitivity((found, primals[0]), primals[1]), tangents[0])

        self.known, self.best = known, best

    def __call__(self, numbers, fixed):
        # Known numbers need no program; JAX never sees this call.
        if self.known is not None and is_concrete((numbers, fixed)):
            return self.known(numbers, fixed)
        return self.best(numbers, fixed)
