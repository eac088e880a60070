r"""Large directions of the input covariance: their own variance in a task's data, by its exact law.

The expansion in 1/p needs many eigenvalues that matter alike. Along a direction in which inputs are
large, S fluctuates as c s with n_t c of the chi-square law of n_t degrees of freedom, and a filter
that nearly vanishes there, b(s) = 0, is a new number in every task: terms of order 1/n_t are as
large as the limit. But one direction can be taken out of the others exactly: rotate a task's data
so that one row carries all of that direction. The form of omega along it, given the rest, is
phi(c) = phi of the pencil C + s (c T' + e e^T), with T' = T (1 - s G T/n_t)^{-1}, in which the
direction itself is left out of g, and over the m tasks

    D = E [ ell^2 d + sum_i (o phi_i^2 - phi_i,t - rate phi_i) ] / (ell + sum_i phi_i)^2

where _t is the derivative along residuals' strength and start together and rate that of log tau
(`moments.residuals`). At c = 1 with T in the place of T' that is the limit. With

    E N/P^2 = int_0^inf t E[N exp(-t P)] dt

the average over m independent tasks is one of two functions of t over one task. Its difference from
the limit replaces the 1/p term that `moments` would have if this direction alone
fluctuated, so that the result changes from 1/p^2 on. negmaml/theory/anisotropic.md says more.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.arrays import frozen, namespace
from negmaml._core.factorisations import inverse
from negmaml.theory.anisotropic.equations import Marginal, PencilSystem, condition, tested
from negmaml.theory.anisotropic.moments import Slopes, along_line, residuals
from negmaml.theory.anisotropic.solver import Root

# The directions treated, the first of the spectrum.
LARGEST = 4
# Points for the chi-square law, and how far from its middle in standard deviations.
POINTS, REACH = 20, 4.5
# Of log t, in units of 1/(ell + m phi) at the mean; the trapezoidal rule is good to 1e-5 with it.
LOG_T = np.arange(-7.0, 10.0, 0.7)
# Powers of 1/n_t in the 1/p term of one direction.
TERMS = 5


class Direction(NamedTuple):
    """One or more directions, (k,): as in `PencilSystem`, but d of each."""

    s: Any
    o: Any
    d: Any


def largest_directions(system: PencilSystem, root: Root, x: Marginal, slopes: Slopes):
    """What the largest directions add of their own to the limit of every form, (J,) both.

    (their part of the 1/p term, exact averages in its place)
    """
    xp = namespace(root.T)
    if system.pencil.train_train:
        nothing = np.zeros(system.weights.shape[0], system.s.dtype)
        return nothing, nothing
    _, rate, velocity = residuals(system, root, x, slopes)

    def pick(values):
        return values[..., :LARGEST]

    at, moving = (x.mean, x.spread, x.v), velocity[1:]
    at, moving = jax.tree.map(pick, at), jax.tree.map(pick, moving)
    alone = partial(_alone, system, root.T, velocity[0], rate)
    each = pick(system.s), *at, *moving
    if xp is jnp:
        first, own, own_t = jax.vmap(alone, -1)(*each)
    else:
        count = min(LARGEST, system.s.size)
        found = [alone(*(x[..., i] for x in each)) for i in range(count)]
        first, own, own_t = (xp.stack(parts) for parts in zip(*found, strict=True))
    few = Direction(pick(system.s), pick(system.o), pick(system.start))
    exact = _average(system, few, own, own_t, root, velocity[0], rate)
    usable = xp.isfinite(exact) & xp.isfinite(first)
    before = xp.cumsum(system.count) - system.count
    treated = pick(xp.clip(LARGEST - before, 0, system.count))  # of equal ones no more than these
    both = treated * xp.where(usable, xp.stack([first, exact]), 0)
    return tuple(both @ pick(system.weights).T)


def _average(system: PencilSystem, at: Direction, own, own_t, root: Root, T_t, rate):
    """D over the law of c, less its value at c = 1 with T, (k,)."""
    xp = namespace(own)
    c, share = chi_square(system.n_t)
    without = _taken_out(system, at.s, own, own_t, root.T, T_t)
    # The points of the law, and c = 1.
    T, T_t = (
        xp.stack([*[x] * POINTS, xp.broadcast_to(y, x.shape)]).transpose(2, 3, 0, 1)
        for x, y in zip(without, (root.T, T_t), strict=True)
    )
    scale = xp.append(c, 1)[:, None] * at.s
    phi, residual = _one_task(system, at, T * scale, T_t * scale, rate)
    last = np.arange(POINTS + 1) == POINTS
    over_tasks = partial(_over_tasks, system, at, root.ell, phi, residual)
    shares = xp.append(share, 0), last.astype(share.dtype)
    averaged, still = (
        jax.vmap(over_tasks)(xp.stack(shares)) if xp is jnp else map(over_tasks, shares)
    )
    return averaged - still


def _taken_out(system: PencilSystem, s, own, own_t, T, T_t):
    """T' and its derivative, (k, a, a)."""
    factor = s[:, None, None] / system.n_t
    own, own_t = own * factor, own_t * factor
    left = inverse(np.eye(T.shape[0], dtype=T.dtype) - T @ own)
    without = left @ T
    return without, left @ T_t @ left.swapaxes(1, 2) + without @ own_t @ without


