r"""The proportional theory: distance and task error for every n_v m / p, rule and meta-ridge.

With kappa, g, t, K of `negmaml.theory.saddle`, u = sigma^2 + p int mu V kappa/(B + kappa) and
D2 = |omega_0 - w0|^2, and primes for derivatives in kappa,

    E|omega* - w0|^2 = { m (t u)' + D2 K^2 (g t' - g' t) } / (t K)'
    tau^2            = n_v/m { m (u K' - u' K) + D2 K^2 (g K)' } / (t K)'

to leading order for p, n_t and n_v m large at fixed ratios (`leading`), and the term of
relative order 1/p after it (`first_order`). negmaml/theory/proportional.md derives both.

**The 1/p term.** Averaging det(Phi^T Phi + ridge)^{-1/2} over the data leaves an integral over a
few order parameters for every task; its saddle point is the leading order and the determinant
of its Hessian the next. That determinant is, up to a constant, exp(2 F) with

    F = -m log c + m log(1 - rho) + (m - 1)/2 log|det| + 1/2 log|(m - 1) p det + m c^2 A|
    c   = p g + eta u'                      E = n_v/(1 - rho)^2 - p      a = p g' + eta u''
    det = a E - (p g)^2                     A = E + 2 kappa p g + kappa^2 a

eta is the source of the residual, rho that of the error on fresh query rows, both zero in the end.
`exponent` has it in a form in which nothing cancels.
At alpha_t = 0 the term is the first of the expansion of the exact inverse-Wishart mean,
N/(p - N - 1) = N/(p - N) (1 + 1/(p - N) + ...).

**Resummation.** That mean suggests how the series goes on: with x the 1/p term over the leading
one, 1/(1 - x) is exact there. A ridge takes the pole away, hence 1 + x/(1 - x s), where
s = ((t'K - tK')/(t'K + tK'))^2 is one without ridge and falls to zero where the ridge governs.
"""

import math
from typing import Any, NamedTuple

from negmaml._core.numerics import frozen, namespace
from negmaml.theory.saddle import (
    Root,
    TrainingSet,
    largest_exponent,
    largest_log_ratio,
    log_at_least_tiny,
    mean_over,
    shares,
    solve,
)
from negmaml.theory.series import Series

# The largest x s with ridge: beyond it the ridge alone keeps the mean finite, |n_v m - p| <= 2 and
# the ridge tiny, and no expansion in 1/p holds.
LARGEST_RIDGED_POLE = 0.5

# The derivatives of F that are wanted, in kappa (k), eta (e) and rho (r).
KEPT_FOR_DISTANCE = ("", "e", "k", "ek", "kk")
KEPT = (*KEPT_FOR_DISTANCE, "r", "er", "kr")


class Moments(NamedTuple):
    """distance: E|omega* - w0|^2. task_error: tau^2. limit: the leading distance. pole: x s.

    growth: distance/limit.
    """

    distance: Any
    task_error: Any
    limit: Any
    pole: Any
    growth: Any


def moments(tasks: TrainingSet, ridged: bool, with_error: bool = True) -> Moments:
    """The theory's means, with finite-size corrections; infinite where they do not exist.

    The task error is left out, None, unless wanted.
    """
    root = solve(tasks, ridged)
    seen = in_units(tasks, root)
    point = around(seen, root)
    limit, task_error, balance = leading(seen, point)
    distance_1, task_error_1 = first_order(seen, point, with_error)
    ridge = tasks.ridge > 0
    where, inf = namespace(limit).where, float("inf")
    noisy = (tasks.sigma > 0) | ((tasks.tasks > 0) & (tasks.m > 1))
    at_threshold = (abs(tasks.p - tasks.n_v * tasks.m) <= 1) & ~ridge & noisy
    growth, pole = _resummed(limit, distance_1, balance**2, ridge)
    growth = where(at_threshold, inf, growth)
    limit = squared_unit(limit, seen.log_amplitude)
    distance = _grown(limit, growth)
    if not with_error:
        return Moments(distance, None, limit, pole, growth)
    error_growth, _ = _resummed(task_error, task_error_1, balance**2, ridge)
    task_error = squared_unit(task_error, seen.log_amplitude + root.log_kappa / 2)
    task_error = _grown(task_error, where(at_threshold, inf, error_growth))
    return Moments(distance, task_error, limit, pole, growth)


