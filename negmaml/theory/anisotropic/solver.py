r"""The root of the structured equations, for every input in range.

The unknowns are T, symmetric and small, and log ell. Multiply the multipliers by i: then the pencil
has a positive real part, the map T -> A (1 + g A/n_t)^{-1} takes matrices of nonnegative real part
to such matrices, and by the theorem of Earle and Hamilton there is one root with nonnegative real
part, which iterating the map reaches from anywhere (Helton, Rashidi Far and Speicher 2007 for such
equations). In real terms: T is nonnegative on points and nonpositive on multipliers. Newton's
method is safe with this to fall back on: a step that leaves the domain, or does not lessen the
residual, is shortened and, if that does not help, one iteration of the map taken instead.

ell follows ell <- (ridge + ell sum_k s_k G_out,out)/n_v, likewise; without ridge it is zero if
there are more rows than dimensions, and tau is zero if there are fewer.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from negmaml._core import tape
from negmaml._core.arrays import contract, frozen, namespace
from negmaml._core.factorisations import inverse
from negmaml._core.settings import own_settings
from negmaml.theory.anisotropic.equations import (
    PencilSystem,
    bases,
    eliminate,
    marginal,
    overlaps,
    parts,
    response,
    update,
)

ITERATIONS = 300
# Iterations of the map alone before Newton's method after a failure; when one is looked for.
PATIENT, RESTART = 60, 60
# The search starts beside A, off by this share of it.
OFF_START = 1 / 64
# Of Newton's step, below which an iteration of the map is taken in its place.
LEAST_SHARE = 0.1


class Root(NamedTuple):
    """T (a, a), ell, tau, f of train_train pencils, and whether it was found."""

    T: jax.Array
    ell: jax.Array
    tau: jax.Array
    f: jax.Array | None
    converged: jax.Array


class Trial(NamedTuple):
    """A point of the search, the map's move from there, Newton's move, and how far it is off."""

    point: jax.Array
    picard: jax.Array
    newton: jax.Array
    error: jax.Array
    inside: jax.Array


def solve(system: PencilSystem, ridged: bool) -> Root:
    """The root, differentiable in all of `system`; `ridged` says whether ridge may be > 0."""
    xp = namespace(system)
    point, error = (_followed if xp is tape else _root)(system, ridged)
    T, ell = _split(system, point, ridged)
    *_, output, f = update(system, marginal(system, T, ell))
    tau = xp.where(_over(system), 0, system.n_v - output)
    if ridged:
        positive = system.ridge > 0
        tau = xp.where(positive, system.ridge / xp.where(positive, ell, 1), tau)
    converged = error < np.finfo(point.dtype).eps ** 0.5
    return Root(T, ell, tau, f, converged)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _root(system: PencilSystem, ridged: bool):
    """(point, error). Its derivatives are those of the equations, not of the search."""
    return _search(system, ridged)


@_root.defjvp
@own_settings
def _root_jvp(ridged: bool, primals, tangents):
    (system,) = primals
    point, error = _root(system, ridged)
    _, slope = jax.jvp(lambda system: _moves(system, point, ridged)[0], primals, tangents)
    jacobian = jax.jacfwd(lambda point: _moves(system, point, ridged)[0])(point)
    return (point, error), (-inverse(jacobian) @ slope, jnp.zeros_like(error))


def _followed(system: PencilSystem, ridged: bool):
    """`_root` on the host, with derivatives by Newton's method with the slopes at the root.

    Values take part in the first steps; every step makes the derivatives of one more order right.
    """
    known = frozen(system)
    with np.errstate(all="ignore"):
        point, error = _search(known, ridged)
    for _ in range(2):
        point = point - _slopes_at(known, point, ridged) @ _moves(known, point, ridged)[0]
    inverted = _slopes_at(known, point, ridged)
    for _ in range(3):
        move, _ = _moves(system, point, ridged)
        point = point - inverted @ move
    return point, error


def _slopes_at(system: PencilSystem, point, ridged: bool):
    """The inverse of the Jacobian of the map's move, by complex steps."""
    step = 1e-30
    rows = [_moves(system, point + 1j * step * unit, ridged)[0] for unit in np.eye(point.size)]
    return np.linalg.inv(np.stack(rows, 1).imag / step)


def _over(system: PencilSystem):
    """More dimensions than rows."""
    xp = namespace(system)
    return xp.sum(system.count) > system.m * system.n_v


def _unknown_ell(system: PencilSystem, ridged: bool):
    """Whether ell is not simply zero."""
    over = _over(system)
    return over | (system.ridge > 0) if ridged else over


def _split(system: PencilSystem, point, ridged: bool):
    """T and ell of a point (T in the basis of symmetric matrices, log ell)."""
    xp = namespace(point)
    first, last = system.pencil.active
    symmetric, _ = bases(last - first, point.dtype)
    T = (symmetric @ point[:-1]).reshape(last - first, last - first)
    return T, xp.where(_unknown_ell(system, ridged), xp.exp(point[-1]), 0)


