r"""Outliers, the largest eigenvalues of the input covariance, averaged by their exact law.

The expansion in 1/p needs many eigenvalues of similar weight. Along a direction of large s, the
matrix S of a task fluctuates as c s, where n_t c has the chi-square law of n_t degrees of freedom.
A filter that nearly vanishes there, b(s) = 0, takes a new value in every task, and terms of order
1/n_t are as large as the limit. But one direction can be separated from the others exactly: rotate
a task's data so that one row carries all of it. The precision of omega along it is then phi(c) =
phi of the pencil C + s (c T' + e e^T), where

    T' = T (1 - s G T/n_t)^{-1}                                                              (A16)

leaves the direction itself out of g, and over the m tasks

    D = E [ ell^2 d + sum_i (o phi_i^2 - phi_i,t - rate phi_i) ] / (ell + sum_i phi_i)^2     (A17)

where _t is the derivative in the strength of residuals and the start, and rate that of log tau
(`moments.residual_direction`). At c = 1 with T in the place of T' that is the limit. By

    E N/P^2 = int_0^inf t E[N exp(-t P)] dt

the mean over m independent tasks needs only two functions of t over one task. Its difference from
the limit replaces the 1/p term that `moments` would have if only this direction fluctuated, so the
result changes from order 1/p^2 on.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.arrays import namespace, stop_gradient
from negmaml._core.factorisations import inverse
from negmaml.theory.anisotropic.equations import (
    Marginal,
    PencilSystem,
    marginalize,
    output_matrix,
    pad_to_pencil,
)
from negmaml.theory.anisotropic.moments import Slopes, complex_step_jvp, residual_direction
from negmaml.theory.anisotropic.solver import PencilRoot

# The number of eigenvalues averaged exactly, the largest of the spectrum.
NUM_MODES = 4
# Points for the chi-square law, and their range around its middle in standard deviations.
POINTS, REACH = 20, 4.5
# Grid of log t in units of 1/(ell + m phi) at the mean: the trapezoidal rule is good to 1e-5 on it.
LOG_T = np.arange(-7.0, 10.0, 0.7)
# Powers of 1/n_t kept in the 1/p term of one direction.
TERMS = 5


class OutlierModes(NamedTuple):
    """One or more directions, (k,): s and o as in `PencilSystem`, d of each direction."""

    s: Any
    o: Any
    d: Any


def outlier_correction(system: PencilSystem, root: PencilRoot, x: Marginal, slopes: Slopes):
    """Return, of every form (J,), the outliers' part of the 1/p term and its exact replacement.

    The second is the exact average less the limit. Both are zero for a train-train loss, whose
    rows are also those that test.
    """
    xp = namespace(root.T)
    if system.pencil.train_train:
        nothing = np.zeros(system.weights.shape[0], system.s.dtype)
        return nothing, nothing
    _, rate, velocity = residual_direction(system, root, x, slopes)

    def first_modes(values):
        return values[..., :NUM_MODES]

    each = jax.tree.map(first_modes, (system.s, x.mean, x.cov, x.v, *velocity[1:]))
    single_mode = partial(_single_mode, system, root.T, velocity[0], rate)
    if xp is jnp:
        first, G, G_t = jax.vmap(single_mode, -1)(*each)
    else:
        count = min(NUM_MODES, system.s.size)
        found = [single_mode(*(x[..., i] for x in each)) for i in range(count)]
        first, G, G_t = (xp.stack(parts) for parts in zip(*found, strict=True))
    modes = OutlierModes(*map(first_modes, (system.s, system.o, system.start)))
    exact = _average(system, modes, G, G_t, root, velocity[0], rate)
    usable = xp.isfinite(exact) & xp.isfinite(first)
    # An eigenvalue may stand for several directions: treat no more than NUM_MODES in all.
    before = xp.cumsum(system.count) - system.count
    treated = first_modes(xp.clip(NUM_MODES - before, 0, system.count))
    both = treated * xp.where(usable, xp.stack([first, exact]), 0)
    return tuple(both @ first_modes(system.weights).T)


def _average(system: PencilSystem, modes: OutlierModes, G, G_t, root: PencilRoot, T_t, rate):
    """Return (A17) over the law of c, less its value at c = 1 with T, (k,)."""
    xp = namespace(G)
    c, share = chi_square(system.n_t)
    reduced = _leave_one_mode_out(system, modes.s, G, G_t, root.T, T_t)
    # The points of the law with T', and c = 1 with T.
    T, T_t = (
        xp.stack([*[x] * POINTS, xp.broadcast_to(y, x.shape)]).transpose(2, 3, 0, 1)
        for x, y in zip(reduced, (root.T, T_t), strict=True)
    )
    scale = xp.append(c, 1)[:, None] * modes.s
    phi, residual = _one_task(system, modes, T * scale, T_t * scale, rate)
    last = np.arange(POINTS + 1) == POINTS
    over_tasks = partial(_over_tasks, system, modes, root.ell, phi, residual)
    shares = xp.append(share, 0), last.astype(share.dtype)
    averaged, at_mean = (
        jax.vmap(over_tasks)(xp.stack(shares)) if xp is jnp else map(over_tasks, shares)
    )
    return averaged - at_mean


def _leave_one_mode_out(system: PencilSystem, s, G, G_t, T, T_t):
    """Return T' of (A16) and its derivative, (k, a, a)."""
    factor = s[:, None, None] / system.n_t
    G, G_t = G * factor, G_t * factor
    # T' = (1 - T s G/n_t)^-1 T, and its derivative in T and G.
    left = inverse(np.eye(T.shape[0], dtype=T.dtype) - T @ G)
    reduced = left @ T
    return reduced, left @ T_t @ left.swapaxes(1, 2) + reduced @ G_t @ reduced