def limit(tasks: TrainingSet, ridged: bool):
    """The distance of `leading` alone, with nothing of finite sizes."""
    root = solve(tasks, ridged)
    seen = in_units(tasks, root)
    return squared_unit(leading(seen, around(seen, root))[0], seen.log_amplitude)


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
    size = exp(tasks.log_b - half[..., None])
    capped = xp.minimum(size, math.exp(top))
    # The size of labels exp(scale - half), less in the ratio of `capped` to `size`.
    known = tasks.scale is None
    log_label = (
        -half[..., None] if known else tasks.scale - xp.maximum(half[..., None], tasks.log_b - top)
    )
    largest = xp.maximum(
        xp.max(capped, -1) * tasks.tasks, xp.sqrt(frozen(tasks.offset)) * xp.ones_like(half)
    )
    labels = log_at_least_tiny(xp.max(xp.abs(tasks.label), -1)) + xp.max(log_label, -1)
    log_amplitude = log_at_least_tiny(tasks.sigma) + xp.maximum(labels, -half)
    log_amplitude = xp.maximum(xp.maximum(log_at_least_tiny(largest), log_amplitude), least)
    log_amplitude = frozen(log_amplitude)

    unit = exp(-log_amplitude)
    label = tasks.label * exp(log_label - log_amplitude[..., None])
    if known:
        label = label * (capped / xp.where(capped > 0, size, 1.0))
    b = tasks.sign * capped
    # With rows enough nothing is left of the start, unless a filter lets a direction not pass.
    rows = (tasks.p <= tasks.n_v * tasks.m) & (tasks.ridge == 0)
    reached = rows & (xp.min(xp.where(xp.isfinite(tasks.log_b), 1.0, 0.0), -1) > 0)
    a = tasks.tasks * unit[..., None] * b, tasks.sigma * label
    return Seen(
        tasks.p, tasks.m, tasks.n_v, tasks.sigma * exp(-half - log_amplitude),
        xp.where(reached, 0.0, tasks.offset * unit * unit), tasks.weights, b, a, free, fitted,
        log_amplitude,
    )  # fmt: skip


def squared_unit(value, log_unit):
    """value exp(2 log_unit), infinite where it is too large for a number, zero where value is."""
    xp = namespace(value, log_unit)
    most = largest_exponent(log_unit)
    unit = xp.exp(xp.clip(log_unit, -most, most))
    return value * unit * unit


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


def leading(tasks: Seen, at: Point):
    """Distance and task error of the limit, and (t'K - tK')/(tK)'; equations at the head."""
    n_v, m, D2 = tasks.n_v, tasks.m, tasks.offset
    distance = m * (at.t1 * at.u + at.t * at.u1) + D2 * at.K**2 * (at.g * at.t1 + at.l * at.t)
    start = D2 * at.K**2 * at.w  # (g K)' = m w
    task_error = n_v * (at.u * at.K1 - at.u1 * at.K + start)
    return (
        distance / at.slope,
        task_error / at.slope,
        (at.t1 * at.K - at.t * at.K1) / at.slope,
    )


def first_order(tasks: Seen, at: Point, with_error: bool):
    r"""The terms of relative order 1/p of distance and, if wanted, task error.

    With psi = dF/deta along the saddle point at fixed ridge, chi = dF/dkappa / (tK)' and
    X = dF/drho - n_v K chi,

        distance:    { (t psi)' - D2/p (t K)^2 chi' } / (tK)'
        task error:  { n_v (psi K' - psi' K) + (tK)' psi_rho - D2/p K^2 (X' t - X t') } / (m (tK)')

    At fixed ridge t K and fixed weight rho t of the fresh rows, kappa and rho move with eta: it
    turns t into t + n_v rho/(1 - rho) - eta (u - kappa u') and K into K + eta (m - 1) u'/(p g^2).
    Hence

        kappa_eta = -((t_eta + n_v rho_eta) K + t K_eta)/(tK)'
        rho_eta   = -rho (t_eta K' - t' K_eta)/(tK)'
        psi       = F_eta + F_kappa kappa_eta + F_rho rho_eta.
    """
    p, m, n_v, D2 = tasks.p, tasks.m, tasks.n_v, tasks.offset
    F = exponent(tasks, at, KEPT if with_error else KEPT_FOR_DISTANCE)
    slope, slope1 = at.slope, at.slope1
    t_e, t_e1 = -at.left, at.u2
    scale = (m - 1) / (p * at.g**2)
    K_e, K_e1 = scale * at.u1, scale * (at.u2 + 2 * at.u1 * at.l / at.g)

    top = t_e * at.K + at.t * K_e
    top1 = t_e1 * at.K + t_e * at.K1 + at.t1 * K_e + at.t * K_e1
    kappa_e = -top / slope
    kappa_e1 = -(top1 + kappa_e * slope1) / slope
    psi = F["e"] + F["k"] * kappa_e
    psi1 = F["ek"] + F["kk"] * kappa_e + F["k"] * kappa_e1
    chi = F["k"] / slope
    chi1 = (F["kk"] - chi * slope1) / slope
    distance = (at.t1 * psi + at.t * psi1 - D2 / p * (at.t * at.K) ** 2 * chi1) / slope
    if not with_error:
        return distance, None

    rho_er = -(t_e * at.K1 - at.t1 * K_e) / slope  # rho_eta is zero at rho = 0
    kappa_er = -n_v * (rho_er * at.K + K_e + kappa_e * at.K1) / slope
    psi_rho = F["er"] + F["kr"] * kappa_e + F["k"] * kappa_er + F["r"] * rho_er
    X, X1 = F["r"] - n_v * at.K * chi, F["kr"] - n_v * (at.K1 * chi + at.K * chi1)
    start = D2 / p * at.K**2 * (X1 * at.t - X * at.t1)
    task_error = n_v * (psi * at.K1 - psi1 * at.K) + slope * psi_rho - start
    return distance, task_error / (m * slope)


