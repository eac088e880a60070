r"""The proximal inner problem for losses whose "gradient" is not the gradient of a function.

    theta*:   F(theta) = g(theta) + strength (theta - params) = 0,      g = jax.grad(loss)

User-defined derivative rules, such as a reversed gradient, make g a field whose derivative J is not
symmetric. Then there is nothing to minimise, and cotangents need a solve with J^T:

    (J^T + strength I) u = cotangent of theta*,      -u is the cotangent of F.

J^T is applied in reverse mode through g, and solved by GMRES. Forward mode is not used, since such
rules often do not support it. The search for theta* takes Newton steps with finite differences in
place of J, which do not change the point of convergence.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.flatten_util import ravel_pytree

from negmaml._core.convergence import warn_unless
from negmaml._core.symmetry import asymmetry
from negmaml.rules.implicit import INEXACT, Settings
from negmaml.rules.solution import Solution, SolveInfo

KRYLOV, RESTARTS = 32, 10
DIRECTION = 1e-4  # tolerance of the solve for a Newton direction
LENGTHS = tuple(0.5**k for k in range(12))  # factors of a Newton step, of which the best is taken


def is_field(loss: Callable, params) -> bool:
    """Return whether the derivative of jax.grad(loss) need not be symmetric."""
    return bool(asymmetry(jax.make_jaxpr(loss)(params), len(jax.tree.leaves(params))))


def field_point(loss: Callable, params, strength, settings: Settings, at=None) -> Solution:
    """Return theta* and information on the search, differentiable in reverse mode.

    Converged means that |F| is at most the tolerance times |F| at `params`. at: theta* if another
    search has found it, like `params`.
    """
    start, unravel = ravel_pytree(params)
    program = jax.make_jaxpr(jax.grad(lambda flat: loss(unravel(flat))))(start)
    strength = jnp.asarray(strength, start.dtype)
    # None has no leaves, so that the search in `_point` is a choice of the traced program.
    at = None if at is None else lax.stop_gradient(ravel_pytree(at)[0])
    # Copies are arrays of JAX, also where a vmap is over NumPy arrays: custom_vjp takes no others.
    constants = jax.tree.map(jnp.copy, program.consts)
    theta, info = _point(program.jaxpr, settings, constants, start, strength, at)
    return Solution(unravel(theta), SolveInfo(*lax.stop_gradient(info)))


def _field(program, constants, start, strength, theta):
    """F(theta); `constants` are the values that the loss closes over."""
    (gradient,) = jaxpr_as_fun(ClosedJaxpr(program, constants))(theta)
    return gradient + strength * (theta - start)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _point(program, settings, constants, start, strength, at):
    field = partial(_field, program, constants, start, strength)
    rounding = jnp.finfo(start.dtype).eps
    # The step of central differences that balances truncation and rounding.
    reach = float(rounding) ** (1 / 3)

    def derivative(theta, v):
        size = jnp.linalg.norm(v)
        h = reach * (1 + jnp.linalg.norm(theta)) / jnp.where(size > 0, size, 1)
        return (field(theta + h * v) - field(theta - h * v)) / (2 * h)

    def unfinished(carry):
        k, _, error, least, moved = carry
        return (k < settings.max_steps) & (error > least) & moved

    def step(carry):
        k, theta, error, least, _ = carry
        direction, _ = _gmres(partial(derivative, theta), -field(theta), DIRECTION)
        # All step lengths are tried at once, in one batched evaluation.
        candidates = theta + jnp.asarray(LENGTHS, theta.dtype)[:, None] * direction
        errors = jnp.linalg.norm(jax.vmap(field)(candidates), axis=1)
        # A step too long may leave the domain of the loss: NaN is never the best.
        best = jnp.argmin(jnp.where(jnp.isfinite(errors), errors, jnp.inf))
        better = errors[best] < error
        theta = jnp.where(better, candidates[best], theta)
        return k + 1, theta, jnp.where(better, errors[best], error), least, better

    # The tolerance is relative to the residual at the start.
    error = jnp.linalg.norm(field(start))
    least = _tolerance(settings, start.dtype) * error
    if at is not None:
        error = jnp.linalg.norm(field(at))
        return at, (error <= least, error, 0)
    first = (0, start, error, least, jnp.asarray(True))
    steps, theta, error, _, _ = lax.while_loop(unfinished, step, first)
    return theta, (error <= least, error, steps)


def _tolerance(settings: Settings, dtype) -> float:
    """The given tolerance, or rounding^(3/4)."""
    own = settings.tolerance
    return float(jnp.finfo(dtype).eps) ** 0.75 if own is None else own


def _forward(program, settings, constants, start, strength, at):
    theta, info = _point(program, settings, constants, start, strength, at)
    return (theta, info), (constants, start, strength, theta)


def _backward(program, settings, saved, cotangents):
    constants, start, strength, theta = saved
    # The transpose of dF/dtheta, as in the head of this module.
    pull = jax.vjp(partial(_field, program, constants, start, strength), theta)[1]
    u, accurate = _gmres(lambda u: pull(u)[0], cotangents[0], _tolerance(settings, theta.dtype))
    warn_unless(accurate, INEXACT)

    def at_solution(constants, start, strength):
        return _field(program, constants, start, strength, theta)

    return *jax.vjp(at_solution, constants, start, strength)[1](-u), None


_point.defvjp(_forward, _backward)


def _gmres(apply: Callable, right, tolerance: float):
    """Return (x, whether it is accurate), the solution of apply(x) = right by GMRES with restarts.

    The GMRES of JAX transposes `apply`, which is impossible if a derivative rule has a while loop.
    """
    size = min(right.size, KRYLOV)
    dot = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    least = tolerance * jnp.linalg.norm(right)

    def extend(j, carry):
        basis, hessenberg = carry
        new = apply(basis[j])
        column = jnp.zeros(size + 1, right.dtype)
        for _ in range(2):  # two passes of Gram-Schmidt are orthogonal to rounding
            part = dot(basis, new)
            new, column = new - dot(part, basis), column + part
        length = jnp.linalg.norm(new)
        basis = basis.at[j + 1].set(jnp.where(length > 0, new / length, 0))
        return basis, hessenberg.at[:, j].set(column.at[j + 1].set(length))

    def cycle(carry):
        k, x, rest = carry
        length = jnp.linalg.norm(rest)
        basis = jnp.zeros((size + 1, right.size), right.dtype).at[0].set(rest / length)
        first = basis, jnp.zeros((size + 1, size), right.dtype)
        basis, hessenberg = lax.fori_loop(0, size, extend, first)
        target = jnp.zeros(size + 1, right.dtype).at[0].set(length)
        x = x + dot(jnp.linalg.lstsq(hessenberg, target)[0], basis[:-1])
        return k + 1, x, right - apply(x)

    def unfinished(carry):
        return (carry[0] < RESTARTS) & (jnp.linalg.norm(carry[2]) > least)

    _, x, rest = lax.while_loop(unfinished, cycle, (0, jnp.zeros_like(right), right))
    return x, jnp.linalg.norm(rest) <= least
