r"""The scalar equation behind the proportional theory, and its root.

With B = b(x)^2 the squared filter of one task on its spectrum mu, the tasks' matrices b(S_i)^2 are
asymptotically free, and one number kappa holds all of them together with the validation data:

    g(kappa) = int mu/(B + kappa)
    t(kappa) = n_v - p (1 - kappa g)        rows of a task that are not used up by the fit
    K(kappa) = m kappa - (m - 1)/g          the ridge that the sum of the b(S_i)^2 feels

    meta_ridge = t K,

both factors nonnegative: the root at or above the larger of the roots of t and K. Without ridge one
factor vanishes: t when p > n_v m, K when p < n_v m, and at p = n_v m both.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from negmaml._core.numerics import frozen, namespace
from negmaml.rules import Rule
from negmaml.theory.setting import Setting


class TrainingSet(NamedTuple):
    """One training set as the theory sees it; sizes are real and traced, so that they may vary.

    p, m, n_v: sizes. sigma: label noise. offset: |omega_0 - w0|^2. ridge: meta_ridge.
    weights: of the spectrum's quadrature, (k,).
    b: filter on the nodes, (..., k) for a batch of rules.
    a: two of (..., k), the amplitudes by which task weights and label noise enter a task's
        residual: its covariance is V = (nu^2/p) b^2 + sigma^2 q^2 x/n_t = sum of a^2.

    The filters, sigma and the root of the ridge are in units of the largest |b|, so that no square
    overflows; the distance and the task error in units of its square do not depend on the unit.
    Arrays are NumPy's or JAX's, all the same.
    """

    p: Any
    m: Any
    n_v: Any
    sigma: Any
    offset: Any
    ridge: Any
    weights: Any
    b: Any
    a: Any
    unit: Any

    @property
    def B(self):
        """b^2 on the nodes."""
        return self.b * self.b

    @property
    def V(self):
        """The residual's covariance on the nodes."""
        tasks, labels = self.a[0], self.a[1]
        return tasks * tasks + labels * labels

    def mean(self, values):
        """int mu f of values on the nodes; under JAX a sum, which XLA fuses with what it sums."""
        if namespace(values) is np and self.weights.ndim == 1:
            return values @ self.weights
        return (self.weights * values).sum(-1)

    def inverse(self, kappa):
        """1/(B + kappa) on the nodes."""
        return 1 / (self.B + kappa[..., None])

    def g(self, kappa):
        """int mu/(B + kappa)."""
        return self.mean(self.inverse(kappa))

    def t(self, kappa):
        """Rows of a task not used up by the fit."""
        return self.n_v - self.p * self.mean(self.B * self.inverse(kappa))

    def K(self, kappa):
        """The ridge felt by the sum over tasks."""
        return self.m * kappa - (self.m - 1) / self.g(kappa)


def training_set(setting: Setting, rule: Rule) -> TrainingSet:
    """The `TrainingSet` of a setting and a rule, or a batch of rules."""
    x, weights = setting.spectrum
    xp = namespace(setting, rule)
    b, q = xp.asarray(rule.b(x), x.dtype), xp.asarray(rule.q(x), x.dtype)
    unit = frozen(xp.max(xp.abs(b), -1))
    unit = xp.where(unit > 0, unit, 1.0)
    b, q = b / unit[..., None], q / unit[..., None]
    # The root of a zero has no derivative, also where nothing is differentiated.
    rows = xp.where(x > 0, x, 1.0) / setting.n_t
    labels = setting.sigma * q * xp.where(x > 0, xp.sqrt(rows), 0.0)
    a = setting.nu / xp.sqrt(setting.p) * b, labels
    ridge = setting.meta_ridge / unit / unit
    return TrainingSet(
        setting.p, setting.m, setting.n_v, setting.sigma / unit, setting.offset, ridge, weights,
        b, a, unit,
    )  # fmt: skip


def solve(tasks: TrainingSet, ridged: bool):
    """kappa, differentiable in all that `tasks` holds; `ridged` says whether ridge may be > 0.

    The search itself is not differentiated: by the implicit function theorem the derivatives of
    kappa are those of the equation t K = ridge that it solves.
    """
    return _search(tasks, ridged) if namespace(tasks) is np else _root(tasks, ridged)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _root(tasks: TrainingSet, ridged: bool):
    return _search(tasks, ridged)


@_root.defjvp
def _along(ridged: bool, tasks, moves):
    (tasks,), (moves,) = tasks, moves
    kappa = _root(tasks, ridged)
    moved = jax.jvp(lambda tasks: tasks.t(kappa) * tasks.K(kappa) - tasks.ridge, (tasks,), (moves,))
    inverse = tasks.inverse(kappa)
    square = inverse * inverse
    dt = tasks.p * tasks.mean(tasks.B * square)
    dK = tasks.m - (tasks.m - 1) * tasks.mean(square) / tasks.mean(inverse) ** 2
    return kappa, -moved[1] / (dt * tasks.K(kappa) + tasks.t(kappa) * dK)