def _one_task(system: PencilSystem, modes: OutlierModes, data, data_t, rate):
    """Return phi and o phi^2 - phi_t - rate phi, (c, k), for c s T' and its derivative."""
    xp = namespace(data)
    pencil, shape = system.pencil, data.shape[2:]
    data, data_t = (pad_to_pencil(pencil, x.reshape(*x.shape[:2], -1)) for x in (data, data_t))
    queries = output_matrix(pencil, data.dtype)[..., None] * xp.tile(modes.s, shape[0])
    # The precision C + s (c T' + e e^T) of (A17), for all c and directions at once.
    phi, mean, _ = marginalize(pencil.constant[..., None] + data + queries)
    phi_t = xp.sum(xp.sum(data_t * mean, 1) * mean, 0)
    phi, phi_t = phi.reshape(shape), phi_t.reshape(shape)
    return phi, modes.o * phi**2 - phi_t - rate * phi


def _over_tasks(system: PencilSystem, modes: OutlierModes, ell, phi, residual, share):
    """Return E N/P^2 of the head of this module, (k,), for points with probabilities `share`."""
    xp = namespace(phi)
    m = system.m
    t = np.exp(LOG_T)[:, None].astype(phi.dtype) / (ell + m * (share @ phi))
    # log E exp(-t phi) and E residual exp(-t phi) of one task.
    decay = xp.expm1(-t[:, None] * phi)
    epsilon = xp.finfo(phi.dtype).eps
    # A mean of exp(-t phi) is above zero but for rounding, which must not reach the logarithm.
    log_decay = xp.log1p(xp.maximum(xp.sum(share[:, None] * decay, 1), epsilon - 1))
    one = xp.sum(share[:, None] * residual * (1 + decay), 1)
    whole = xp.exp((m - 1) * log_decay - t * ell)
    whole = whole * (ell**2 * modes.d * xp.exp(log_decay) + m * one)
    return xp.sum(t**2 * whole, 0) * (LOG_T[1] - LOG_T[0])


