"""How optima are found: a signed grid, closing in on its lowest point, and its derivatives.

The test loss can have two minima in the training rate, so a search looks at a grid that covers
every scale of the spectrum in both signs, and then closes in on the lowest point. What is searched
is said in `negmaml.theory.optima`.
"""

from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from negmaml._core import jets, tape
from negmaml._core.compilation import concrete, on_host, quick_jit
from negmaml._core.numerics import namespace
from negmaml.rules import Rule

HIGHEST = lax.Precision.HIGHEST
# Numbers up to which second derivatives are found one by one, a tenth of a second each.
MOST_FOLLOWED = 32
POINTS = 18  # of each sign
ROUNDS = 4  # each spans the two intervals around the lowest point with as many points as the last


def parameter_grid(rule: Rule, n, p, points: int = POINTS):
    """A signed grid of the tuned parameter of `rule` on the spectrum of S, increasing."""
    return signed_grid(rule, (1 + namespace(n, p).sqrt(p / n)) ** 2, points)


def signed_grid(rule: Rule, largest, points: int = POINTS):
    """A signed grid of the tuned parameter of `rule` for spectra up to `largest`, increasing."""
    xp = namespace(largest)
    smallest, largest = rule.search_range(largest)
    steps = np.linspace(0, 1, points, dtype=smallest.dtype)
    positive = smallest * (largest / smallest) ** steps
    return xp.concatenate([-positive[::-1], xp.zeros(1, smallest.dtype), positive])


