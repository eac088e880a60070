r"""The scalar equation behind the isotropic theory, and its root.

With B = b(x)^2 the squared filter of one task on its spectrum mu, the tasks' matrices b(S_i)^2 are
asymptotically free. One number kappa then describes all of them and the query rows together,
equation (5) of negmaml/theory/isotropic.md:

    g(kappa) = int mu/(B + kappa)
    t(kappa) = n_v - p (1 - kappa g)        rows of a task that the fit does not use up
    K(kappa) = m kappa - (m - 1)/g          the ridge that the sum of the b(S_i)^2 sees

    meta_ridge = t K,

both factors nonnegative: the root at or above the larger of the roots of t and K. Without ridge one
factor vanishes: t when p > n_v m, K when p < n_v m, and at p = n_v m both.

**Precision.** Let tau = int mu B/(B + kappa) be the fitted part of a task's directions, and
f = kappa g = 1 - tau. Then t = n_v - p tau and K = kappa k/f with k = 1 - m tau. Without ridge the
one of t and k that is not zero is known from the sizes, and a ridge changes both by differences of
tau. So no digit of them is lost, even in float32. B and kappa are given by their logarithms:
filters of steep rules vary over many thousands of decades.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from negmaml._core import taylor
from negmaml._core.arrays import namespace, stop_gradient
from negmaml._core.settings import own_settings
from negmaml.rules import InnerRule
from negmaml.theory.isotropic.inputs import IsotropicInputs
from negmaml.theory.isotropic.logarithms import (
    find_root,
    largest_exponent,
    largest_log_ratio,
    log_at_least_tiny,
    mean_over,
    resolvent_fractions,
)

# A root is found to epsilon to these powers: first cheaply, without exponentials, then accurately.
ROUGH, FINE = 0.3, 0.6


class TrainingSet(NamedTuple):
    """One training set by its sizes, variances and the values of a rule's filters.

    Sizes are real and traced, so that they may vary within one program.

    p, m, n_v: sizes. sigma: label noise. task_std: nu/sqrt(p). offset: |omega_0 - w0|^2.
    ridge: meta_ridge.
    weights: weights of the spectrum's quadrature, (k,).
    sign, log_b: the filter b on the nodes, (..., k) for a batch of rules.
    label, scale: q sqrt(x/n_t) on the nodes is label exp(scale); a scale of None is zero.
    """

    p: Any
    m: Any
    n_v: Any
    sigma: Any
    task_std: Any
    offset: Any
    ridge: Any
    weights: Any
    sign: Any
    log_b: Any
    label: Any
    scale: Any

    def mean(self, values):
        """Return int mu f for values of f on the nodes."""
        return mean_over(self.weights, values)


# Fields of a `TrainingSet` with one entry for each node; all others are scalars.
ON_NODES = frozenset(("weights", "sign", "log_b", "label", "scale"))


class KappaRoot(NamedTuple):
    """The root of the scalar equation, by numbers that keep their digits.

    log_kappa: log kappa. t: rows that are not used up. k: 1 - m tau, so that K = kappa k/f.
    All are NaN where the search did not converge.
    """

    log_kappa: Any
    t: Any
    k: Any


def training_set(inputs: IsotropicInputs, rule: InnerRule) -> TrainingSet:
    """Return the `TrainingSet` of a rule, or of a batch of rules."""
    x, weights = inputs.spectrum
    xp = namespace(inputs, rule)
    found = rule.spectral().log_form(x)
    sign, log_b, label = (xp.asarray(part, x.dtype) for part in found[:3])
    scale = None if found.scale is None else xp.asarray(found.scale, x.dtype)
    # sqrt has no derivative at zero, so the argument is replaced there.
    rows = xp.where(x > 0, xp.sqrt(xp.where(x > 0, x, 1.0) / inputs.n_t), 0.0)
    return TrainingSet(
        inputs.p, inputs.m, inputs.n_v, inputs.sigma, inputs.nu / xp.sqrt(inputs.p),
        inputs.offset, inputs.meta_ridge, weights, sign, log_b, label * rows, scale,
    )  # fmt: skip


def solve(training: TrainingSet, ridged: bool) -> KappaRoot:
    """Return the root, differentiable in every field; `ridged`: True if the ridge may be above 0.

    The search itself is not differentiated: by the implicit function theorem the derivatives of
    kappa are those of the equation t K = ridge.
    """
    xp = namespace(training)
    if xp is taylor:
        return _followed(training, _search(stop_gradient(training), ridged))
    return _search(training, ridged) if xp is np else _root(training, ridged)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _root(training: TrainingSet, ridged: bool) -> KappaRoot:
    return _search(training, ridged)


@_root.defjvp
@own_settings
def _along(ridged: bool, primals, tangents):
    """Differentiate t k/f = ridge/kappa in y = log kappa.

    There t' = p w, k' = m w and f' = w with w = int mu free fitted. Without ridge kappa may be as
    small as rounding allows; its slope in the ridge is clipped, where it would overflow.
    """
    (training,), (moves,) = primals, tangents
    root = _root(training, ridged)
    y, t, k = root
    xp = namespace(y)

    def of(training: TrainingSet):
        tau = training.mean(resolvent_fractions(training.log_b, y)[1])
        return training.n_v - training.p * tau, 1 - training.m * tau, tau

    _, (dt, dk, dtau) = jax.jvp(of, (training,), (moves,))
    free, fitted = resolvent_fractions(training.log_b, y)
    f, w = training.mean(free), training.mean(free * fitted)
    slope = training.p * w * k / f + t * (f * k + (training.m - 1) * w) / f**2
    most = xp.where(training.ridge > 0, 1.0, 0.5) * largest_exponent(y)
    # In logarithms: the slope and kappa may both be beyond the range of numbers.
    in_ridge = xp.exp(xp.minimum(-y - log_at_least_tiny(slope), most))
    dy = in_ridge * moves.ridge - (dt * k / f + t * (dk / f + k * dtau / f**2)) / slope
    return root, KappaRoot(dy, dt + training.p * w * dy, dk + training.m * w * dy)


def _followed(training: TrainingSet, root: KappaRoot) -> KappaRoot:
    """Return the root with its derivatives, by Newton's method on Taylor numbers.

    Each step with the slope at the root makes the derivatives of one more order right. The values
    of t and k are those of `root`, in which nothing cancels.
    """
    y = root.log_kappa
    t, k, known = root.t, root.k, stop_gradient(training)
    free, fitted = resolvent_fractions(known.log_b, y)
    f, w = known.mean(free), known.mean(free * fitted)
    slope = known.p * w * k / f + t * (f * k + (known.m - 1) * w) / f**2
    for _ in range(taylor.order(training) + 1):
        tau = training.mean(resolvent_fractions(training.log_b, y)[1])
        t = taylor.replace_value(training.n_v - training.p * tau, root.t)
        k = taylor.replace_value(1 - training.m * tau, root.k)
        tau = taylor.replace_value(tau, 1 - f)
        ridge = training.ridge * taylor.exp(taylor.minimum(-y, largest_exponent(root.log_kappa)))
        y = y - taylor.replace_value(t * k / (1 - tau) - ridge, 0.0) / slope
    return KappaRoot(y, t, k)


def _search(training: TrainingSet, ridged: bool) -> KappaRoot:
    """Return the root of t K = ridge.

    At p = n_v m without ridge t = k = 0; k is set to the precision, so that nothing divides by 0.
    """
    root, start = _ridgeless(training)
    xp = namespace(root)
    square = (root.t == 0) & (root.k == 0)
    ridgeless = root._replace(k=xp.where(square, xp.finfo(root.k.dtype).eps, root.k))
    if not ridged:
        return ridgeless
    positive = training.ridge > 0
    # A ridge of one stands in for zero, whose root `ridgeless` has; both are evaluated in a batch.
    ridged_root = _ridged(training._replace(ridge=xp.where(positive, training.ridge, 1.0)), start)
    pairs = zip(ridged_root, ridgeless, strict=True)
    return KappaRoot(*(xp.where(positive, one, other) for one, other in pairs))


def _ridgeless(training: TrainingSet) -> tuple[KappaRoot, KappaRoot]:
    """Return the root of kappa g(kappa) = 1 - min(n_v/p, 1/m), and the start of a ridged search.

    It is found in log kappa and log odds. There the left side rises with a slope between 0 and 1,
    and exactly 1 for a constant filter, so Newton's method converges fast. kappa g lies between
    its values for constant filters at the smallest and the largest B, which brackets the root.

    The root is at kappa = 0 where the fit uses up all that the filters pass: one task with
    n_v >= p, or filters with zeros. Then kappa is set so far below every B that it has no effect.
    The root with a ridge may be lower still: the second root returned has kappa = 0 for it.
    """
    p, m, n_v, log_b, mean = training.p, training.m, training.n_v, training.log_b, training.mean
    xp = namespace(log_b)
    # tau at the root: K = 0 gives tau = 1/m, and t = 0 gives tau = n_v/p, whichever is less.
    used = xp.minimum(n_v / p, 1 / m)
    passing = xp.isfinite(log_b)
    # kappa g between those of constant filters at the smallest and the largest B: the bracket.
    smallest = 2 * xp.min(xp.where(passing, log_b, xp.inf), -1)
    smallest = xp.where(xp.isfinite(smallest), smallest, 0.0)
    largest = xp.maximum(2 * xp.max(log_b, -1), smallest)
    # So far below every B that B/(B + kappa) rounds to one.
    zero = smallest + 0.75 * np.log(xp.finfo(log_b.dtype).eps)
    stopped = mean(xp.where(passing, 0.0, 1.0).astype(log_b.dtype))
    all_used = used + stopped >= 1 - 4 * xp.finfo(log_b.dtype).eps
    used = xp.where(used < 1, used, 0.5)
    odds = xp.log((1 - used) / used)

    def residual(y):
        # tau counted from where B and kappa cross. Steep filters put the eigenvalues so far apart
        # that between two of them only the smaller fractions tell where kappa lies.
        free, fitted = resolvent_fractions(log_b, y)
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
    # The cheap search brings the guess close; two or three accurate steps remain.
    near = find_root(partial(_roughly, training.weights, B, largest, odds), low, high, guess, ROUGH)
    near = xp.where(xp.isnan(near), guess, near)
    y = find_root(residual, low, high, near, FINE)
    y = xp.where(all_used, zero, y)
    # t and k from the sizes, not from tau: exactly zero for the factor that vanishes.
    f = mean(resolvent_fractions(log_b, y)[0])
    t = xp.where(all_used, n_v - p + p * f, n_v - xp.minimum(n_v, p / m))
    k = xp.where(all_used, 1 - m + m * f, xp.maximum(p - n_v * m, 0.0) / p)
    t, k = (xp.where(xp.isnan(y), xp.nan, part) for part in (t, k))
    start = KappaRoot(
        xp.where(all_used, y - 2 * largest_log_ratio(y), y),
        xp.where(all_used, n_v - p + p * stopped, t),
        xp.where(all_used, 1 - m + m * stopped, k),
    )
    return KappaRoot(y, t, k), start


def _roughly(weights, B, log_unit, odds, y):
    """Return the residual of `_ridgeless` and its slope without exponentials.

    It is accurate only for B and kappa within the range of numbers.
    """
    xp, mean = namespace(B), partial(mean_over, weights)
    far = largest_exponent(B) / 3
    kappa = xp.exp(xp.clip(y - log_unit, -far, far))[..., None]
    free = kappa / (B + kappa)
    f, square = mean(free), mean(free * free)
    fitted = xp.maximum(1 - f, xp.finfo(f.dtype).eps)
    value = log_at_least_tiny(f) - xp.log(fitted) - odds
    return value, (f - square) / (xp.maximum(f, xp.finfo(f.dtype).tiny) * fitted)


def _ridged(training: TrainingSet, start: KappaRoot) -> KappaRoot:
    """Return the root of t K = ridge > 0 above the ridgeless root `start`.

    The unknown is z = log(kappa - start). t and k are differences from `start`, where one of them
    is zero, so that no digit cancels: tau falls by h int mu B/(B + start) kappa/(B + kappa), with
    h = 1 - start/kappa.
    """
    p, m, n_v, log_b, mean = training.p, training.m, training.n_v, training.log_b, training.mean
    xp = namespace(log_b)
    y_0, t_0, k_0 = start
    free_0, fitted_0 = resolvent_fractions(log_b, y_0)
    log_ridge = xp.log(training.ridge)

    def at(z):
        y = xp.logaddexp(z, y_0)
        h = xp.exp(z - y)
        free, fitted = resolvent_fractions(log_b, y)
        gone = h * mean(fitted_0 * free)
        return y, h, t_0 + p * gone, k_0 + m * gone, mean(free), mean(free * fitted)

    def residual(z):
        y, h, t, k, f, w = at(z)
        rise = h * (p * w / t + m * w / k - w / f + 1)
        return log_at_least_tiny(t) + log_at_least_tiny(k) - log_at_least_tiny(
            f
        ) + y - log_ridge, rise

    # Upper bound: at this kappa K >= kappa/2 and t >= n_v/2, because 1/g <= kappa + mean B and
    # t >= n_v - p mean B/kappa, so that t K >= ridge.
    largest = 2 * xp.max(log_b, -1)
    largest = xp.where(xp.isfinite(largest), largest, 0.0)
    log_mean = largest + log_at_least_tiny(mean(xp.exp(2 * log_b - largest[..., None])))
    high = xp.logaddexp(xp.log(2 * (m - 1 + p / n_v)) + log_mean, log_ridge + xp.log(4 / n_v))
    low = xp.minimum(y_0, high) + 3 * np.log(xp.finfo(log_b.dtype).eps)
    f, w = mean(free_0), mean(free_0 * fitted_0)
    K_slope = (f * k_0 + (m - 1) * w) / f**2
    # The guess is the smaller of two solutions: t K is linear in kappa - start just above the
    # ridgeless root, and quadratic where its linear term vanishes (near p = n_v m).
    linear = log_ridge - log_at_least_tiny(p * w * k_0 / f + t_0 * K_slope)
    square = (log_ridge + y_0 - log_at_least_tiny(p * w * K_slope)) / 2
    z = find_root(residual, low, high, xp.minimum(linear, square))
    y, _, t, k, _, _ = at(z)
    return KappaRoot(y, *(xp.where(xp.isnan(y), xp.nan, part) for part in (t, k)))
