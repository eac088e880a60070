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

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from negmaml.theory.saddle import TrainingSet, derivative, solve

# The largest x s with ridge: beyond it the ridge alone keeps the mean finite, |n_v m - p| <= 2 and
# the ridge tiny, and no expansion in 1/p holds.
LARGEST_RIDGED_POLE = 0.5


class Moments(NamedTuple):
    """distance: E|omega* - w0|^2. task_error: tau^2. limit: the leading distance. pole: x s."""

    distance: jax.Array
    task_error: jax.Array
    limit: jax.Array
    pole: jax.Array


def moments(tasks: TrainingSet, ridged: bool) -> Moments:
    """The theory's means, with finite-size corrections; infinite where they do not exist."""
    kappa = solve(tasks, ridged)
    tasks, kappa = in_units_of(kappa, tasks)
    point, velocity = around(tasks, kappa)
    limit, task_error, balance = leading(tasks, point, velocity)
    distance_1, task_error_1 = first_order(tasks, point, velocity)
    at_threshold = (tasks.p == tasks.n_v * tasks.m) & (tasks.ridge == 0)
    distance, pole = _resummed(limit, distance_1, balance**2, tasks.ridge > 0)
    task_error, _ = _resummed(task_error, task_error_1, balance**2, tasks.ridge > 0)
    task_error = task_error * tasks.unit**2
    distance, task_error = (jnp.where(at_threshold, jnp.inf, x) for x in (distance, task_error))
    return Moments(distance, task_error, limit, pole)


def in_units_of(kappa, tasks: TrainingSet) -> tuple[TrainingSet, jax.Array]:
    """Tasks and kappa in units in which kappa is one, so that no power of it overflows."""
    root = jnp.sqrt(lax.stop_gradient(jnp.where(kappa > 0, kappa, 1)))
    tasks = tasks._replace(
        b=tasks.b / root,
        a=tasks.a / root,
        sigma=tasks.sigma / root,
        ridge=tasks.ridge / root / root,
        unit=tasks.unit * root,
    )
    return tasks, kappa / root / root


class Point(NamedTuple):
    """What the theory needs at kappa: t, g and u with two derivatives of each, all scalars."""

    kappa: jax.Array
    t: jax.Array
    g: jax.Array
    g1: jax.Array
    g2: jax.Array
    u: jax.Array
    u1: jax.Array
    u2: jax.Array


def around(tasks: TrainingSet, kappa) -> tuple[Point, Point]:
    """The `Point` at kappa and its derivative in kappa.

    The integrals over the spectrum are taken here, once: g' = -int mu/(B + kappa)^2 and so on,
    u' = p int mu V B/(B + kappa)^2 and so on. All else is arithmetic of scalars.
    """
    p, inverse = tasks.p, 1 / (tasks.B + kappa)
    powers, noises = [inverse], [tasks.V * tasks.B * inverse**2]
    for j in (1, 2, 3):
        powers.append(-j * powers[-1] * inverse)
        noises.append(-(j + 1) * noises[-1] * inverse)
    g, g1, g2, g3 = (tasks.mean(values) for values in powers)
    u1, u2, u3 = (p * tasks.mean(values) for values in noises[:3])
    point = Point(kappa, tasks.t(kappa), g, g1, g2, tasks.noise(kappa), u1, u2)
    return point, Point(jnp.ones_like(kappa), p * (g + kappa * g1), g1, g2, g3, u1, u2, u3)


def ridge_felt(m, point: Point):
    """(K, K') of K = m kappa - (m - 1)/g."""
    return m * point.kappa - (m - 1) / point.g, m + (m - 1) * point.g1 / point.g**2


def leading(tasks: TrainingSet, point: Point, velocity: Point):
    """Distance and task error of the limit, and (t'K - tK')/(tK)'; equations at the head."""
    n_v, m, D2 = tasks.n_v, tasks.m, tasks.offset
    (t, g, u), (dt, dg, du) = ((x.t, x.g, x.u) for x in (point, velocity))
    K, dK = ridge_felt(m, point)
    slope = dt * K + t * dK
    distance = m * (dt * u + t * du) + D2 * K**2 * (g * dt - dg * t)
    task_error = n_v * (u * dK - du * K + D2 / m * K**2 * (g * dK + dg * K))
    return distance / slope, task_error / slope, (dt * K - t * dK) / slope


