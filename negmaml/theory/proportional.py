r"""The proportional theory: distance and task error for every n_v m / p, every rule, any meta-ridge.

With kappa, g, t, K of `negmaml.theory.saddle`, u = sigma^2 + p int mu V kappa/(B + kappa) and
D2 = |omega_0 - w0|^2, and primes for derivatives in kappa,

    E|omega* - w0|^2 = { m (t u)' + D2 K^2 (g t' - g' t) } / (t K)'
    tau^2            = n_v/m { m (u K' - u' K) + D2 K^2 (g K)' } / (t K)'

to leading order for p, n_t and n_v m large at fixed ratios (`leading`), and the term of relative
order 1/p after it (`first_order`). docs/proportional.md derives both.

**The 1/p term.** Averaging det(Phi^T Phi + ridge)^{-1/2} over the data leaves an integral over a few
order parameters for every task; its saddle point is the leading order and the determinant of its
Hessian the next. That determinant is, up to a constant, exp(2 F) with

    F = -m log c + m log(1 - rho) + (m - 1)/2 log|det| + 1/2 log|(m - 1) p det + m c^2 A|
    c   = p g + eta u'                      E = n_v/(1 - rho)^2 - p      a = p g' + eta u''
    det = a E - (p g)^2                     A = E + 2 kappa p g + kappa^2 a

eta is the source of the residual, rho that of the error on fresh query rows, both zero in the end.
At alpha_t = 0 the term is the first of the expansion of the exact inverse-Wishart mean,
N/(p - N - 1) = N/(p - N) (1 + 1/(p - N) + ...).

**Resummation.** That mean suggests how the series goes on: with x the 1/p term over the leading one,
1/(1 - x) is exact there. A ridge takes the pole away, hence 1 + x/(1 - x s), where
s = ((t'K - tK')/(t'K + tK'))^2 is one without ridge and falls to zero where the ridge governs.
"""

import jax
import jax.numpy as jnp

from negmaml.theory.saddle import Tasks, derivative, solve

# The largest x s with ridge: beyond it the ridge alone keeps the mean finite, |n_v m - p| <= 2 and
# the ridge tiny, and no expansion in 1/p holds.
LARGEST_RIDGED_POLE = 0.5


def moments(tasks: Tasks, ridged: bool):
    """(E|omega* - w0|^2, tau^2, the pole x s of the distance) with finite-size corrections."""
    kappa = solve(tasks, ridged)
    distance, task_error, balance = leading(tasks, kappa)
    distance_1, task_error_1 = first_order(tasks, kappa)
    at_threshold = (tasks.p == tasks.n_v * tasks.m) & (tasks.ridge == 0)
    infinite = jnp.where(at_threshold, jnp.inf, 1)
    distance, pole = _resummed(distance, distance_1, balance**2, tasks.ridge > 0)
    task_error, _ = _resummed(task_error, task_error_1, balance**2, tasks.ridge > 0)
    return distance * infinite, task_error * tasks.unit**2 * infinite, pole


def leading(tasks: Tasks, kappa):
    """Distance and task error of the limit, and (t'K - tK')/(tK)'; equations at the module's head."""
    m, D2 = tasks.m, tasks.offset
    (g, dg), (t, dt), (K, dK), (u, du) = (
        derivative(f, kappa) for f in (tasks.g, tasks.t, tasks.K, tasks.noise)
    )
    slope = dt * K + t * dK
    distance = m * (dt * u + t * du) + D2 * K**2 * (g * dt - dg * t)
    task_error = tasks.n_v * (u * dK - du * K + D2 / m * K**2 * (g * dK + dg * K))
    return distance / slope, task_error / slope, (dt * K - t * dK) / slope


