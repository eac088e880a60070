r"""Krylov solvers for symmetric systems that may be indefinite, on flat vectors.

`truncated_cg` minimises a quadratic model within a trust region and follows negative curvature to
its boundary. `minres` solves a linear system, definite or not, with the smallest residual in the
Krylov space. Sources: Steihaug, SIAM J. Numer. Anal. 20 (1983) 626; Paige and Saunders,
SIAM J. Numer. Anal. 12 (1975) 617.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

RESTARTS = 3  # of minres, each for the residual of the one before


def dot(x, y):
    """The scalar product in full precision."""
    return jnp.vdot(x, y, precision=lax.Precision.HIGHEST)


def norm(x):
    """The Euclidean length."""
    return jnp.sqrt(dot(x, x))


class ModelStep(NamedTuple):
    """A step of the quadratic model g.p + p.Bp / 2.

    Attributes:
        step: p.
        reduction: -(g.p + p.Bp / 2), never negative.
        residual: |g + B p|.
        outside: whether the step ends at the boundary of the trust region.
        curvature: the largest |d.B d| / |d|^2 of the directions d that were taken.
    """

    step: Any
    reduction: Any
    residual: Any
    outside: Any
    curvature: Any


def truncated_cg(apply: Callable, g, radius, tolerance, max_steps) -> ModelStep:
    r"""Minimise g.p + p.Bp / 2 over |p| <= radius by conjugate gradients, B = `apply`.

    Stops at |g + B p| <= tolerance, at the boundary, or at a direction without positive
    curvature, which it follows to the boundary.
    """
    zero = jnp.zeros_like(g)

    def unfinished(carry):
        k, _, _, _, rr, outside, _ = carry
        return (k < max_steps) & ~outside & (rr > tolerance**2)

    def step(carry):
        k, p, r, d, rr, _, largest = carry
        image = apply(d)
        # The curvature d.B d decides: a minimum along d exists only if it is positive.
        bend, dd = dot(d, image), dot(d, d)
        length = rr / bend
        full = p + length * d
        outside = ~((bend > 0) & (dot(full, full) < radius**2))
        # The positive root of |p + t d| = radius, in the form that does not cancel.
        pd, room = dot(p, d), jnp.maximum(radius**2 - dot(p, p), 0)
        root = jnp.sqrt(pd**2 + dd * room)
        to_edge = jnp.where(pd > 0, room / (pd + root), (root - pd) / dd)
        # Negative curvature, or a step beyond the radius, ends at the boundary.
        length = jnp.where(outside, to_edge, length)
        r = r + length * image
        new = dot(r, r)
        largest = jnp.maximum(largest, jnp.abs(bend) / dd)
        return k + 1, p + length * d, r, new / rr * d - r, new, outside, largest

    gg = dot(g, g)
    first = (0, zero, g, -g, gg, jnp.asarray(False), jnp.zeros_like(gg))
    _, p, r, _, rr, outside, largest = lax.while_loop(unfinished, step, first)
    # r = g + B p, so the model g.p + p.Bp / 2 is p.(g + r) / 2.
    return ModelStep(p, -dot(p, g + r) / 2, jnp.sqrt(rr), outside, largest)


class LinearSolution(NamedTuple):
    """The solution of a linear system by an iterative solver.

    x: the solution.   residual: |b - A x|.   converged: whether it is within the tolerance.
    """

    x: Any
    residual: Any
    converged: Any


def minres(apply: Callable, transposed: Callable, b, tolerance, rounding, max_steps):
    r"""Solve A x = b for a symmetric A = `apply`, definite or not, by minimal residuals.

    Converged means |b - A^T x| <= tolerance |b| + rounding |A| |x|, with A^T = `transposed`. This
    test fails if A is not symmetric.
    """
    size = norm(b)

    def allowed(x, largest):
        return tolerance * size + rounding * largest * norm(x)

    def unfinished(carry):
        k, x, _, error, largest = carry
        return (k < RESTARTS) & (error > allowed(x, largest))

    def correct(carry):
        k, x, r, error, largest = carry
        # Restart on the residual: rounding in the recurrences limits the accuracy of one run.
        more, curvature = _minres(apply, r, tolerance / 2 * size, max_steps)
        new = x + more
        left = b - apply(new)
        now = norm(left)
        better = now < error
        x, r = jnp.where(better, new, x), jnp.where(better, left, r)
        error = jnp.where(better, now, error)
        return jnp.where(better, k + 1, RESTARTS), x, r, error, jnp.maximum(largest, curvature)

    first = (0, jnp.zeros_like(b), b, size, jnp.zeros_like(size))
    _, x, _, _, largest = lax.while_loop(unfinished, correct, first)
    left = b - transposed(x)
    error = norm(left)
    return LinearSolution(x, error, error <= allowed(x, largest))


def conjugate_gradients(apply: Callable, b, least, max_steps):
    """Return (x, smallest curvature or zero, largest or zero) until |b - A x| <= `least`.

    A curvature is d.A d / |d|^2 of a direction d that was taken, so the matrix has eigenvalues that
    are as small and as large.
    """

    def unfinished(carry):
        k, _, _, _, rr, bend, _, _ = carry
        return (k < max_steps) & (rr > least**2) & (bend != 0)

    def step(carry):
        k, x, r, d, rr, _, smallest, largest = carry
        image = apply(d)
        # Either sign of d.A d is a stationary point along d, so a negative definite A works too.
        bend = dot(d, image)
        length = jnp.where(bend != 0, rr / bend, 0)
        r = r - length * image
        new = dot(r, r)
        curvature = bend / dot(d, d)
        smallest, largest = jnp.minimum(smallest, curvature), jnp.maximum(largest, curvature)
        return k + 1, x + length * d, r, r + new / rr * d, new, bend, smallest, largest

    rr = dot(b, b)
    nought = jnp.zeros_like(rr)
    first = (0, jnp.zeros_like(b), b, b, rr, jnp.ones_like(rr), nought, nought)
    _, x, _, _, _, _, smallest, largest = lax.while_loop(unfinished, step, first)
    return x, smallest, largest


def _minres(apply: Callable, b, tolerance, max_steps):
    """Run the recurrences once; return x and an estimate of |A| from the Lanczos matrix."""
    size = norm(b)
    zero, nought = jnp.zeros_like(b), jnp.zeros_like(size)
    tiny = jnp.finfo(b.dtype).tiny

    def unfinished(carry):
        k, left, beta = carry[0], carry[1], carry[2]
        return (k < max_steps) & (left > tolerance) & (beta > 0)

    def step(carry):
        # Lanczos vector v of size one and the rotation (c, s) of the step before.
        k, left, beta, x, v, before, w, w_before, c, s, d_bar, epsilon, largest = carry
        y = apply(v) - beta * before
        alpha = dot(v, y)
        y = y - alpha * v
        beta_next = norm(y)
        # Apply the rotation of the step before to the new column.
        delta, gamma_bar = c * d_bar + s * alpha, s * d_bar - c * alpha
        epsilon_next, d_bar = s * beta_next, -c * beta_next
        # Rotate the new column of the tridiagonal matrix to keep its QR factor.
        gamma = jnp.maximum(jnp.hypot(gamma_bar, beta_next), tiny)
        c, s = gamma_bar / gamma, beta_next / gamma
        w_next = (v - epsilon * w_before - delta * w) / gamma
        x = x + c * left * w_next
        largest = jnp.maximum(largest, jnp.hypot(alpha, beta_next))
        v_next = y / jnp.maximum(beta_next, tiny)
        return (
            k + 1, s * left, beta_next, x, v_next, v, w_next, w, c, s, d_bar, epsilon_next, largest,
        )  # fmt: skip

    v = b / jnp.maximum(size, tiny)
    # `left` is the size of the residual, |phi_bar|, since s >= 0.
    minus = -jnp.ones_like(size)
    carry = (
        0, size, jnp.ones_like(size), zero, v, zero, zero, zero, minus, nought, nought, nought,
        nought,
    )  # fmt: skip
    out = lax.while_loop(unfinished, step, carry)
    return out[3], out[12]
