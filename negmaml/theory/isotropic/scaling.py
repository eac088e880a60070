"""A training set seen from its root: everything in units in which kappa is one.

`around` takes the integrals over the spectrum; `negmaml.theory.isotropic.moments` and `.hessian`
make the theory's numbers of them.
"""

from typing import Any, NamedTuple

from negmaml._core.arrays import namespace, stop_gradient
from negmaml.theory.isotropic.logarithms import (
    largest_exponent,
    largest_log_ratio,
    log_at_least_tiny,
    mean_over,
    shares,
)
from negmaml.theory.isotropic.saddle_point import Root, TrainingSet, solve


class Seen(NamedTuple):
    """A `TrainingSet` in units in which kappa is one, and the largest amplitude.

    Distances do not change with the unit of the filters, and are quadratic in the amplitudes. So
    nothing overflows but what is asked for.

    p, m, n_v, weights: as there. sigma, offset: in these units.
    b: the filter on the nodes; where b^2 is far above kappa less, with all else of that node.
    a: two of (..., k), the amplitudes by which task weights and label noise enter a task's
        residual: its covariance is V = (nu^2/p) b^2 + sigma^2 q^2 x/n_t = sum of a^2.
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
        """The residual's covariance on the nodes."""
        tasks, labels = self.a[0], self.a[1]
        return tasks * tasks + labels * labels

    def mean(self, values):
        """int mu f of values on the nodes."""
        return mean_over(self.weights, values)


def in_units(tasks: TrainingSet, root: Root) -> Seen:
    """The training set as seen from its root."""
    half = root.log_kappa / 2
    xp = namespace(half)
    top, most = largest_log_ratio(half) / 2, largest_exponent(half)
    least = 5 - most / 2  # of the unit of amplitudes, for its square to be a number

    def exp(x):
        return xp.exp(xp.clip(x, -most, most))

    free, fitted = shares(tasks.log_b, root.log_kappa)
    log_size = tasks.log_b - half[..., None]
    capped = exp(xp.minimum(log_size, top))
    # The size of labels exp(scale - half), less in the ratio of `capped` to the size of b.
    known = tasks.scale is None
    log_label = (
        -half[..., None] if known else tasks.scale - xp.maximum(half[..., None], tasks.log_b - top)
    )
    largest = xp.maximum(
        xp.max(capped, -1) * tasks.tasks, xp.sqrt(stop_gradient(tasks.offset)) * xp.ones_like(half)
    )
    labels = log_at_least_tiny(xp.max(xp.abs(tasks.label), -1)) + xp.max(log_label, -1)
    noise = log_at_least_tiny(tasks.sigma) + xp.maximum(labels, -half)
    noise = xp.where(tasks.sigma > 0, noise, least)
    log_amplitude = stop_gradient(xp.maximum(xp.maximum(log_at_least_tiny(largest), noise), least))

    unit, sigma = exp(-log_amplitude), tasks.sigma[..., None]

    def of_noise(log):  # where there is none its size is no number, times zero
        return exp(xp.where(sigma > 0, log - log_amplitude[..., None], 0.0))

    label = tasks.label * of_noise(log_label)
    if known:
        label = label * exp(-xp.maximum(log_size - top, 0.0))
    b = tasks.sign * capped
    # With rows enough nothing is left of the start, unless a filter lets a direction not pass.
    rows = (tasks.p <= tasks.n_v * tasks.m) & (tasks.ridge == 0)
    reached = rows & (xp.min(xp.where(xp.isfinite(tasks.log_b), 1.0, 0.0), -1) > 0)
    a = (tasks.tasks * unit)[..., None] * b, sigma * label
    return Seen(
        tasks.p, tasks.m, tasks.n_v, (sigma * of_noise(-half[..., None]))[..., 0],
        xp.where(reached, 0.0, tasks.offset * unit * unit), tasks.weights, b, a, free, fitted,
        log_amplitude,
    )  # fmt: skip


class Point(NamedTuple):
    """What the theory needs at kappa = 1: t, K, g and u, and derivatives in kappa (t1, ...).

    w = int mu B/(B + kappa)^2. l = -g'. k = 1 - m tau, so that K = k/g. left = u - u'.
    bend, w_squared: int mu r^2 s (s - 2 r) and r^2 s^2, r = 1/(B + 1) and s = 1 - r.
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


def around(tasks: Seen, root: Root) -> Point:
    r"""The `Point` at the root.

    The integrals over the spectrum are taken here, once: with r = 1/(B + 1) and s = 1 - r,
    w = int mu r s, u' = p int mu V s r and so on. All else is arithmetic of scalars. Derivatives
    of K = k/g are variances of s,

        K' = k/g + (m - 1) w/g^2,    K'' = 2 (m - 1)/g^2 int mu r (s - w/g)^2,
        and the next -6 (m - 1)/g^2 int mu r^2 (s - w/g)^2.
    """
    p, m, mean, t, k = tasks.p, tasks.m, tasks.mean, root.t, root.k
    r, s, V = tasks.free, tasks.fitted, tasks.V
    r_s = r * s
    r2_s = r * r_s
    noise = V * r_s
    g, w, w_r, w_rr = mean(r), mean(r_s), mean(r2_s), mean(r * r2_s)
    left, u1 = tasks.sigma**2 + p * mean(V * r * r), p * mean(noise)
    over, share, l, w_s = (m - 1) / g / g, w / g, mean(r * r), w_r - w_rr
    return Point(
        t, p * w, -2 * p * w_r, 6 * p * w_rr,
        k / g, k / g + over * w, 2 * over * (w - w_r - share * w),
        -6 * over * (w_s - 2 * share * w_r + share * share * l),
        g, l, left + u1, u1, -2 * p * mean(noise * r), 6 * p * mean(noise * r * r),
        k, w, left, w_r - 3 * w_rr, w_s,
    )  # fmt: skip


class Solved(NamedTuple):
    """A training set, its root, and what follows of both."""

    tasks: TrainingSet
    root: Root
    seen: Seen
    point: Point


def solved(tasks: TrainingSet, ridged: bool) -> Solved:
    """The root of a training set, and the set seen from it; `ridged`: as in `saddle.solve`."""
    root = solve(tasks, ridged)
    seen = in_units(tasks, root)
    return Solved(tasks, root, seen, around(seen, root))
