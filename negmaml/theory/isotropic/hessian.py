r"""The term of relative order 1/p after the limit: the Hessian at the saddle point.

Averaging det(Phi^T Phi + ridge)^{-1/2} over the data leaves an integral over a
few order parameters for every task; its saddle point is the leading order and the determinant
of its Hessian the next. That determinant is, up to a constant, exp(2 F) with

    F = -m log c + m log(1 - rho) + (m - 1)/2 log|det| + 1/2 log|(m - 1) p det + m c^2 A|
    c   = p g + eta u'                      E = n_v/(1 - rho)^2 - p      a = p g' + eta u''
    det = a E - (p g)^2                     A = E + 2 kappa p g + kappa^2 a

eta is the source of the residual, rho that of the error on fresh query rows, both zero in the end.
`exponent` has it in a form in which nothing cancels.
At alpha_t = 0 the term is the first of the expansion of the exact inverse-Wishart mean,
N/(p - N - 1) = N/(p - N) (1 + 1/(p - N) + ...).
"""

from negmaml.theory.isotropic.scaling import Point, Seen
from negmaml.theory.isotropic.series import Series

# The derivatives of F that are wanted, in kappa (k), eta (e) and rho (r).
KEPT_FOR_DISTANCE = ("", "e", "k", "ek", "kk")
KEPT = (*KEPT_FOR_DISTANCE, "r", "er", "kr")


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
