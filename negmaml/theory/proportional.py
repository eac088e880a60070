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
At alpha_t = 0 the term is the first of the expansion of the exact inverse-Wishart mean,
N/(p - N - 1) = N/(p - N) (1 + 1/(p - N) + ...).

**Resummation.** That mean suggests how the series goes on: with x the 1/p term over the leading
one, 1/(1 - x) is exact there. A ridge takes the pole away, hence 1 + x/(1 - x s), where
s = ((t'K - tK')/(t'K + tK'))^2 is one without ridge and falls to zero where the ridge governs.
"""

from typing import Any, NamedTuple

from negmaml._core.numerics import frozen, namespace
from negmaml.theory.saddle import TrainingSet, solve
from negmaml.theory.series import Series

# The largest x s with ridge: beyond it the ridge alone keeps the mean finite, |n_v m - p| <= 2 and
# the ridge tiny, and no expansion in 1/p holds.
LARGEST_RIDGED_POLE = 0.5

# The derivatives of F that are wanted, in kappa (k), eta (e) and rho (r).
KEPT_FOR_DISTANCE = ("", "e", "k", "ek", "kk")
KEPT = (*KEPT_FOR_DISTANCE, "r", "er", "kr")


class Moments(NamedTuple):
    """distance: E|omega* - w0|^2. task_error: tau^2. limit: the leading distance. pole: x s."""

    distance: Any
    task_error: Any
    limit: Any
    pole: Any


def moments(tasks: TrainingSet, ridged: bool, with_error: bool = True) -> Moments:
    """The theory's means, with finite-size corrections; infinite where they do not exist.

    The task error is left out, None, unless wanted.
    """
    kappa = solve(tasks, ridged)
    tasks, kappa = in_units_of(kappa, tasks)
    point = around(tasks, kappa)
    limit, task_error, balance = leading(tasks, point)
    distance_1, task_error_1 = first_order(tasks, point, with_error)
    at_threshold = (tasks.p == tasks.n_v * tasks.m) & (tasks.ridge == 0)
    distance, pole = _resummed(limit, distance_1, balance**2, tasks.ridge > 0)
    where, inf = namespace(kappa).where, float("inf")
    distance = where(at_threshold, inf, distance)
    if not with_error:
        return Moments(distance, None, limit, pole)
    task_error, _ = _resummed(task_error, task_error_1, balance**2, tasks.ridge > 0)
    return Moments(distance, where(at_threshold, inf, task_error * tasks.unit**2), limit, pole)


def limit(tasks: TrainingSet, ridged: bool):
    """The distance of `leading` alone, with nothing of finite sizes."""
    tasks, kappa = in_units_of(solve(tasks, ridged), tasks)
    return leading(tasks, around(tasks, kappa))[0]


def in_units_of(kappa, tasks: TrainingSet) -> tuple[TrainingSet, Any]:
    """Tasks and kappa in units in which kappa is one, so that no power of it overflows."""
    xp = namespace(kappa)
    root = frozen(xp.sqrt(xp.where(kappa > 0, kappa, 1.0)))
    tasks = tasks._replace(
        b=tasks.b / root[..., None],
        a=tuple(amplitude / root[..., None] for amplitude in tasks.a),
        sigma=tasks.sigma / root,
        ridge=tasks.ridge / root / root,
        unit=tasks.unit * root,
    )
    return tasks, kappa / root / root


class Point(NamedTuple):
    """What the theory needs at kappa: t, K, g and u, and derivatives of each in kappa (t1, ...)."""

    kappa: Any
    t: Any
    t1: Any
    t2: Any
    K: Any
    K1: Any
    K2: Any
    g: Any
    g1: Any
    g2: Any
    g3: Any
    u: Any
    u1: Any
    u2: Any
    u3: Any

    @property
    def slope(self):
        """(t K)'."""
        return self.t1 * self.K + self.t * self.K1