def minimise(function: Callable, grid, rounds: int = ROUNDS):
    """The lowest minimum of a function of a scalar, among those that `grid` tells apart.

    `function` maps an array of points to values of the same shape; values that are not finite
    count as infinite. Found on a grid that closes in, and on the parabola through its lowest
    points in the end. Good to about the square root of the precision. On the host it ends a round
    earlier where a polynomial of higher degree says as much.
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
        return lax.fori_loop(0, rounds, lambda _, s: narrowed(s, evaluated(s[0])), state)[1]
    for count in range(rounds):
        points, *_, value = state
        values = evaluated(points)
        state = narrowed(state, values)
        if 0 < count < rounds - 1 and values.min() <= value:  # the first points are not even
            found = _quartic_vertex(points, values)
            if found is not None:
                return found
    return state[1]


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
        objective: Callable | None,
        search: Callable,
        host: bool = True,
        by_parts: tuple[Callable, Callable] | None = None,
    ):
        known = on_host(search) if host else None
        traced = jax.jit(search) if host else quick_jit(search)
        followed = on_host(_followed(objective)) if host else None
        program = _nested(objective) if by_parts is None else _by_parts(*by_parts)
        best = jax.custom_jvp(traced)

        def sensitive(at, fixed):
            if followed is not None and concrete((at, fixed)):
                try:
                    return followed(at, fixed)
                except (TypeError, AttributeError):  # a rule that is written for arrays alone
                    pass
            return program(at, fixed)

        @best.defjvp
        def along(primals, tangents):
            found = self(*primals)
            return found, _along(sensitive((found, primals[0]), primals[1]), tangents[0])

        self.known, self.best = known, best

    def __call__(self, numbers, fixed):
        if self.known is not None and concrete((numbers, fixed)):
            return self.known(numbers, fixed)
        return self.best(numbers, fixed)


def _nested(objective: Callable) -> Callable:
    """The sensitivity by nested transformations, with derivatives of every order."""

    def slope(at, fixed):
        x, numbers = at
        return jax.jvp(lambda x: objective(x, numbers, fixed), (x,), (jnp.ones_like(x),))[1]

    def sensitivity(at, fixed):
        at, within = _finite(at)
        slopes = _gradient(slope)(at, fixed)
        return jnp.where(within, -slopes[1:] / slopes[0], 0.0)

    return _tower(sensitivity)


def _by_parts(objective: Callable, parts: Callable) -> Callable:
    r"""The sensitivity with the objective followed on the host.

    With s the parts, g the gradient of the objective in them and h = (Hessian) s_x, which
    `negmaml._core.tape` finds together, the gradient of f_x in n, x and the numbers, is that of

        g . s_x(n) + h . s(n)        at fixed g and h.

    Along a change of n, it changes as this does, and by g and h, whose changes the host finds too.
    """

    def along_x(at, fixed):
        x, numbers = at
        return jax.jvp(lambda x: parts(x, numbers, fixed), (x,), (jnp.ones_like(x),))

    def slopes(at, fixed, g, h):
        def weighted(at, _):
            pairs = zip(g + h, jax.tree.leaves(along_x(at, fixed)[::-1]), strict=True)
            return sum(jnp.sum(weight * value) for weight, value in pairs)

        return _gradient(weighted)(at, ())

    def sensitivity(at, fixed):
        at, within = _finite(at)
        g, h = _from_host(objective, along_x(at, fixed))
        found = slopes(at, fixed, g, h)
        return jnp.where(within, -found[1:] / found[0], 0.0)

    def change(at, fixed, moves):
        at, within = _finite(at)
        both, changes = jax.jvp(lambda at: along_x(at, fixed), (at,), (moves,))
        g, h, g_moves, h_moves = _from_host(objective, (*both, *changes))
        found, moved = jax.jvp(lambda at: slopes(at, fixed, g, h), (at,), (moves,))
        moved = moved + slopes(at, fixed, g_moves, h_moves)
        ratio = found[1:] / found[0]
        return jnp.where(within, (ratio * moved[0] - moved[1:]) / found[0], 0.0)

    program, change = jax.jit(sensitivity), _last(jax.jit(change))
    call = jax.custom_jvp(program)

    @call.defjvp
    def _(primals, tangents):
        return call(*primals), _changed(change, *primals, tangents[0])

    return call


def _changed(change: Callable, at, fixed, moves):
    """`change` along moves. Of few numbers along each of them, so that reverse mode can follow."""
    flat, tree = ravel_pytree(at)
    if flat.size > MOST_FOLLOWED:
        return change(at, fixed, moves)
    units = jnp.eye(flat.size, dtype=flat.dtype)
    return _along(jax.vmap(lambda unit: change(at, fixed, tree(unit)), out_axes=1)(units), moves)


def _finite(at):
    """(x, numbers) with zero for an x that is infinite, and whether it is not."""
    within = jnp.isfinite(at[0])
    return (jnp.where(within, at[0], 0.0), at[1]), within


def _last(function: Callable) -> Callable:
    """A function that has no derivatives itself, and says so."""
    call = jax.custom_jvp(function)

    @call.defjvp
    def _(primals, tangents):
        raise NotImplementedError(
            "third derivatives of a best rate or ridge are not available: take differences of "
            "second ones"
        )

    return call


def _from_host(objective: Callable, coefficients: tuple) -> list[list]:
    """Gradients of `objective` at a point and along directions, for trees of coefficients."""
    leaves = [jax.tree.leaves(tree) for tree in coefficients]
    tree = jax.tree.structure(coefficients[0])

    def run(leaves):
        stacks = [np.stack(of) for of in zip(*leaves, strict=True)]
        with np.errstate(all="ignore"):
            found = tape.gradient(lambda values: objective(tree.unflatten(values)), stacks)
        types = [x.dtype for x in leaves[0]]
        return [
            [x[i].astype(dtype) for x, dtype in zip(found, types, strict=True)]
            for i in range(len(leaves))
        ]

    shapes = [[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in part] for part in leaves]
    return jax.pure_callback(run, shapes, leaves, vmap_method="sequential")


def _followed(objective: Callable) -> Callable:
    """-(d f_x / d numbers) / f_xx at (x, numbers), by `negmaml._core.jets`."""

    def sensitivity(at, fixed):
        x, numbers = at
        within = np.isfinite(x)
        leaves, tree = jax.tree.flatten(numbers)
        x, leaves = jets.variables(np.where(within, x, 0.0), leaves)
        found = objective(x, jax.tree.unflatten(tree, leaves), fixed)
        slopes = found.terms["xn"]
        return np.where(within, -slopes[1:] / slopes[0], 0.0)

    return sensitivity


def _tower(function: Callable) -> Callable:
    """A vector or tensor function of a tree of numbers (and `fixed`), each derivative one program.

    JAX would differentiate a compiled program into another that it compiles with options of its
    own, many times slower on these thousands of scalars. Here the derivative is a compiled Jacobian
    times the direction, and that again has a compiled derivative, up to any order asked for.
    """
    program = jax.jit(function)

    @jax.custom_jvp
    def call(at, fixed):
        return program(at, fixed)

    @call.defjvp
    def along(primals, tangents):
        return call(*primals), _along(_next(function)(*primals), tangents[0])

    return call


@cache
def _next(function: Callable) -> Callable:
    return _tower(_gradient(function, jax.jacfwd))


def _gradient(function: Callable, transform: Callable = jax.grad) -> Callable:
    """The derivative in the numbers of the tree, side by side along a last axis."""

    def derivative(at, fixed):
        leaves, parts = (jax.tree.leaves(x) for x in (at, transform(function)(at, fixed)))
        shapes = [d.shape[: d.ndim - np.ndim(x)] for d, x in zip(parts, leaves, strict=True)]
        flat = [d.reshape(*shape, -1) for d, shape in zip(parts, shapes, strict=True)]
        return jnp.concatenate(flat, -1)

    return derivative


@jax.jit  # one program, where its few operations would each be one
def _along(jacobian, moves):
    """The derivative along a tree of moves, from that in each number."""
    flat = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(moves)])
    return jnp.dot(jacobian, flat, precision=HIGHEST)