def first_order(tasks: TrainingSet, point: Point, velocity: Point):
    r"""The terms of relative order 1/p of distance and task error.

    With psi = dF/deta along the saddle point at fixed ridge, chi = dF/dkappa / (tK)' and
    X = dF/drho - n_v K chi,

        distance:    { (t psi)' - D2/p (t K)^2 chi' } / (tK)'
        task error:  { n_v (psi K' - psi' K) + (tK)' psi_rho - D2/p K^2 (X' t - X t') } / (m (tK)')
    """
    p, m, n_v, D2 = tasks.p, tasks.m, tasks.n_v, tasks.offset
    rho = jnp.zeros_like(point.kappa)
    (psi, _, X), (dpsi, dchi, dX) = jax.jvp(
        lambda at: sources(tasks, at, rho), (point,), (velocity,)
    )
    psi_rho = derivative(lambda rho: sources(tasks, point, rho)[0], rho)[1]
    (t, dt), (K, dK) = (point.t, velocity.t), ridge_felt(m, point)
    slope = dt * K + t * dK
    distance = dt * psi + t * dpsi - D2 / p * (t * K) ** 2 * dchi
    task_error = n_v * (psi * dK - dpsi * K) + slope * psi_rho - D2 / p * K**2 * (dX * t - X * dt)
    return distance / slope, task_error / (m * slope)


def sources(tasks: TrainingSet, point: Point, rho):
    """psi, chi and X of `first_order`: the derivatives of F at eta = 0."""
    p, m, n_v = tasks.p, tasks.m, tasks.n_v
    x, t, g, g1, g2, u, u1, u2 = point
    E, E_rho = n_v / (1 - rho) ** 2 - p, 2 * n_v / (1 - rho) ** 3
    det = p * g1 * E - (p * g) ** 2
    A = E + 2 * x * p * g + x**2 * p * g1
    M = (m - 1) * p * det + m * (p * g) ** 2 * A

    def slope_of_F(det_, M_):
        return (m - 1) / 2 * det_ / det + M_ / M / 2

    det_x = p * g2 * E - 2 * p**2 * g * g1
    A_x = p * (2 * g + 4 * x * g1 + x**2 * g2)
    M_x = (m - 1) * p * det_x + m * p**2 * g * (2 * g1 * A + g * A_x)
    F_x = slope_of_F(det_x, M_x) - m * g1 / g
    det_rho = p * g1 * E_rho
    F_rho = slope_of_F(det_rho, (m - 1) * p * det_rho + m * (p * g) ** 2 * E_rho) - m / (1 - rho)
    det_eta = E * u2
    M_eta = (m - 1) * p * det_eta + m * p * g * (2 * u1 * A + p * g * x**2 * u2)
    F_eta = slope_of_F(det_eta, M_eta) - m * u1 / (p * g)

    # At fixed ridge t K and fixed weight rho t of the fresh rows, kappa and rho move with eta: it
    # turns t into t - eta (u - x u') and K into K + eta (m - 1) u'/(p g^2).
    t, dt = t + n_v * rho / (1 - rho), p * (g + x * g1)
    K, dK = ridge_felt(m, point)
    t_eta, K_eta = x * u1 - u, (m - 1) * u1 / (p * g**2)
    slope = dt * K + t * dK
    rho_eta = -rho * (t_eta * dK - dt * K_eta) / slope
    x_eta = -((t_eta + n_v * rho_eta) * K + t * K_eta) / slope
    chi = F_x / slope
    return F_eta + F_x * x_eta + F_rho * rho_eta, chi, F_rho - n_v * K * chi


def _resummed(leading, first, fade, ridged):
    """leading (1 + x/(1 - x s)) and x s, with x = first/leading and s = `fade`."""
    x = jnp.where(leading == 0, 0, first / jnp.where(leading == 0, 1, leading))
    pole = jnp.where(x > 0, x * fade, x)
    pole = jnp.where(ridged, jnp.minimum(pole, LARGEST_RIDGED_POLE), pole)
    beyond = pole >= 1
    factor = 1 + x / (1 - jnp.where(beyond, 0, pole))
    return jnp.where(beyond, jnp.inf, leading * factor), pole