def _search(tasks: TrainingSet, ridged: bool):
    """The root of t K = ridge."""
    root = _ridgeless(tasks)
    if not ridged:
        return root
    where = namespace(root).where
    positive = tasks.ridge > 0
    safe = tasks._replace(ridge=where(positive, tasks.ridge, 1.0))
    return where(positive, _ridged(safe, root), root)


def _ridgeless(tasks: TrainingSet):
    """The root of kappa g(kappa) = 1 - min(n_v/p, 1/m), in log kappa and log odds.

    In these coordinates the left side rises with slope between 0 and 1, and exactly 1 for a
    constant filter, so Newton's method is at home. kappa g lies between the values of constant
    filters at the smallest and the largest B, which brackets the root.
    """
    p, m, n_v, B, mean = tasks.p, tasks.m, tasks.n_v, tasks.B, tasks.mean
    xp = namespace(B)
    tiny = xp.finfo(B.dtype).tiny
    used = xp.minimum(n_v / p, 1 / m)
    none = used >= 1  # a single task with more points than dimensions: kappa = 0
    odds = xp.log((1 - xp.where(none, 0.5, used)) / used)

    def residual(y):
        kappa = xp.exp(y)
        inverse = 1 / (B + kappa[..., None])
        free, taken = kappa * mean(inverse), mean(B * inverse)
        slope = kappa * mean(B * inverse * inverse) / (free * taken)
        return _log(free) - _log(taken) - odds, slope

    low = odds + xp.log(xp.maximum(xp.min(B, -1), tiny * 1e6))
    high = odds + _log(xp.max(B, -1))
    y = _find_root(residual, low, high, odds + _log(mean(B)))
    return xp.where(none, 0.0, xp.exp(y))


def _ridged(tasks: TrainingSet, start):
    """The root of t K = ridge > 0 above `start`, the ridgeless one, in log(kappa - start).

    t and K are taken as differences from `start`, where one of them is zero, so that none of their
    digits cancels.
    """
    p, m, n_v, ridge, B, mean = tasks.p, tasks.m, tasks.n_v, tasks.ridge, tasks.B, tasks.mean
    xp = namespace(B)
    tiny = xp.finfo(B.dtype).tiny
    first = B + start[..., None]
    at_start = 1 / xp.maximum(first, tiny)
    g = mean(at_start)
    over = p > n_v * m
    t_start = xp.where(over, 0.0, n_v - xp.minimum(p / m, n_v))
    K_start = xp.where(over, xp.maximum(m * start - (m - 1) / g, 0.0), 0.0)

    def slopes(inverse, g_here):
        both = at_start * inverse
        return p * mean(B * both), m - (m - 1) * mean(both) / (g_here * g)

    def residual(z):
        step = xp.exp(z)
        inverse = 1 / (first + step[..., None])
        g_here = mean(inverse)
        t, K = slopes(inverse, g_here)
        t, K = t_start + step * t, K_start + step * K
        square = inverse * inverse
        dt = p * mean(B * square)
        dK = m - (m - 1) * mean(square) / g_here**2
        return _log(t) + _log(K) - xp.log(ridge), step * (dt / t + dK / K)

    dt, dK = slopes(at_start, g)
    linear = ridge / xp.maximum(dt * K_start + t_start * dK, tiny)
    square = xp.sqrt(ridge / xp.maximum(dt * dK, tiny))
    # There K >= kappa/2 and t >= n_v/2, since 1/g <= kappa + mean B and t >= n_v - p mean B/kappa.
    high = _log(2 * (m - 1 + p / n_v) * mean(B) + 4 * ridge / n_v)
    low = xp.full_like(high, xp.log(tiny) / 2)
    return start + xp.exp(_find_root(residual, low, high, _log(xp.minimum(linear, square))))


def _log(x):
    xp = namespace(x)
    return xp.log(xp.maximum(x, xp.finfo(x.dtype).tiny))


def _find_root(residual: Callable, low, high, guess):
    """Newton's method on an increasing function, kept in a bracket by bisection.

    `residual` returns value and slope. A step to the precision of the number ends it.
    """
    xp = namespace(guess)
    epsilon = xp.finfo(guess.dtype).eps

    def unfinished(state):
        count, _, _, y, step = state
        return (count < 150) & xp.any(xp.abs(step) > 8 * epsilon * xp.maximum(1.0, xp.abs(y)))

    def advance(state):
        count, low, high, y, _ = state
        value, slope = residual(y)
        low, high = xp.where(value < 0, y, low), xp.where(value < 0, high, y)
        newton = y - value / slope
        inside = (newton >= low) & (newton <= high)  # at the root it may stay where it is
        following = xp.where(inside, newton, (low + high) / 2)
        return count + 1, low, high, following, following - y

    margin = 1e-3  # rounding must not put the root outside
    low, high, guess = xp.broadcast_arrays(low - margin, high + margin, guess)
    state = (0, low, high, xp.clip(guess, low, high), xp.full_like(guess, xp.inf))
    if xp is np:
        while unfinished(state):
            state = advance(state)
        return state[3]
    return lax.while_loop(unfinished, advance, state)[3]
