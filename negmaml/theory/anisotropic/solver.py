r"""The root of the saddle point equations of `equations`, for every input in range.

The unknowns are T, symmetric and small, and log ell. The map T -> A (1 + g A/n_t)^{-1} has one
fixed point in a domain that it does not leave, and iterating it converges to that point from every
start (anisotropic.md, "There is one root"). In real terms, T is nonnegative on points and
nonpositive on multipliers there. So Newton's method has a safe fallback: a step that leaves the
domain, or does not lessen the residual, is shortened, and if that does not help, one iteration of
the map replaces it.

ell follows the iteration ell <- (ridge + ell sum_k s_k e^T G e)/n_v likewise. Without ridge it is
zero if there are more rows than dimensions, and tau is zero if there are fewer.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from negmaml._core import taylor
from negmaml._core.arrays import contract, namespace, stop_gradient
from negmaml._core.factorisations import inverse
from negmaml._core.settings import own_settings
from negmaml.theory.anisotropic.equations import (
    PencilSystem,
    bases,
    marginal,
    minus_T_slope,
    pencil_blocks,
    total_overlaps,
    update,
)

MAX_ITERATIONS = 300
# A search that is still far off after RESTART iterations starts again, with PATIENT iterations of
# the map before Newton's method.
PATIENT, RESTART = 60, 60
# The search starts at (1 - OFFSET) A instead of A, where b may vanish at an eigenvalue.
OFFSET = 1 / 64
# Shares of Newton's step below this are not tried: one iteration of the map replaces the step.
MIN_SHARE = 0.1


class PencilRoot(NamedTuple):
    """T (a, a), ell, tau, f of train-train pencils, and whether the search converged."""

    T: jax.Array
    ell: jax.Array
    tau: jax.Array
    f: jax.Array | None
    converged: jax.Array


class Trial(NamedTuple):
    """A point of the search with the map's move, Newton's move and the error there.

    inside: whether the point is in the domain of the root.
    """

    point: jax.Array
    picard: jax.Array
    newton: jax.Array
    error: jax.Array
    inside: jax.Array


def solve(system: PencilSystem, ridged: bool) -> PencilRoot:
    """Return the root, differentiable in all of `system`; `ridged`: whether ridge may be > 0."""
    xp = namespace(system)
    point, error = (_host_root if xp is taylor else _root)(system, ridged)
    T, ell = _split(system, point, ridged)
    # Without ridge one of ell and tau is zero; with ridge tau = ridge/ell loses no digits.
    *_, output, f = update(system, marginal(system, T, ell))
    tau = xp.where(_more_dimensions(system), 0, system.n_v - output)
    if ridged:
        positive = system.ridge > 0
        tau = xp.where(positive, system.ridge / xp.where(positive, ell, 1), tau)
    converged = error < np.finfo(point.dtype).eps ** 0.5
    return PencilRoot(T, ell, tau, f, converged)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _root(system: PencilSystem, ridged: bool):
    """Return (point, error), with the derivatives of the equations, not of the search."""
    return _search(system, ridged)


@_root.defjvp
@own_settings
def _root_jvp(ridged: bool, primals, tangents):
    (system,) = primals
    point, error = _root(system, ridged)
    # The implicit function theorem for the equation move = 0.
    _, slope = jax.jvp(lambda system: _moves(system, point, ridged)[0], primals, tangents)
    jacobian = jax.jacfwd(lambda point: _moves(system, point, ridged)[0])(point)
    return (point, error), (-inverse(jacobian) @ slope, jnp.zeros_like(error))


def _host_root(system: PencilSystem, ridged: bool):
    """Return (point, error) on the host, with derivatives by Newton steps.

    The first steps are of plain values. The others use the Jacobian at the root, and each makes the
    derivatives of one more order exact.
    """
    known = stop_gradient(system)
    with np.errstate(all="ignore"):
        point, error = _search(known, ridged)
    # The search may end at an error of 1e4 units of rounding, which two more steps remove.
    for _ in range(2):
        point = point - _inverse_jacobian(known, point, ridged) @ _moves(known, point, ridged)[0]
    inverted = _inverse_jacobian(known, point, ridged)
    for _ in range(taylor.order(system)):
        point = point - inverted @ _moves(system, point, ridged)[0]
    return point, error


def _inverse_jacobian(system: PencilSystem, point, ridged: bool):
    """Return the inverse of the Jacobian of the map's move, by complex steps."""
    # A complex step subtracts nothing, so it may be as small as this and lose no digits.
    step = 1e-30
    rows = [_moves(system, point + 1j * step * unit, ridged)[0] for unit in np.eye(point.size)]
    return np.linalg.inv(np.stack(rows, 1).imag / step)


def _more_dimensions(system: PencilSystem):
    """Return whether there are more dimensions with input than rows."""
    return namespace(system).sum(system.count) > system.m * system.n_v


def _unknown_ell(system: PencilSystem, ridged: bool):
    """Return whether ell is an unknown; else it is zero."""
    more = _more_dimensions(system)
    return more | (system.ridge > 0) if ridged else more


def _split(system: PencilSystem, point, ridged: bool):
    """Return T and ell of a point, (T in the basis of symmetric matrices, log ell)."""
    xp = namespace(point)
    first, last = system.pencil.active
    symmetric, _ = bases(last - first, point.dtype)
    T = (symmetric @ point[:-1]).reshape(last - first, last - first)
    return T, xp.where(_unknown_ell(system, ridged), xp.exp(point[-1]), 0)


