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

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from negmaml.rules import Rule
from negmaml.theory.setting import Setting


class TrainingSet(NamedTuple):
    """One training set as the theory sees it; sizes are real and traced, so that they may vary.

    p, m, n_v: sizes. sigma: label noise. offset: |omega_0 - w0|^2. ridge: meta_ridge.
    weights: of the spectrum's quadrature, (k,).
    b: filter on the nodes, (k,).
    a: (2, k), the amplitudes by which task weights and label noise enter a task's residual: its
        covariance is V = (nu^2/p) b^2 + sigma^2 q^2 x/n_t = sum of a^2.

    The filters, sigma and the root of the ridge are in units of the largest |b|, so that no square
    overflows; the distance and the task error in units of its square do not depend on the unit.
    """

    p: jax.Array
    m: jax.Array
    n_v: jax.Array
    sigma: jax.Array
    offset: jax.Array
    ridge: jax.Array
    weights: jax.Array
    b: jax.Array
    a: jax.Array
    unit: jax.Array

    @property
    def B(self):
        """b^2 on the nodes."""
        return self.b**2

    @property
    def V(self):
        """The residual's covariance on the nodes."""
        return jnp.sum(self.a**2, 0)

    def mean(self, values):
        """int mu f of values on the nodes; a sum, which XLA fuses with what it sums."""
        return jnp.sum(self.weights * values, -1)

    def g(self, kappa):
        """int mu/(B + kappa)."""
        return self.mean(1 / (self.B + kappa))

    def t(self, kappa):
        """Rows of a task not used up by the fit."""
        return self.n_v - self.p * self.mean(self.B / (self.B + kappa))

    def K(self, kappa):
        """The ridge felt by the sum over tasks."""
        return self.m * kappa - (self.m - 1) / self.g(kappa)

    def noise(self, kappa):
        """u = sigma^2 + p int mu V kappa/(B + kappa), a task's residual beyond its fit."""
        return self.sigma**2 + self.p * kappa * self.mean(self.V / (self.B + kappa))


def training_set(setting: Setting, rule: Rule) -> TrainingSet:
    """The `TrainingSet` of a setting and a rule with scalar parameters."""
    x, weights = setting.spectrum
    b, q = rule.b(x), rule.q(x)
    unit = lax.stop_gradient(jnp.max(jnp.abs(b)))
    unit = jnp.where(unit > 0, unit, 1)
    b, q = b / unit, q / unit
    spread = setting.nu / jnp.sqrt(setting.p)
    a = jnp.stack([spread * b, setting.sigma * q * jnp.sqrt(x / setting.n_t)])
    ridge = setting.meta_ridge / unit / unit
    return TrainingSet(
        setting.p, setting.m, setting.n_v, setting.sigma / unit, setting.offset, ridge, weights,
        b, a, unit,
    )  # fmt: skip


def derivative(function, x):
    """(function(x), function'(x)) of a scalar."""
    return jax.jvp(function, (x,), (jnp.ones_like(x),))


def solve(tasks: TrainingSet, ridged: bool):
    """kappa, differentiable in all that `tasks` holds; `ridged` says whether ridge may be > 0.

    The search itself is not differentiated: by the implicit function theorem the derivatives of
    kappa are those of the equation t K = ridge that it solves.
    """
    frozen = lax.stop_gradient(tasks)
    root = _ridgeless(frozen)
    if ridged:
        positive = frozen.ridge > 0
        safe = frozen._replace(ridge=jnp.where(positive, frozen.ridge, 1))
        root = jnp.where(positive, _ridged(safe, root), root)
    return lax.custom_root(
        lambda kappa: tasks.t(kappa) * tasks.K(kappa) - tasks.ridge,
        lax.stop_gradient(root),
        lambda _, found: found,
        lambda linear, y: y / linear(jnp.ones_like(y)),
    )


