"""A training set rescaled so that its root is at kappa = 1, which avoids overflow.

`saddle_derivatives` takes the integrals over the spectrum; the theory's numbers are made of them in
`negmaml.theory.isotropic.moments` and `.hessian`.
"""

from typing import Any, NamedTuple

from negmaml._core.arrays import namespace, stop_gradient
from negmaml.theory.isotropic.logarithms import (
    largest_exponent,
    largest_log_ratio,
    log_at_least_tiny,
    mean_over,
    resolvent_fractions,
)
from negmaml.theory.isotropic.saddle_point import KappaRoot, TrainingSet, solve


class ScaledSystem(NamedTuple):
    """A `TrainingSet` in units in which kappa and the largest amplitude are one.

    Weight errors do not change with the unit of the filters and are quadratic in the amplitudes,
    so only a final result can overflow.

    p, m, n_v, weights: as in `TrainingSet`. sigma, offset: in these units.
    b: the filter on the nodes. Where b^2 is far above kappa, b and the amplitudes of that node are
        scaled down together.
    a: two arrays (..., k), the amplitudes by which task weights and label noise enter a task's
        residual. Its covariance is V = (nu^2/p) b^2 + sigma^2 q^2 x/n_t, the sum of a^2 (1).
    free, fitted: 1/(B + 1) and B/(B + 1).
    log_amplitude: logarithm of the unit of amplitudes, constant.
    """

    p: Any
    m: Any
    n_v: Any
    sigma: Any
    offset: Any
    weights: Any
    b: Any
    a: Any
    free: Any
    fitted: Any
    log_amplitude: Any

    @property
    def V(self):
        """The residual's covariance V on the nodes, equation (1)."""
        weights, labels = self.a[0], self.a[1]
        return weights * weights + labels * labels

    def mean(self, values):
        """Return int mu f for values of f on the nodes."""
        return mean_over(self.weights, values)


def rescale(training: TrainingSet, root: KappaRoot) -> ScaledSystem:
    """Return the training set in units of its root and of its largest amplitude."""
    # b is measured in units of sqrt(kappa).
    half = root.log_kappa / 2
    xp = namespace(half)
    top, most = largest_log_ratio(half) / 2, largest_exponent(half)
    least = 5 - most / 2  # smallest logarithm of a unit whose square does not underflow

    # Clipped, because infinite factors times zero would be NaN.
    def exp(x):
        return xp.exp(xp.clip(x, -most, most))

    # r and s come from logarithms, so they keep their digits however large B/kappa is.
    free, fitted = resolvent_fractions(training.log_b, root.log_kappa)
    log_size = training.log_b - half[..., None]
    capped = exp(xp.minimum(log_size, top))
    # Labels exp(scale - half), scaled down as much as `capped` is below the size of b.
    known = training.scale is None
    log_label = (
        -half[..., None]
        if known
        else training.scale - xp.maximum(half[..., None], training.log_b - top)
    )
    # The largest of three amplitudes: task weights through the filter, the start, the noise.
    largest = xp.maximum(
        xp.max(capped, -1) * training.task_std,
        xp.sqrt(stop_gradient(training.offset)) * xp.ones_like(half),
    )
    # In logarithms, since label filters of steep rules overflow.
    labels = log_at_least_tiny(xp.max(xp.abs(training.label), -1)) + xp.max(log_label, -1)
    noise = log_at_least_tiny(training.sigma) + xp.maximum(labels, -half)
    noise = xp.where(training.sigma > 0, noise, least)
    log_amplitude = stop_gradient(xp.maximum(xp.maximum(log_at_least_tiny(largest), noise), least))

    unit, sigma = exp(-log_amplitude), training.sigma[..., None]

    def of_noise(log):  # without noise its size may overflow, and infinity times zero is NaN
        return exp(xp.where(sigma > 0, log - log_amplitude[..., None], 0.0))

    label = training.label * of_noise(log_label)
    if known:
        label = label * exp(-xp.maximum(log_size - top, 0.0))
    b = training.sign * capped
    # Enough rows determine omega* without the starting point, unless a filter blocks a direction.
    rows = (training.p <= training.n_v * training.m) & (training.ridge == 0)
    reached = rows & (xp.min(xp.where(xp.isfinite(training.log_b), 1.0, 0.0), -1) > 0)
    a = (training.task_std * unit)[..., None] * b, sigma * label
    return ScaledSystem(
        training.p, training.m, training.n_v, (sigma * of_noise(-half[..., None]))[..., 0],
        xp.where(reached, 0.0, training.offset * unit * unit), training.weights, b, a, free, fitted,
        log_amplitude,
    )  # fmt: skip


