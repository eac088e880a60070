r"""The term of relative order 1/p after the limit: the Hessian at the saddle point.

Averaging det(Phi^T Phi + ridge)^{-1/2} over the data leaves an integral over a few order parameters
for every task. Its saddle point is the leading order and the determinant of its Hessian the next.
That determinant is, up to a constant, exp(2 F) with F of equation (8) in
negmaml/theory/isotropic.md:

    F = -m log c + m log(1 - rho) + (m - 1)/2 log|det| + 1/2 log|(m - 1) p det + m c^2 A|

eta is the source of the residual, rho that of the error on fresh query rows, both zero in the end.
`exponent` has F in the form (11), in which nothing cancels. At alpha_t = 0 the term is the first of
the expansion of the exact inverse-Wishart mean, N/(p - N - 1) = N/(p - N) (1 + 1/(p - N) + ...).
"""

from negmaml._core.taylor import Taylor
from negmaml.theory.isotropic.scaling import SaddleDerivatives, ScaledSystem

# The derivatives of F that are needed, in kappa (k), eta (e) and rho (r).
FOR_WEIGHT_ERROR = ("", "e", "k", "ek", "kk")
FOR_BOTH = (*FOR_WEIGHT_ERROR, "r", "er", "kr")


def first_order(system: ScaledSystem, at: SaddleDerivatives, with_task_error: bool):
    r"""Return the terms of relative order 1/p of the weight error and of the task error.

    with_task_error: False to return None for the task error.

    Equations (9) and (10): with psi = dF/deta along the saddle point at fixed ridge,
    chi = dF/dkappa / (tK)' and X = dF/drho - n_v K chi,

        D_1     = { (t psi)' - D2/p (t K)^2 chi' } / (tK)'
        tau_1^2 = { n_v (psi K' - psi' K) + (tK)' psi_rho - D2/p K^2 (X' t - X t') } / (m (tK)')

    A suffix _e is a derivative in eta, _r one in rho, and 1 one in kappa.
    """
    p, m, n_v, D2 = system.p, system.m, system.n_v, system.offset
    F = exponent(system, at, FOR_BOTH if with_task_error else FOR_WEIGHT_ERROR)
    slope, slope1 = at.slope, at.slope1
    t_e, t_e1 = -at.left, at.u2
    scale = (m - 1) / (p * at.g**2)
    K_e, K_e1 = scale * at.u1, scale * (at.u2 + 2 * at.u1 * at.l / at.g)

    # kappa_eta of (9) at rho = 0, and its derivative in kappa.
    top = t_e * at.K + at.t * K_e
    top1 = t_e1 * at.K + t_e * at.K1 + at.t1 * K_e + at.t * K_e1
    kappa_e = -top / slope
    kappa_e1 = -(top1 + kappa_e * slope1) / slope
    psi = F["e"] + F["k"] * kappa_e
    psi1 = F["ek"] + F["kk"] * kappa_e + F["k"] * kappa_e1
    chi = F["k"] / slope
    chi1 = (F["kk"] - chi * slope1) / slope
    weight_error = (at.t1 * psi + at.t * psi1 - D2 / p * (at.t * at.K) ** 2 * chi1) / slope
    if not with_task_error:
        return weight_error, None

    rho_er = -(t_e * at.K1 - at.t1 * K_e) / slope  # rho_eta is zero at rho = 0
    kappa_er = -n_v * (rho_er * at.K + K_e + kappa_e * at.K1) / slope
    psi_rho = F["er"] + F["kr"] * kappa_e + F["k"] * kappa_er + F["r"] * rho_er
    X, X1 = F["r"] - n_v * at.K * chi, F["kr"] - n_v * (at.K1 * chi + at.K * chi1)
    start = D2 / p * at.K**2 * (X1 * at.t - X * at.t1)
    task_error = n_v * (psi * at.K1 - psi1 * at.K) + slope * psi_rho - start
    return weight_error, task_error / (m * slope)


def exponent(system: ScaledSystem, at: SaddleDerivatives, kept: tuple[str, ...]) -> Taylor:
    r"""Return the derivatives of F in kappa, eta and rho at eta = rho = 0.

    The determinant and the last logarithm of (8) are differences of much larger numbers, and F does
    not depend on kappa where kappa is far above or below B. Hence (11), with d = -det:

        F = m log(1 - rho) + (m - 1)/2 log d/c^2 + 1/2 log S,     S = m A - (m - 1) p d/c^2

    and its pieces by (12), with f = kappa g, w = f', l = int mu (kappa/(B + kappa))^2 = f - kappa
    w:

        kappa^2 d/p = l t + p f kappa w      kappa c = p f           S = (t K)'
        S_eta = kappa^2 u'' {(m - 1) t + p f k}/(p f^2) + 2 (m - 1) kappa u' (kappa^2 d/p)/(p f^3)

    At kappa = 1, l' = -w' and (kappa^2 d/p)' = -w' t + p f (2 w + w').
    """
    p, m, n_v, t, k, f, w = system.p, system.m, system.n_v, at.t, at.k, at.g, at.w
    u1, u2, u3, E = at.u1, at.u2, at.u3, n_v - p
    l, w1 = at.l, at.t2 / p
    # c, det and S are the pieces of (12) at kappa = 1; det has 2 n_v rho p l to first order in rho.
    d, d1 = l * t + p * f * w, -w1 * t + p * f * (2 * w + w1)

    def series(**terms):
        return Taylor({name.strip("_"): x for name, x in terms.items()}, kept)

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
    log_one_minus_rho = series(r=-1.0)
    return m * log_one_minus_rho + (m - 1) * (0.5 * det.log() - c.log()) + 0.5 * S.log()