def _one_task(system: PencilSystem, at: Direction, data, data_t, rate):
    """phi and o phi^2 - phi_t - rate phi, (c, k), for c s T' and its derivative, (a, a, c, k)."""
    xp = namespace(data)
    pencil, shape = system.pencil, data.shape[2:]
    first, last = pencil.active
    padding = [(first, pencil.constant.shape[0] - last)] * 2 + [(0, 0)]
    data, data_t = (xp.pad(x.reshape(*x.shape[:2], -1), padding) for x in (data, data_t))
    queries = np.diag(tested(pencil)).astype(data.dtype)[..., None] * xp.tile(at.s, shape[0])
    phi, mean, _ = condition(pencil.constant[..., None] + data + queries)
    phi_t = xp.sum(xp.sum(data_t * mean, 1) * mean, 0)
    phi, phi_t = phi.reshape(shape), phi_t.reshape(shape)
    return phi, at.o * phi**2 - phi_t - rate * phi


def _over_tasks(system: PencilSystem, at: Direction, ell, phi, residual, share):
    """E N/P^2 of this module's head, (k,)."""
    xp = namespace(phi)
    m = system.m
    t = np.exp(LOG_T)[:, None].astype(phi.dtype) / (ell + m * (share @ phi))
    lost = xp.expm1(-t[:, None] * phi)
    epsilon = xp.finfo(phi.dtype).eps
    less = xp.log1p(xp.maximum(xp.sum(share[:, None] * lost, 1), epsilon - 1))
    one = xp.sum(share[:, None] * residual * (1 + lost), 1)
    whole = xp.exp((m - 1) * less - t * ell) * (ell**2 * at.d * xp.exp(less) + m * one)
    return xp.sum(t**2 * whole, 0) * (LOG_T[1] - LOG_T[0])


def chi_square(n):
    """(c, weights) for n c of the chi-square law with n degrees of freedom.

    By the midpoint rule in the cube root of c, which is nearly normal (Wilson and Hilferty 1931).
    """
    xp = namespace(n)
    deviation = xp.sqrt(2 / (9 * n))
    middle = 1 - deviation**2
    low = xp.maximum(middle - REACH * deviation, 0)
    steps = (np.arange(POINTS) + 0.5).astype(deviation.dtype) / POINTS
    root = low + (middle + REACH * deviation - low) * steps
    log_weight = (1.5 * n - 1) * xp.log(root) - n * root**3 / 2
    weight = xp.exp(log_weight - frozen(log_weight).max())
    return root**3, weight / xp.sum(weight)


def _alone(system: PencilSystem, T, T_t, rate, s, *parts):
    """(the 1/p term of D where no other direction and no query row fluctuates, G, its derivative).

    For one direction with M = s T G and b = r v^(1/2) the Hessian's determinants are

        F = { m log det(1 - M^2/n_t) + (m-1) log(1 + w) + log(1 - (m-1) w) } / 2
        w = s^2/n_t sum_j (b^T M^j T b)^2 / n_t^j

    and a ridge on it moves T by s v/n_t sum_j M^j T b b^T T M'^j / n_t^j / (1 - (m-1) w).
    """
    xp = namespace(T)
    active, m, n_t = slice(*system.pencil.active), system.m, system.n_t
    falling = xp.exp(-xp.log(n_t) * np.arange(TERMS))

    def slope(T, mean, spread, v):
        """Of F in a ridge on this direction, T moving with its G alone."""
        root = xp.sqrt(v)
        b = mean * root
        own = spread + b[:, None] * b
        M = s * T @ own
        rungs = [T @ b]
        for _ in range(1, TERMS):
            rungs.append(M @ rungs[-1])
        along_b = xp.stack([b @ x for x in rungs]) * falling
        w = s**2 / n_t * xp.sum(along_b**2 / falling)

        all_rungs = xp.stack(rungs, 1)
        T_y = (all_rungs * falling) @ all_rungs.T * (s * v / n_t / (1 - (m - 1) * w))
        pull = s * T_y @ mean
        b_y = -(spread @ pull * root + b * v * (1 + m * mean @ pull) / 2)
        cross = b_y[:, None] * b
        M_y = s * (T_y @ own + T @ (cross + cross.T - s * spread @ T_y @ spread))
        rungs_y = [T_y @ b + T @ b_y]
        for x in rungs[:-1]:
            rungs_y.append(M_y @ x + M @ rungs_y[-1])
        along_b_y = xp.stack([b @ x for x in rungs_y]) + b_y @ all_rungs
        w_y = 2 * s**2 / n_t * xp.sum(along_b * along_b_y)
        ladder = one = np.eye(T.shape[0])
        for _ in range(1, TERMS):
            ladder = one + M @ M @ ladder / n_t
        log_det_y = -2 / n_t * xp.sum((ladder @ M) * M_y.T)
        return (m * log_det_y + (m - 1) * w_y * (1 / (1 + w) - 1 / (1 - (m - 1) * w))) / 2

    mean, spread, v, mean_t, spread_t, v_t = parts
    at = T, mean[active], spread[active, active], v
    velocity = T_t, mean_t[active], spread_t[active, active], v_t
    value, along = along_line(slope, at, velocity)
    own, own_t = along_line(lambda r, K, v: K + r[:, None] * r * v, at[1:], velocity[1:])
    return along - rate * value, own, own_t