class SaddleDerivatives(NamedTuple):
    """The functions t, K, g and u of equations (5) and (6) and their derivatives at kappa = 1.

    t1 to t3, K1 to K3, u1 to u3: first to third derivatives in kappa. l = -g'.
    k = 1 - m tau, so that K = k/g. w = int mu B/(B + kappa)^2. left = u - u'.
    bend, w_squared: int mu r^2 s (s - 2 r) and int mu r^2 s^2, r = 1/(B + 1) and s = 1 - r.
    """

    t: Any
    t1: Any
    t2: Any
    t3: Any
    K: Any
    K1: Any
    K2: Any
    K3: Any
    g: Any
    l: Any
    u: Any
    u1: Any
    u2: Any
    u3: Any
    k: Any
    w: Any
    left: Any
    bend: Any
    w_squared: Any

    @property
    def slope(self):
        """(t K)'."""
        return self.t1 * self.K + self.t * self.K1

    @property
    def slope1(self):
        """(t K)''."""
        return self.t2 * self.K + 2 * self.t1 * self.K1 + self.t * self.K2

    @property
    def slope2(self):
        """(t K)'''."""
        return self.t3 * self.K + 3 * (self.t2 * self.K1 + self.t1 * self.K2) + self.t * self.K3


def saddle_derivatives(system: ScaledSystem, root: KappaRoot) -> SaddleDerivatives:
    r"""Return the `SaddleDerivatives` at the root.

    Every integral over the spectrum is taken here, once: with r = 1/(B + 1) and s = 1 - r,
    w = int mu r s, u' = p int mu V s r and so on. The rest is arithmetic of scalars. Derivatives
    of K = k/g are variances of s,

        K' = k/g + (m - 1) w/g^2,    K'' = 2 (m - 1)/g^2 int mu r (s - w/g)^2,
    and the next is -6 (m - 1)/g^2 int mu r^2 (s - w/g)^2.
    """
    p, m, mean, t, k = system.p, system.m, system.mean, root.t, root.k
    r, s, V = system.free, system.fitted, system.V
    # Products of fractions in [0, 1]: no difference of large numbers occurs below.
    r_s = r * s
    r2_s = r * r_s
    noise = V * r_s
    g, w, w_r, w_rr = mean(r), mean(r_s), mean(r2_s), mean(r * r2_s)
    left, u1 = system.sigma**2 + p * mean(V * r * r), p * mean(noise)
    # Variances of s by their moments: w_s is mean r^2 s (1 - r) = mean r^2 s^2.
    over, share, l, w_s = (m - 1) / g / g, w / g, mean(r * r), w_r - w_rr
    return SaddleDerivatives(
        t, p * w, -2 * p * w_r, 6 * p * w_rr,
        k / g, k / g + over * w, 2 * over * (w - w_r - share * w),
        -6 * over * (w_s - 2 * share * w_r + share * share * l),
        g, l, left + u1, u1, -2 * p * mean(noise * r), 6 * p * mean(noise * r * r),
        k, w, left, w_r - 3 * w_rr, w_s,
    )  # fmt: skip


class SaddlePoint(NamedTuple):
    """A training set solved: its root, the rescaled system and the derivatives there.

    training: the training set. root: the root of its scalar equation.
    system: the training set in units of the root. at: the derivatives at the root.
    """

    training: TrainingSet
    root: KappaRoot
    system: ScaledSystem
    at: SaddleDerivatives


def solve_saddle(training: TrainingSet, ridged: bool) -> SaddlePoint:
    """Solve for the saddle point; `ridged` as in `negmaml.theory.isotropic.saddle_point.solve`."""
    root = solve(training, ridged)
    system = rescale(training, root)
    return SaddlePoint(training, root, system, saddle_derivatives(system, root))