def chi_square(n):
    """Return (c, weights) for n c of the chi-square law with n degrees of freedom.

    By the midpoint rule in the cube root of c, which is nearly normal (Wilson and Hilferty 1931).
    """
    xp = namespace(n)
    deviation = xp.sqrt(2 / (9 * n))
    middle = 1 - deviation**2
    # Few degrees of freedom put the lower end below zero, where c has no density.
    low = xp.maximum(middle - REACH * deviation, 0)
    steps = (np.arange(POINTS) + 0.5).astype(deviation.dtype) / POINTS
    root = low + (middle + REACH * deviation - low) * steps
    # The density of c, (n/2 - 1) log c - n c/2, and 2 log root of the change of variable.
    log_weight = (1.5 * n - 1) * xp.log(root) - n * root**3 / 2
    weight = xp.exp(log_weight - stop_gradient(log_weight).max())
    return root**3, weight / xp.sum(weight)


def _single_mode(system: PencilSystem, T, T_t, rate, s, *state):
    """Return (its part of the 1/p term, G, dG/dt) for one direction that fluctuates by itself.

    For one direction and no query rows that fluctuate, with M = s T G and b = r v^(1/2), the
    Hessian's determinants are

        F = { m log det(1 - M^2/n_t) + (m-1) log(1 + w) + log(1 - (m-1) w) } / 2             (A18)
        w = s^2/n_t sum_j (b^T M^j T b)^2 / n_t^j

    and a ridge y on it moves T by s v/n_t sum_j M^j T b b^T T M'^j / n_t^j / (1 - (m-1) w). `state`
    is r, K_c and v of the direction, and then their derivatives.
    """
    xp = namespace(T)
    active, m, n_t = slice(*system.pencil.active), system.m, system.n_t
    powers = xp.exp(-xp.log(n_t) * np.arange(TERMS))  # n_t^-j

    def slope(T, mean, cov, v):
        """Return F_y, where T moves only with the direction's own G."""
        root = xp.sqrt(v)
        b = mean * root
        G = cov + b[:, None] * b
        M = s * T @ G
        terms = [T @ b]  # M^j T b
        for _ in range(1, TERMS):
            terms.append(M @ terms[-1])
        along_b = xp.stack([b @ x for x in terms]) * powers
        w = s**2 / n_t * xp.sum(along_b**2 / powers)

        stacked = xp.stack(terms, 1)
        T_y = (stacked * powers) @ stacked.T * (s * v / n_t / (1 - (m - 1) * w))
        pull = s * T_y @ mean
        b_y = -(cov @ pull * root + b * v * (1 + m * mean @ pull) / 2)
        cross = b_y[:, None] * b
        M_y = s * (T_y @ G + T @ (cross + cross.T - s * cov @ T_y @ cov))
        terms_y = [T_y @ b + T @ b_y]
        for x in terms[:-1]:
            terms_y.append(M_y @ x + M @ terms_y[-1])
        along_b_y = xp.stack([b @ x for x in terms_y]) + b_y @ stacked
        w_y = 2 * s**2 / n_t * xp.sum(along_b * along_b_y)
        # The geometric series of (1 - M^2/n_t)^-1, by Horner's rule.
        series = one = np.eye(T.shape[0])
        for _ in range(1, TERMS):
            series = one + M @ M @ series / n_t
        log_det_y = -2 / n_t * xp.sum((series @ M) * M_y.T)
        return (m * log_det_y + (m - 1) * w_y * (1 / (1 + w) - 1 / (1 - (m - 1) * w))) / 2

    mean, cov, v, mean_t, cov_t, v_t = state
    at = T, mean[active], cov[active, active], v
    velocity = T_t, mean_t[active], cov_t[active, active], v_t
    value, along = complex_step_jvp(slope, at, velocity)
    G, G_t = complex_step_jvp(lambda r, K, v: K + r[:, None] * r * v, at[1:], velocity[1:])
    return along - rate * value, G, G_t