def _moves(system: PencilSystem, point, ridged: bool):
    """The map's move from a point, and what it was made of."""
    xp = namespace(point, system.s)
    T, ell = _split(system, point, ridged)
    x = marginal(system, T, ell)
    new, g, output, f = update(system, x)
    symmetric, _ = bases(T.shape[0], point.dtype)
    unknown = _unknown_ell(system, ridged)
    own = system.ridge / xp.where(unknown, ell, 1) if ridged else xp.zeros_like(ell)
    ratio = own + output
    gap = xp.where(unknown, xp.log(ratio / system.n_v), -point[-1])
    move = xp.append(new.ravel() @ symmetric - point[:-1], gap)
    return move, (x, T, new, g, f, ell, unknown, own, ratio)


def _try(system: PencilSystem, point, ridged: bool) -> Trial:
    """Evaluate a point. The map's derivative is R Gamma_+ of the Hessian, so it costs little."""
    xp = namespace(point)
    move, (x, T, new, g, f, ell, unknown, own, ratio) = _moves(system, point, ridged)
    symmetric, _ = bases(new.shape[0], point.dtype)
    between = x.between()
    gram = overlaps(system, x.own(), f).even + (system.m - 1) * overlaps(system, between, f).even
    R = response(system, new, f)
    # Of g at fixed T in log ell.
    inner, _, corner = parts(system.pencil, between, f)
    rate = -ell * (system.count * system.s * x.v)
    g_ell = contract("ijk,k->ij", inner, rate).ravel() @ symmetric
    last = xp.append(-gram[-1, :-1], ratio - own + xp.sum(corner * rate)) / ratio
    last = xp.where(unknown, last, 0)
    top = xp.concatenate([R @ gram[:-1, :-1], -(R @ g_ell)[:, None]], 1)
    jacobian = xp.concatenate([top, last[None]])
    scale = _scale(new, g, symmetric)
    matrix = np.eye(point.size, dtype=point.dtype) - jacobian
    newton = (inverse(matrix * scale / scale[:, None]) @ (move / scale)) * scale
    newton = newton * xp.minimum(1, 2 / (xp.abs(newton[-1]) + 1e-30))
    first, after = system.pencil.active
    signs = 2 * system.pencil.points[first:after] - 1  # of T on points and multipliers
    inside = xp.all(_diagonal(T) * signs >= 0) & xp.all(x.phi >= 0)
    error = xp.max(xp.abs(move) / scale)
    return Trial(point, move, newton, xp.where(xp.isfinite(error), error, xp.inf), inside)


def _diagonal(matrix):
    xp = namespace(matrix)
    return xp.sum(matrix * np.eye(matrix.shape[0], dtype=matrix.dtype), 0)


def _scale(T, g, symmetric):
    """Sizes to which errors are compared: of T its own and that at which it is felt, 1/g; else
    1."""
    xp = namespace(T)
    root, felt = (xp.sqrt(xp.abs(_diagonal(x))) for x in (T, g))
    size = xp.abs(T) + root[:, None] * root + 1 / (felt[:, None] * felt)
    return xp.append(size.ravel() @ symmetric, 1)


def _search(system: PencilSystem, ridged: bool):
    """(root, error), from the pencil near that of S = Sigma, T = A.

    Not quite there: b may vanish at an eigenvalue of Sigma, and all equations with it.
    """
    xp = namespace(system)
    A = (1 - OFF_START) * system.pencil.coupled()
    symmetric, _ = bases(A.shape[0], A.dtype)
    if system.pencil.train_train:
        A = A + np.diag(np.arange(A.shape[0]) == A.shape[0] - 1).astype(A.dtype)
    phi, *_ = eliminate(system.pencil, system.s, A)
    low = xp.finfo(A.dtype).tiny ** 0.25
    ell = xp.log(xp.maximum(xp.sum(system.count * xp.abs(phi)), low) / system.n_v)
    ell = xp.where(_unknown_ell(system, ridged), ell, 0)
    start = xp.append(A.ravel() @ symmetric, ell)
    nothing, far = xp.zeros_like(start), xp.full_like(ell, xp.inf)
    first = Trial(start, nothing, nothing, far, xp.zeros((), bool))
    epsilon = xp.finfo(A.dtype).eps

    def unfinished(state):
        at, share, count, _ = state
        floor = (share < 1) & (at.error < 1e4 * epsilon)
        return (at.error > 8 * epsilon) & ~floor & (count < ITERATIONS)

    def advance(state):
        at, share, count, until = state
        iterate = (share < LEAST_SHARE) | (count < until)
        move = xp.where(iterate, at.picard, share * at.newton)
        new = _try(system, at.point + move, ridged)
        good = iterate | (new.inside & (new.error < at.error))
        # Newton's method may end outside the domain of the root unseen; from there, start again.
        lost = (iterate & ~xp.isfinite(new.error)) | ((at.error > 0.1) & (count == RESTART))
        kept = jax.tree.map(lambda a, b: xp.where(good, a, b), new, at)
        kept = jax.tree.map(lambda a, b: xp.where(lost, a, b), first, kept)
        share = xp.where(good | lost, 1.0, share / 8)
        return kept, share, count + 1, xp.where(lost, count + PATIENT, until)

    begin = first, xp.ones_like(ell), 0, 2
    if xp is np:
        while unfinished(begin):
            begin = advance(begin)
        return begin[0].point, begin[0].error
    at, *_ = lax.while_loop(unfinished, advance, begin)
    return at.point, at.error