def around(tasks: TrainingSet, kappa) -> Point:
    """The `Point` at kappa.

    The integrals over the spectrum are taken here, once: g' = -int mu/(B + kappa)^2 and so on,
    u' = p int mu V B/(B + kappa)^2 and so on. All else is arithmetic of scalars.
    """
    p, m, mean = tasks.p, tasks.m, tasks.mean
    B, V = tasks.B, tasks.V
    inverse = 1 / (B + kappa[..., None])
    square = inverse * inverse
    cube = square * inverse
    noise = V * B
    g, g1, g2, g3 = mean(inverse), -mean(square), 2 * mean(cube), -6 * mean(square * square)
    return Point(
        kappa,
        tasks.n_v - p * mean(B * inverse), p * mean(B * square), -2 * p * mean(B * cube),
        m * kappa - (m - 1) / g,
        m + (m - 1) * g1 / g**2,
        (m - 1) * (g2 - 2 * g1 * g1 / g) / g**2,
        g, g1, g2, g3,
        tasks.sigma**2 + p * kappa * mean(V * inverse),
        p * mean(noise * square), -2 * p * mean(noise * cube),
        6 * p * mean(noise * square * square),
    )  # fmt: skip


def leading(tasks: TrainingSet, at: Point):
    """Distance and task error of the limit, and (t'K - tK')/(tK)'; equations at the head."""
    n_v, m, D2 = tasks.n_v, tasks.m, tasks.offset
    distance = m * (at.t1 * at.u + at.t * at.u1) + D2 * at.K**2 * (at.g * at.t1 - at.g1 * at.t)
    start = D2 / m * at.K**2 * (at.g * at.K1 + at.g1 * at.K)
    task_error = n_v * (at.u * at.K1 - at.u1 * at.K + start)
    return (
        distance / at.slope,
        task_error / at.slope,
        (at.t1 * at.K - at.t * at.K1) / at.slope,
    )


def first_order(tasks: TrainingSet, at: Point, with_error: bool):
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
    slope, slope1 = at.slope, at.t2 * at.K + 2 * at.t1 * at.K1 + at.t * at.K2
    t_e, t_e1 = at.kappa * at.u1 - at.u, at.kappa * at.u2
    scale = (m - 1) / (p * at.g**2)
    K_e, K_e1 = scale * at.u1, scale * (at.u2 - 2 * at.u1 * at.g1 / at.g)

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


def exponent(tasks: TrainingSet, at: Point, kept: tuple[str, ...]) -> Series:
    """F of this module's head: its derivatives in kappa, eta and rho at eta = rho = 0."""
    p, m, n_v = tasks.p, tasks.m, tasks.n_v
    g = [p * x for x in (at.g, at.g1, at.g2, at.g3)]

    def series(**terms):
        return Series({name.strip("_"): x for name, x in terms.items()}, kept)

    kappa = series(_=at.kappa, k=1.0)
    E = series(_=n_v - p, r=2 * n_v)
    plain = series(_=g[0], k=g[1], kk=g[2])
    c = plain + series(e=at.u1, ek=at.u2)
    a = series(_=g[1], k=g[2], kk=g[3], e=at.u2, ek=at.u3)
    det = a * E - plain * plain
    A = E + 2.0 * (kappa * plain) + kappa * (kappa * a)
    M = (m - 1) * p * det + m * (c * (c * A))
    fresh = series(r=-1.0)
    return m * (fresh - c.log()) + (m - 1) / 2 * det.log() + 0.5 * M.log()


def _resummed(leading, first, fade, ridged):
    """leading (1 + x/(1 - x s)) and x s, with x = first/leading and s = `fade`."""
    xp = namespace(leading)
    x = xp.where(leading == 0, 0.0, first / xp.where(leading == 0, 1.0, leading))
    pole = xp.where(x > 0, x * fade, x)
    pole = xp.where(ridged, xp.minimum(pole, LARGEST_RIDGED_POLE), pole)
    beyond = pole >= 1
    factor = 1 + x / (1 - xp.where(beyond, 0.0, pole))
    return xp.where(beyond, float("inf"), leading * factor), pole
