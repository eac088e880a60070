r"""The scalar equation behind the proportional theory, and its root.

With B = b(x)^2 the squared filter of one task on its spectrum mu, the tasks' matrices b(S_i)^2 are
asymptotically free, and one number kappa holds all of them together with the validation data:

    g(kappa) = int mu/(B + kappa)
    t(kappa) = n_v - p (1 - kappa g)        rows of a task that are not used up by the fit
    K(kappa) = m kappa - (m - 1)/g          the ridge that the sum of the b(S_i)^2 feels

    meta_ridge = t K,

both factors nonnegative: the root at or above the larger of the roots of t and K. Without ridge one
factor vanishes: t when p > n_v m, K when p < n_v m, and at p = n_v m both.

**Precision.** With tau = int mu B/(B + kappa), the part of a task's directions that is fitted, and
f = kappa g = 1 - tau, it is t = n_v - p tau and K = kappa k/f with k = 1 - m tau. Whichever of t
and k is not zero without ridge is known from the sizes, and a ridge changes both by differences of
tau, so no digit of them is lost, in float32 neither. B and kappa come as logarithms: filters of
steep rules differ by many thousands of decades.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from negmaml._core import jets, tape
from negmaml._core.arrays import namespace, stop_gradient
from negmaml._core.settings import own_settings
from negmaml.rules import InnerRule
from negmaml.theory.isotropic.inputs import Setting
from negmaml.theory.isotropic.logarithms import (
    find_root,
    largest_exponent,
    largest_log_ratio,
    log_at_least_tiny,
    mean_over,
    shares,
)

# Powers of the precision to which a root is found, first without exponentials and then well.
ROUGH, FINE = 0.3, 0.6


class TrainingSet(NamedTuple):
    """One training set as the theory sees it; sizes are real and traced, so that they may vary.

    p, m, n_v: sizes. sigma: label noise. tasks: nu^2/p, as its root. offset: |omega_0 - w0|^2.
    ridge: meta_ridge.
    weights: of the spectrum's quadrature, (k,).
    sign, log_b: the filter on the nodes, (..., k) for a batch of rules.
    label, scale: q sqrt(x/n_t) on the nodes is label exp(scale); a scale of None is zero.
    Arrays are NumPy's or JAX's, all the same.
    """

    p: Any
    m: Any
    n_v: Any
    sigma: Any
    tasks: Any
    offset: Any
    ridge: Any
    weights: Any
    sign: Any
    log_b: Any
    label: Any
    scale: Any

    def mean(self, values):
        """int mu f of values on the nodes."""
        return mean_over(self.weights, values)


ON_NODES = frozenset(("weights", "sign", "log_b", "label", "scale"))  # of a `TrainingSet`


class Root(NamedTuple):
    """log kappa, t, and k = 1 - m tau; NaN where the search did not converge."""

    log_kappa: Any
    t: Any
    k: Any


def training_set(setting: Setting, rule: InnerRule) -> TrainingSet:
    """The `TrainingSet` of a setting and a rule, or a batch of rules."""
    x, weights = setting.spectrum
    xp = namespace(setting, rule)
    found = rule.spectral().log_form(x)
    sign, log_b, label = (xp.asarray(part, x.dtype) for part in found[:3])
    scale = None if found.scale is None else xp.asarray(found.scale, x.dtype)
    # The root of a zero has no derivative, also where nothing is differentiated.
    rows = xp.where(x > 0, xp.sqrt(xp.where(x > 0, x, 1.0) / setting.n_t), 0.0)
    return TrainingSet(
        setting.p, setting.m, setting.n_v, setting.sigma, setting.nu / xp.sqrt(setting.p),
        setting.offset, setting.meta_ridge, weights, sign, log_b, label * rows, scale,
    )  # fmt: skip


def solve(tasks: TrainingSet, ridged: bool) -> Root:
    """The root, differentiable in all that `tasks` holds; `ridged`: whether ridge may be > 0.

    The search itself is not differentiated: by the implicit function theorem the derivatives of
    kappa are those of the equation t K = ridge that it solves.
    """
    xp = namespace(tasks)
    if xp is jets or xp is tape:
        return _followed(xp, tasks, _search(stop_gradient(tasks), ridged))
    return _search(tasks, ridged) if xp is np else _root(tasks, ridged)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _root(tasks: TrainingSet, ridged: bool) -> Root:
    return _search(tasks, ridged)


@_root.defjvp
@own_settings
def _along(ridged: bool, primals, tangents):
    """Of t k/f = ridge/kappa in y = log kappa: t' = p w, k' = m w, w = int mu free fitted.

    Without ridge kappa may be as small as rounding asks for, and its slope in the ridge no number.
    """
    (tasks,), (moves,) = primals, tangents
    root = _root(tasks, ridged)
    y, t, k = root
    xp = namespace(y)

    def of(tasks: TrainingSet):
        tau = tasks.mean(shares(tasks.log_b, y)[1])
        return tasks.n_v - tasks.p * tau, 1 - tasks.m * tau, tau

    _, (dt, dk, dtau) = jax.jvp(of, (tasks,), (moves,))
    free, fitted = shares(tasks.log_b, y)
    f, w = tasks.mean(free), tasks.mean(free * fitted)
    slope = tasks.p * w * k / f + t * (f * k + (tasks.m - 1) * w) / f**2
    most = xp.where(tasks.ridge > 0, 1.0, 0.5) * largest_exponent(y)
    in_ridge = xp.exp(xp.minimum(-y - log_at_least_tiny(slope), most))
    dy = in_ridge * moves.ridge - (dt * k / f + t * (dk / f + k * dtau / f**2)) / slope
    return root, Root(dy, dt + tasks.p * w * dy, dk + tasks.m * w * dy)


def _followed(xp, tasks: TrainingSet, root: Root) -> Root:
    """The root with its derivatives, of the same equation: Newton's method on jets or a tape.

    A step with the slope at the root alone makes the first derivatives right, a second one those
    that are mixed; of t and k the values are those of the root, where nothing cancels.
    """
    y = root.log_kappa
    t, k, known = root.t, root.k, stop_gradient(tasks)
    free, fitted = shares(known.log_b, y)
    f, w = known.mean(free), known.mean(free * fitted)
    slope = known.p * w * k / f + t * (f * k + (known.m - 1) * w) / f**2
    for _ in range(3 if xp is jets else 4):  # one more than the order wanted
        tau = tasks.mean(shares(tasks.log_b, y)[1])
        t = xp.with_value(tasks.n_v - tasks.p * tau, root.t)
        k = xp.with_value(1 - tasks.m * tau, root.k)
        tau = xp.with_value(tau, 1 - f)
        ridge = tasks.ridge * xp.exp(xp.minimum(-y, largest_exponent(root.log_kappa)))
        y = y - xp.with_value(t * k / (1 - tau) - ridge, 0.0) / slope
    return Root(y, t, k)


def _search(tasks: TrainingSet, ridged: bool) -> Root:
    """The root of t K = ridge; at p = n_v m without ridge, where t = k = 0, k is barely above."""
    root, start = _ridgeless(tasks)
    xp = namespace(root)
    square = (root.t == 0) & (root.k == 0)
    ridgeless = root._replace(k=xp.where(square, xp.finfo(root.k.dtype).eps, root.k))
    if not ridged:
        return ridgeless
    positive = tasks.ridge > 0
    found = _ridged(tasks._replace(ridge=xp.where(positive, tasks.ridge, 1.0)), start)
    pairs = zip(found, ridgeless, strict=True)
    return Root(*(xp.where(positive, one, other) for one, other in pairs))


def _ridgeless(tasks: TrainingSet) -> tuple[Root, Root]:
    """The root of kappa g(kappa) = 1 - min(n_v/p, 1/m), in log kappa and log odds.

    In these coordinates the left side rises with slope between 0 and 1, and exactly 1 for a
    constant filter, so Newton's method is at home. kappa g lies between the values of constant
    filters at the smallest and the largest B, which brackets the root.

    Where the fit can have all that the filters let pass (one task with n_v >= p, or filters with
    zeros) the root is at kappa = 0; then kappa is so far below every B that it makes no difference.
    A ridge may want it lower still, and starts from the second root returned, for it at zero.
    """
    p, m, n_v, log_b, mean = tasks.p, tasks.m, tasks.n_v, tasks.log_b, tasks.mean
    xp = namespace(log_b)
    used = xp.minimum(n_v / p, 1 / m)
    passing = xp.isfinite(log_b)
    smallest = 2 * xp.min(xp.where(passing, log_b, xp.inf), -1)
    smallest = xp.where(xp.isfinite(smallest), smallest, 0.0)
    largest = xp.maximum(2 * xp.max(log_b, -1), smallest)
    zero = smallest + 0.75 * np.log(xp.finfo(log_b.dtype).eps)
    stopped = mean(xp.where(passing, 0.0, 1.0).astype(log_b.dtype))
    all_used = used + stopped >= 1 - 4 * xp.finfo(log_b.dtype).eps
    used = xp.where(used < 1, used, 0.5)
    odds = xp.log((1 - used) / used)

    def residual(y):
        # Counted from where B and kappa cross: between eigenvalues as far apart as steep filters
        # put them all but the smaller shares are known, and only those say where kappa lies.
        free, fitted = shares(log_b, y)
        above = fitted > free
        more = mean(above.astype(y.dtype)) - used
        more = xp.where(xp.abs(more) < 64 * xp.finfo(y.dtype).eps * used, 0.0, more)
        more = more - mean(xp.where(above, free, -fitted))  # tau - used
        least = xp.finfo(y.dtype).eps - 1
        f, tau = xp.maximum(-more / (1 - used), least), xp.maximum(more / used, least)
        slope = mean(free * fitted) / ((1 + f) * (1 + tau) * (1 - used) * used)
        return xp.log1p(f) - xp.log1p(tau), slope

    every = xp.min(xp.where(passing, 1.0, 0.0), -1) > 0
    low = xp.where(every, odds + smallest, xp.minimum(zero, odds + smallest))
    high = odds + largest
    B = xp.exp(xp.maximum(2 * log_b - largest[..., None], -largest_exponent(high) / 3))
    guess = high + log_at_least_tiny(mean(B))
    near = find_root(partial(_roughly, tasks.weights, B, largest, odds), low, high, guess, ROUGH)
    near = xp.where(xp.isnan(near), guess, near)
    y = find_root(residual, low, high, near, FINE)
    y = xp.where(all_used, zero, y)
    f = mean(shares(log_b, y)[0])
    t = xp.where(all_used, n_v - p + p * f, n_v - xp.minimum(n_v, p / m))
    k = xp.where(all_used, 1 - m + m * f, xp.maximum(p - n_v * m, 0.0) / p)
    t, k = (xp.where(xp.isnan(y), xp.nan, part) for part in (t, k))
    start = Root(
        xp.where(all_used, y - 2 * largest_log_ratio(y), y),
        xp.where(all_used, n_v - p + p * stopped, t),
        xp.where(all_used, 1 - m + m * stopped, k),
    )
    return Root(y, t, k), start


def _roughly(weights, B, log_unit, odds, y):
    """The residual of `_ridgeless`, without exponentials, for B and kappa within some decades."""
    xp, mean = namespace(B), partial(mean_over, weights)
    far = largest_exponent(B) / 3
    kappa = xp.exp(xp.clip(y - log_unit, -far, far))[..., None]
    free = kappa / (B + kappa)
    f, square = mean(free), mean(free * free)
    fitted = xp.maximum(1 - f, xp.finfo(f.dtype).eps)
    value = log_at_least_tiny(f) - xp.log(fitted) - odds
    return value, (f - square) / (xp.maximum(f, xp.finfo(f.dtype).tiny) * fitted)


def _ridged(tasks: TrainingSet, start: Root) -> Root:
    """The root of t K = ridge > 0 above `start`, the ridgeless one, in z = log(kappa - start).

    t and k are taken as differences from `start`, where one of them is zero, so that none of their
    digits cancels: tau falls by h int mu B/(B + start) kappa/(B + kappa), h = 1 - start/kappa.
    """
    p, m, n_v, log_b, mean = tasks.p, tasks.m, tasks.n_v, tasks.log_b, tasks.mean
    xp = namespace(log_b)
    y_0, t_0, k_0 = start
    free_0, fitted_0 = shares(log_b, y_0)
    log_ridge = xp.log(tasks.ridge)

    def at(z):
        y = xp.logaddexp(z, y_0)
        h = xp.exp(z - y)
        free, fitted = shares(log_b, y)
        gone = h * mean(fitted_0 * free)
        return y, h, t_0 + p * gone, k_0 + m * gone, mean(free), mean(free * fitted)

    def residual(z):
        y, h, t, k, f, w = at(z)
        rise = h * (p * w / t + m * w / k - w / f + 1)
        return log_at_least_tiny(t) + log_at_least_tiny(k) - log_at_least_tiny(
            f
        ) + y - log_ridge, rise

    # There K >= kappa/2 and t >= n_v/2, since 1/g <= kappa + mean B and t >= n_v - p mean B/kappa.
    largest = 2 * xp.max(log_b, -1)
    largest = xp.where(xp.isfinite(largest), largest, 0.0)
    log_mean = largest + log_at_least_tiny(mean(xp.exp(2 * log_b - largest[..., None])))
    high = xp.logaddexp(xp.log(2 * (m - 1 + p / n_v)) + log_mean, log_ridge + xp.log(4 / n_v))
    low = xp.minimum(y_0, high) + 3 * np.log(xp.finfo(log_b.dtype).eps)
    f, w = mean(free_0), mean(free_0 * fitted_0)
    bend = (f * k_0 + (m - 1) * w) / f**2
    linear = log_ridge - log_at_least_tiny(p * w * k_0 / f + t_0 * bend)
    square = (log_ridge + y_0 - log_at_least_tiny(p * w * bend)) / 2
    z = find_root(residual, low, high, xp.minimum(linear, square))
    y, _, t, k, _, _ = at(z)
    return Root(y, *(xp.where(xp.isnan(y), xp.nan, part) for part in (t, k)))
