"""How optima are found: a signed grid, closing in on its lowest point, and its derivatives.

The test loss can have two minima in the training rate, so a search looks at a grid that covers
every scale of the spectrum in both signs, and then closes in on the lowest point. What is searched
is said in `negmaml.theory.optima`.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax

from negmaml._core.arrays import namespace
from negmaml._core.convergence import warn_unless
from negmaml._core.jit import is_concrete, jit_fast_compile, on_host
from negmaml.rules import InnerRule
from negmaml.theory.sensitivity import contracted, followed, nested, sensitivity_by_parts

POINTS = 18  # of each sign
ROUNDS = 4  # each spans the two intervals around the lowest point with as many points as the last


def parameter_grid(rule: InnerRule, n, p, points: int = POINTS):
    """A signed grid of the tuned parameter of `rule` on the spectrum of S, increasing."""
    return signed_grid(rule, (1 + namespace(n, p).sqrt(p / n)) ** 2, points)


def signed_grid(rule: InnerRule, largest, points: int = POINTS):
    """A signed grid of the tuned parameter of `rule` for spectra up to `largest`, increasing."""
    xp = namespace(largest)
    smallest, largest = rule.search_range(largest)
    steps = np.linspace(0, 1, points, dtype=smallest.dtype)
    positive = smallest * (largest / smallest) ** steps
    return xp.concatenate([-positive[::-1], xp.zeros(1, smallest.dtype), positive])


def minimise(function: Callable, grid, rounds: int = ROUNDS):
    """The lowest minimum of a function of a scalar, among those that `grid` tells apart.

    `function` maps an array of points to values of the same shape; values that are not finite
    count as infinite; NaN where all are. Found on a grid that closes in, and on the parabola
    through its lowest points in the end. Good to about the square root of the precision. On the
    host it ends a round earlier where a polynomial of higher degree says as much.
    """
    xp = namespace(grid)
    steps = np.linspace(0, 1, grid.size, dtype=grid.dtype)

    def evaluated(points):
        values = function(points)
        return xp.where(xp.isfinite(values), values, xp.inf)

    def narrowed(state, values):
        points, _, lowest, value = state
        i = xp.argmin(values)
        around = xp.clip(i, 1, grid.size - 2) + np.arange(-1, 2)
        low, high = points[xp.maximum(i - 1, 0)], points[xp.minimum(i + 1, grid.size - 1)]
        # A point that no later one equals is kept: a minimum may be a single point, such as zero.
        better = values[i] <= value
        vertex = xp.where(better, _vertex(points[around], values[around], points[i]), lowest)
        lowest, value = xp.where(better, points[i], lowest), xp.minimum(values[i], value)
        return low + (high - low) * steps, vertex, lowest, value

    state = grid, grid[0], grid[0], xp.full_like(grid[0], xp.inf)
    if xp is not np:
        state = lax.fori_loop(0, rounds, lambda _, s: narrowed(s, evaluated(s[0])), state)
        return xp.where(xp.isfinite(state[3]), state[1], xp.nan)
    for count in range(rounds):
        points, *_, value = state
        values = evaluated(points)
        state = narrowed(state, values)
        if 0 < count < rounds - 1 and values.min() <= value:  # the first points are not even
            found = _quartic_vertex(points, values)
            if found is not None:
                return found
    return state[1] if np.isfinite(state[3]) else np.full_like(state[1], np.nan)


def reported(name: str, found, grid, losses: Callable):
    """The optimum `found` on a grid, with a warning where it is known and not a minimum.

    That is where it is NaN, and where the loss falls towards an end of the grid, by more than 1e-6
    from half way between there and the middle. `losses` is as for `minimise`.
    """
    if not is_concrete((found, grid)):
        return found
    value = float(found)
    warn_unless(not np.isnan(value), f"{name} found no value with a finite loss and returns NaN")
    ends = np.asarray(grid, float)[[0, -1]]
    if np.isclose(value, ends, rtol=1e-5, atol=0).any():
        inside, end = np.asarray(losses(np.array([(value + ends.mean()) / 2, value])), float)
        warn_unless(
            not inside - end > 1e-6 * abs(inside),
            f"{name} returns an end of its range: the tuned parameter (of a ridge its logarithm) "
            f"is {value:.3g}, of {ends[0]:.3g} to {ends[1]:.3g}, where the loss still falls",
        )
    return found


def _vertex(x, f, lowest):
    """The lowest point of the parabola through three points, `lowest` where it is not among them.

    The values of a flat minimum are all rounding, hence a parabola may bend down or be off; and
    where the lowest is far below its neighbours there is none, but a single point.
    """
    xp = namespace(x)
    left, right = (f[1] - f[0]) / (x[1] - x[0]), (f[2] - f[1]) / (x[2] - x[1])
    bends = (right > left) & xp.isfinite(f).all() & (xp.max(f) - f[1] <= xp.abs(f[1]))
    found = (x[0] + x[1] - left * (x[2] - x[0]) / xp.where(bends, right - left, 1.0)) / 2
    return xp.where(bends & (found > x[0]) & (found < x[2]), found, lowest)


def _quartic_vertex(x, f):
    """The lowest point of the quartic through five even points; None where that is not certain.

    With h their distance, it is off by the order of h^4 where the parabola is by that of h^2: if
    both agree to 0.1% of h, by less than 1e-5 h.
    """
    i = int(np.argmin(f))
    if not 2 <= i < len(f) - 2:
        return None
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


class Optimum:
    r"""The x that minimises objective(x, numbers, fixed), as a function (numbers, fixed) -> x.

    Its derivatives are those of the condition f_x = 0, never of the search:

        dx = -(d f_x / d numbers) . d numbers / f_xx

    None flow into `fixed`, and none out of an x that is infinite. All leaves are arrays of one real
    type.

    objective: (x, numbers, fixed) -> a scalar, differentiable; None where `by_parts` has it.
    search: (numbers, fixed) -> x.
    host: whether both are written over `numerics.namespace`; known numbers then stay on the host,
        where there is nothing to compile, and so do first derivatives there.
    by_parts: of a long objective, a function of a tree of arrays that `negmaml._core.tape` can
        run, and (x, numbers, fixed) -> that tree. Derivatives, to second order, then are a short
        program that calls the host.
    """

    def __init__(
        self,
        objective: Any,
        search: Callable,
        host: bool = True,
        by_parts: tuple[Callable, Callable] | None = None,
    ):
        known = on_host(search) if host else None
        traced = jax.jit(search) if host else jit_fast_compile(search)
        following = on_host(followed(objective)) if host else None
        program = nested(objective) if by_parts is None else sensitivity_by_parts(*by_parts)
        best = jax.custom_jvp(traced)

        def sensitive(at, fixed):
            if following is not None and is_concrete((at, fixed)):
                try:
                    return following(at, fixed)
                except (TypeError, AttributeError):  # a rule that is written for arrays alone
                    pass
            return program(at, fixed)

        @best.defjvp
        def along(primals, tangents):
            found = self(*primals)
            return found, contracted(sensitive((found, primals[0]), primals[1]), tangents[0])

        self.known, self.best = known, best

    def __call__(self, numbers, fixed):
        if self.known is not None and is_concrete((numbers, fixed)):
            return self.known(numbers, fixed)
        return self.best(numbers, fixed)