def _moves(system: PencilSystem, point, ridged: bool):
    """Return the map's move from a point, and the intermediate results that `_try` needs."""
    xp = namespace(point, system.s)
    T, ell = _split(system, point, ridged)
    x = marginal(system, T, ell)
    new, g, output, f = update(system, x)
    symmetric, _ = bases(T.shape[0], point.dtype)
    unknown = _unknown_ell(system, ridged)
    # log ell moves by the log of (ridge/ell + e^T g e)/n_v, which is one at the root.
    own = system.ridge / xp.where(unknown, ell, 1) if ridged else xp.zeros_like(ell)
    ratio = own + output
    gap = xp.where(unknown, xp.log(ratio / system.n_v), -point[-1])
    move = xp.append(new.ravel() @ symmetric - point[:-1], gap)
    return move, (x, T, new, g, f, ell, unknown, own, ratio)


def _try(system: PencilSystem, point, ridged: bool) -> Trial:
    """Evaluate a point. The map's derivative is R Gamma_+ of (A14), so it costs little."""
    xp = namespace(point)
    move, (x, T, new, g, f, ell, unknown, own, ratio) = _moves(system, point, ridged)
    symmetric, _ = bases(new.shape[0], point.dtype)
    gram = total_overlaps(system, x, f)
    R = minus_T_slope(system, new, f)
    # The derivative of g in log ell at fixed T.
    inner, _, corner = pencil_blocks(system.pencil, x.cross_task(), f)
    rate = -ell * (system.count * system.s * x.v)
    g_ell = contract("ijk,k->ij", inner, rate).ravel() @ symmetric
    last = xp.append(-gram[-1, :-1], ratio - own + xp.sum(corner * rate)) / ratio
    last = xp.where(unknown, last, 0)
    top = xp.concatenate([R @ gram[:-1, :-1], -(R @ g_ell)[:, None]], 1)
    jacobian = xp.concatenate([top, last[None]])
    scale = _scale(new, g, symmetric)
    # Newton's step solves (1 - J) step = move, in units in which all unknowns are of order one.
    matrix = np.eye(point.size, dtype=point.dtype) - jacobian
    newton = (inverse(matrix * scale / scale[:, None]) @ (move / scale)) * scale
    # log ell moves by two at most.
    newton = newton * xp.minimum(1, 2 / (xp.abs(newton[-1]) + 1e-30))
    signs = 2 * system.pencil.points[slice(*system.pencil.active)] - 1  # 1 on points, else -1
    inside = xp.all(_diagonal(T) * signs >= 0) & xp.all(x.phi >= 0)
    error = xp.max(xp.abs(move) / scale)
    return Trial(point, move, newton, xp.where(xp.isfinite(error), error, xp.inf), inside)


def _diagonal(matrix):
    return namespace(matrix).sum(matrix * np.eye(matrix.shape[0], dtype=matrix.dtype), 0)


def _scale(T, g, symmetric):
    """Return the units of errors: of T its own size plus 1/g, the size that matters; of log ell 1.

    Entries are compared with the geometric means of their two diagonal entries.
    """
    xp = namespace(T)
    root, of_g = (xp.sqrt(xp.abs(_diagonal(x))) for x in (T, g))
    size = xp.abs(T) + root[:, None] * root + 1 / (of_g[:, None] * of_g)
    return xp.append(size.ravel() @ symmetric, 1)


def _start(system: PencilSystem, ridged: bool):
    """Return the first point: near T = A, the pencil at S = Sigma, and ell to match.

    It is not T = A itself, since b may vanish at an eigenvalue of Sigma, and all equations with it.
    """
    xp = namespace(system)
    A = (1 - OFFSET) * system.pencil.coupled()
    symmetric, _ = bases(A.shape[0], A.dtype)
    if system.pencil.train_train:
        A = A + np.diag(np.arange(A.shape[0]) == A.shape[0] - 1).astype(A.dtype)
    # ell of the ridgeless equation sum_k phi/(ell + m phi) = n_v, if phi were small.
    phi = marginal(system, A, 1.0).phi
    low = xp.finfo(A.dtype).tiny ** 0.25
    ell = xp.log(xp.maximum(xp.sum(system.count * xp.abs(phi)), low) / system.n_v)
    ell = xp.where(_unknown_ell(system, ridged), ell, 0)
    return xp.append(A.ravel() @ symmetric, ell)


def _search(system: PencilSystem, ridged: bool):
    """Return (root, error) by Newton's method, safeguarded as the head of this module says."""
    xp = namespace(system)
    start = _start(system, ridged)
    nothing, far = xp.zeros_like(start), xp.full_like(start[-1], xp.inf)
    first = Trial(start, nothing, nothing, far, xp.zeros((), bool))
    epsilon = xp.finfo(start.dtype).eps

    def unfinished(state):
        at, share, count, _ = state
        # A shortened step that no longer helps, this close to the root, is rounding.
        floor = (share < 1) & (at.error < 1e4 * epsilon)
        return (at.error > 8 * epsilon) & ~floor & (count < MAX_ITERATIONS)

    def advance(state):
        at, share, count, until = state
        iterate = (share < MIN_SHARE) | (count < until)
        move = xp.where(iterate, at.picard, share * at.newton)
        new = _try(system, at.point + move, ridged)
        good = iterate | (new.inside & (new.error < at.error))
        # Newton's method may have left the domain of the root unnoticed: start again then.
        lost = (iterate & ~xp.isfinite(new.error)) | ((at.error > 0.1) & (count == RESTART))
        kept = jax.tree.map(lambda a, b: xp.where(good, a, b), new, at)
        kept = jax.tree.map(lambda a, b: xp.where(lost, a, b), first, kept)
        share = xp.where(good | lost, 1.0, share / 8)
        return kept, share, count + 1, xp.where(lost, count + PATIENT, until)

    state = first, xp.ones_like(far), 0, 2
    if xp is np:
        while unfinished(state):
            state = advance(state)
    else:
        state = lax.while_loop(unfinished, advance, state)
    return state[0].point, state[0].error