def first_order(tasks: Tasks, kappa):
    r"""The terms of relative order 1/p of distance and task error.

    With psi = dF/deta and chi = dF/dkappa along the saddle point at fixed ridge,

        distance:    { (t psi)' - D2/p (t K)^2 (chi/(tK)')' } / (tK)'
        task error:  { n_v (psi K' - psi' K)/m + (tK)' psi_rho/m
                       - D2/(p m) K^2 (X' t - X t') } / (tK)',  X = dF/drho - n_v K chi/(tK)'
    """
    p, m, n_v, D2 = tasks.p, tasks.m, tasks.n_v, tasks.offset
    zero = jnp.zeros_like(kappa)

    def F(kappa, rho, eta):
        g, u1, u2 = (f(tasks, kappa) for f in (Tasks.g, _u1, _u2))
        E = n_v / (1 - rho) ** 2 - p
        c = p * g + eta * u1
        a = eta * u2 - p * _g2(tasks, kappa)
        det = a * E - (p * g) ** 2
        A = E + 2 * kappa * p * g + kappa**2 * a
        logs = (m - 1) / 2 * _log(det) + _log((m - 1) * p * det + m * c**2 * A) / 2
        return logs - m * _log(c) + m * jnp.log1p(-rho)

    def psi(kappa, rho):
        """dF/deta at fixed ridge t K and fixed weight rho t of the fresh rows.

        With eta, t becomes t - eta y, y = u - kappa u', and K becomes K + eta (m-1) u'/(p g^2).
        """
        g, u1 = tasks.g(kappa), _u1(tasks, kappa)
        t, dt = derivative(tasks.t, kappa)
        K, dK = derivative(tasks.K, kappa)
        t = t + n_v * rho / (1 - rho)
        t_eta = kappa * u1 - tasks.noise(kappa)
        K_eta = (m - 1) * u1 / (p * g**2)
        slope = dt * K + t * dK
        kappa_eta = -(t_eta * K + t * K_eta) / slope
        rho_eta = -rho * (t_eta * dK - dt * K_eta) / slope
        tangents = (kappa_eta, rho_eta, jnp.ones_like(kappa))
        return jax.jvp(F, (kappa, rho, zero), tangents)[1]

    def along(kappa):
        """psi, chi/(tK)' and X as functions of kappa at rho = 0."""
        slope = derivative(lambda k: tasks.t(k) * tasks.K(k), kappa)[1]
        chi, F_rho = jax.jvp(F, (kappa, zero, zero), (zero + 1, zero, zero))[1], None
        F_rho = jax.jvp(F, (kappa, zero, zero), (zero, zero + 1, zero))[1]
        rate = chi / slope
        return psi(kappa, zero), rate, F_rho - n_v * tasks.K(kappa) * rate

    (source, _, X), (d_source, d_rate, dX) = derivative(along, kappa)
    psi_rho = derivative(lambda rho: psi(kappa, rho), zero)[1]
    (t, dt), (K, dK) = (derivative(f, kappa) for f in (tasks.t, tasks.K))
    slope = dt * K + t * dK
    distance = dt * source + t * d_source - D2 / p * (t * K) ** 2 * d_rate
    task_error = n_v * (source * dK - d_source * K) + slope * psi_rho
    task_error = task_error - D2 / p * K**2 * (dX * t - X * dt)
    return distance / slope, task_error / m / slope


def _resummed(leading, first, fade, ridged):
    """leading (1 + x/(1 - x s)) and x s, with x = first/leading and s = `fade`."""
    x = jnp.where(leading == 0, 0, first / jnp.where(leading == 0, 1, leading))
    pole = jnp.where(x > 0, x * fade, x)
    pole = jnp.where(ridged, jnp.minimum(pole, LARGEST_RIDGED_POLE), pole)
    beyond = pole >= 1
    factor = 1 + x / (1 - jnp.where(beyond, 0, pole))
    return jnp.where(beyond, jnp.inf, leading * factor), pole


def _g2(tasks: Tasks, kappa):
    """-g' = int mu/(B + kappa)^2."""
    return tasks.weights @ (tasks.B + kappa) ** -2


def _u1(tasks: Tasks, kappa):
    """u' = p int mu V B/(B + kappa)^2."""
    return tasks.p * (tasks.weights @ (tasks.V * tasks.B / (tasks.B + kappa) ** 2))


def _u2(tasks: Tasks, kappa):
    """u'' = -2 p int mu V B/(B + kappa)^3."""
    return -2 * tasks.p * (tasks.weights @ (tasks.V * tasks.B / (tasks.B + kappa) ** 3))


def _log(x):
    return jnp.log(jnp.abs(x))