def exponent(tasks: Seen, at: Point, kept: tuple[str, ...]) -> Series:
    r"""F of this module's head: its derivatives in kappa, eta and rho at eta = rho = 0.

    The determinant and the last logarithm are differences of much larger numbers, and F does not
    feel kappa itself where it is far above or below B. Hence

        F = m log(1 - rho) + (m - 1)/2 log d/c^2 + 1/2 log S,     d = -det
        S = m A - (m - 1) p d/c^2

    and with f = kappa g, w = f', l = int mu (kappa/(B + kappa))^2 = f - kappa w, for every kappa

        kappa^2 d/p = l t + p f kappa w      kappa c = p f           S = (t K)'
        S_eta = kappa^2 u'' {(m - 1) t + p f k}/(p f^2) + 2 (m - 1) kappa u' (kappa^2 d/p)/(p f^3)

    where nothing is lost. l' = -w' and (kappa^2 d/p)' = -w' t + p f (2 w + w') at kappa = 1.
    """
    p, m, n_v, t, k, f, w = tasks.p, tasks.m, tasks.n_v, at.t, at.k, at.g, at.w
    u1, u2, u3, E = at.u1, at.u2, at.u3, n_v - p
    l, w1 = at.l, at.t2 / p
    d, d1 = l * t + p * f * w, -w1 * t + p * f * (2 * w + w1)

    def series(**terms):
        return Series({name.strip("_"): x for name, x in terms.items()}, kept)

    c = series(_=p * f, k=p * w, kk=p * w1, e=u1, ek=u1 + u2)
    det = series(
        _=p * d, k=p * d1, kk=2 * p * (at.bend * t + p * (w * w - 3 * f * at.w_squared)),
        e=-u2 * E, ek=-(2 * u2 + u3) * E, r=2 * n_v * p * l, er=-2 * n_v * u2, kr=-2 * n_v * p * w1,
    )  # fmt: skip
    G, over = (m - 1) * t + p * f * k, 1 / (p * f * f)
    twice = 2 * (m - 1) * over / f
    S = series(
        _=at.slope, k=at.slope1, kk=at.slope2,
        e=over * u2 * G + twice * u1 * d,
        ek=over * ((2 * u2 + u3) * G + 2 * u2 * w * (m * p * f - G / f))
        + twice * ((u1 + u2) * d + u1 * (d1 - 3 * d * w / f)),
        r=2 * n_v * at.K1, kr=2 * n_v * at.K2, er=n_v * twice * (f * u2 + 2 * u1 * l),
    )  # fmt: skip
    fresh = series(r=-1.0)
    return m * fresh + (m - 1) * (0.5 * det.log() - c.log()) + 0.5 * S.log()


def _resummed(leading, first, fade, ridged):
    """1 + x/(1 - x s) and x s, with x = first/leading and s = `fade`."""
    xp = namespace(leading)
    x = xp.where(leading == 0, 0.0, first / xp.where(leading == 0, 1.0, leading))
    pole = xp.where(x > 0, x * fade, x)
    pole = xp.where(ridged, xp.minimum(pole, LARGEST_RIDGED_POLE), pole)
    beyond = pole >= 1
    factor = 1 + x / (1 - xp.where(beyond, 0.0, pole))
    return xp.where(beyond, float("inf"), factor), pole


def _grown(value, growth):
    """value growth, zero where value is zero.

    Infinite where it is below zero: for p of a few the 1/p term of the spectrum is not positive,
    and next to the pole of a filter integrals over it mean nothing.
    """
    xp = namespace(value)
    grown = xp.where(value == 0, value, value * xp.where(value == 0, 1.0, growth))
    return xp.where(grown < 0, xp.inf, grown)