def _ridgeless(tasks: TrainingSet):
    """The root of kappa g(kappa) = 1 - min(n_v/p, 1/m), in log kappa and log odds.

    In these coordinates the left side rises with slope between 0 and 1, and exactly 1 for a
    constant filter, so Newton's method is at home. kappa g lies between the values of constant
    filters at the smallest and the largest B, which brackets the root.
    """
    p, m, n_v, B, mean = tasks.p, tasks.m, tasks.n_v, tasks.B, tasks.mean
    tiny = jnp.finfo(B.dtype).tiny
    used = jnp.minimum(n_v / p, 1 / m)
    none = used >= 1  # a single task with more points than dimensions: kappa = 0
    odds = jnp.log((1 - jnp.where(none, 0.5, used)) / used)

    def residual(y):
        kappa = jnp.exp(y)
        inverse = 1 / (B + kappa)
        free, taken = kappa * mean(inverse), mean(B * inverse)
        slope = kappa * mean(B * inverse**2) / (free * taken)
        return _log(free) - _log(taken) - odds, slope

    low = odds + jnp.log(jnp.maximum(jnp.min(B), tiny * 1e6))
    high = odds + _log(jnp.max(B))
    y = _find_root(residual, low, high, odds + _log(mean(B)))
    return jnp.where(none, 0, jnp.exp(y))


def _ridged(tasks: TrainingSet, start):
    """The root of t K = ridge > 0 above `start`, the ridgeless one, in log(kappa - start).

    t and K are taken as differences from `start`, where one of them is zero, so that none of their
    digits cancels.
    """
    p, m, n_v, ridge, B, mean = tasks.p, tasks.m, tasks.n_v, tasks.ridge, tasks.B, tasks.mean
    tiny = jnp.finfo(B.dtype).tiny
    at_start = 1 / jnp.maximum(B + start, tiny)
    g = mean(at_start)
    over = p > n_v * m
    t_start = jnp.where(over, 0, n_v - jnp.minimum(p / m, n_v))
    K_start = jnp.where(over, jnp.maximum(m * start - (m - 1) / g, 0), 0)

    def slopes(inverse, g_here):
        t = p * mean(B * at_start * inverse)
        return t, m - (m - 1) * mean(at_start * inverse) / (g_here * g)

    def residual(z):
        step = jnp.exp(z)
        inverse = 1 / (B + start + step)
        g_here = mean(inverse)
        t, K = slopes(inverse, g_here)
        t, K = t_start + step * t, K_start + step * K
        dt = p * mean(B * inverse**2)
        dK = m - (m - 1) * mean(inverse**2) / g_here**2
        return _log(t) + _log(K) - jnp.log(ridge), step * (dt / t + dK / K)

    dt, dK = slopes(at_start, g)
    linear = ridge / jnp.maximum(dt * K_start + t_start * dK, tiny)
    square = jnp.sqrt(ridge / jnp.maximum(dt * dK, tiny))
    # There K >= kappa/2 and t >= n_v/2, since 1/g <= kappa + mean B and t >= n_v - p mean B/kappa.
    high = _log(2 * (m - 1 + p / n_v) * mean(B) + 4 * ridge / n_v)
    low = jnp.full_like(high, jnp.log(tiny) / 2)
    return start + jnp.exp(_find_root(residual, low, high, _log(jnp.minimum(linear, square))))


def _log(x):
    return jnp.log(jnp.maximum(x, jnp.finfo(x.dtype).tiny))


def _find_root(residual, low, high, guess):
    """Newton's method on an increasing function, kept in a bracket by bisection.

    `residual` returns value and slope. A step to the precision of the number ends it.
    """
    epsilon = jnp.finfo(guess.dtype).eps

    def unfinished(state):
        count, _, _, y, step = state
        return (count < 150) & (jnp.abs(step) > 8 * epsilon * jnp.maximum(1, jnp.abs(y)))

    def advance(state):
        count, low, high, y, _ = state
        value, slope = residual(y)
        low, high = jnp.where(value < 0, y, low), jnp.where(value < 0, high, y)
        newton = y - value / slope
        inside = (newton > low) & (newton < high)
        following = jnp.where(inside, newton, (low + high) / 2)
        return count + 1, low, high, following, following - y

    margin = 1e-3  # rounding must not put the root outside
    low, high = low - margin, high + margin
    first = (0, low, high, jnp.clip(guess, low, high), jnp.full_like(guess, jnp.inf))
    return lax.while_loop(unfinished, advance, first)[3]
