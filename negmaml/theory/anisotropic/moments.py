r"""Distance and task error of the structured theory: the limit and the term of order 1/p after it.

Every mean wanted is a slope, in one of the *sources*: a ridge `weights` on omega, or the weight of
fresh query rows; the residuals' strength (noise) and a ridge along omega_0 - w0 (start) are two
more. With subscripts for total derivatives in sources along the root, in units of tau,

    Z = tau + ell tau_ell,        E_y f = f_y + tau_y (f - ell f_ell)/Z
    limit = E_y (m u) - ell^2 (E_y R - 2 tau_y R/Z)
    u = sigma^2 (1 + a^T T a) + sum_k o_k kappa phi v,    kappa = ell + (m-1) phi
    R = sum_k d_k v.

a is one on points. The next order is the same with psi for m u and chi for R, which are slopes of

    F = { (m-1) log det_S(1 - R Gamma_-) + log det_S(1 - R Gamma_+) - m log det_A(1 - R Gamma) } / 2

at fixed ridge: psi = F_noise - N tau_noise/Z, chi = F_start - N tau_start/Z, N = ell F_ell + sum_y
y F_y. F is the Hessian's determinant: det_S on symmetric, det_A on antisymmetric d x d matrices,
R X = T X T/n_t + e (e^T X e) e^T/n_v, and Gamma X = sum_k s_k^2 G X G within a task, Gamma_- less
and Gamma_+ with m - 1 times that between tasks. Hence a second derivative of F, in directions that
hold the ridge. negmaml/theory/anisotropic.md derives all of this.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from negmaml._core.arrays import contract, namespace
from negmaml._core.factorisations import inverse
from negmaml.theory.anisotropic.equations import (
    FourthMoments,
    Marginal,
    PencilSystem,
    along_f,
    bases,
    bordered,
    embedded,
    exchange,
    kron,
    marginal,
    moved,
    overlaps,
    parts,
    response,
    sandwich,
    tested,
)
from negmaml.theory.anisotropic.solver import Root, solve

# Positions of the sources: the means' lie between the ridge and the last two.
ELL, MEANS, ROWS, NOISE, START = 0, slice(1, -2), -3, -2, -1


class Expansion(NamedTuple):
    """limit, first: of every form E (omega* - w0)^T H (omega* - w0), then the task error, (J + 1,).

    fade: of the resummation. converged: whether the root was found.
    """

    limit: jax.Array
    first: jax.Array
    fade: jax.Array
    converged: jax.Array


def limiting_means(system: PencilSystem, ridged: bool):
    """The leading order; NaN where no root was found."""
    root, x, slopes = solve_and_linearize(system, ridged)
    found = leading(system, root, x, slopes)
    return jnp.where(root.converged, found, jnp.nan)


def solve_and_linearize(system: PencilSystem, ridged: bool) -> tuple[Root, Marginal, "Slopes"]:
    """The root, one task at it, and how it moves; `ridged` says whether ridge may be > 0."""
    root = solve(system, ridged)
    x = marginal(system, root.T, root.ell)
    return root, x, first_slopes(system, root, x)


def expand(system: PencilSystem, root: Root, x: Marginal, slopes: "Slopes") -> Expansion:
    """The two leading orders of all means, from what is `solve_and_linearize`."""
    limit, first = leading(system, root, x, slopes), first_order(system, root, x, slopes)
    product = root.ell * slopes.tau[ELL]
    fade = ((product - root.tau) / (product + root.tau)) ** 2
    return Expansion(limit, first, fade, root.converged)


class Slopes(NamedTuple):
    """Total derivatives along the root in the sources, y of them.

    own: of the ridge on omega per eigenvalue, at fixed T, (y, k). T: (n, y), in the basis of
    symmetric matrices. phi: (y, k). tau: (y,). inverse: of one less the map's derivative, (n, n).
    g: (n, y).
    """

    own: jax.Array
    T: jax.Array
    phi: jax.Array
    tau: jax.Array
    inverse: jax.Array
    g: jax.Array


def first_slopes(system: PencilSystem, root: Root, x: Marginal) -> Slopes:
    """By the implicit function theorem; the derivative of the map for T is the Hessian's R Gamma_+.

    Sources move G by r r^T `lift` at fixed T: a ridge by -v^2, and noise by giving each task an
    omega of its own, of variance `noise o`.
    """
    xp = namespace(root.T)
    T, active = root.T, slice(*system.pencil.active)
    symmetric, _ = bases(T.shape[0], T.dtype)
    gram = all_overlaps(system, x, root.f)
    R = response(system, T, root.f)
    inverted = inverse(np.eye(R.shape[0], dtype=T.dtype) - R @ gram[:-1, :-1])

    nothing = xp.zeros_like(x.v)[None]
    others = system.weights, nothing, nothing, system.start[None]
    own = xp.concatenate([xp.ones_like(nothing), *others])
    unit = np.eye(own.shape[0], dtype=T.dtype)
    share = x.phi * x.v
    lift = system.o * ((1 - share) ** 2 + (system.m - 1) * share**2)
    lift = unit[NOISE][:, None] * lift - own * x.v**2
    mean, points = x.mean[active], system.pencil.points[active]
    squares = symmetric.T @ (mean[:, None] * mean).reshape(symmetric.shape[0], -1)
    lift = lift * (system.count * system.s)
    noise = system.sigma**2 * unit[NOISE]
    g = (
        contract("ak,yk->ay", squares, lift)
        + (xp.outer(points, points).ravel() @ symmetric)[:, None] * noise
    )
    T_y = -inverted @ (R @ g)
    through, noisy = (along_f(system.pencil, y, root.f) for y in (x.mean, system.pencil.points))
    output = lift @ through**2 + noisy**2 * noise - gram[-1, :-1] @ T_y
    tau_y = system.n_v * unit[ROWS] - output
    phi_y = contract("ak,ay->yk", squares, T_y) * system.s
    return Slopes(own, T_y, phi_y, tau_y, inverted, g - gram[:-1, :-1] @ T_y)


def all_overlaps(system: PencilSystem, x: Marginal, f):
    """Gamma_+, on symmetric matrices and f f^T."""
    between = overlaps(system, x.between(), f).even
    return overlaps(system, x.own(), f).even + (system.m - 1) * between


def leading(system: PencilSystem, root: Root, x: Marginal, slopes: Slopes):
    """The limit of all means."""
    xp = namespace(root.ell)
    m, ell = system.m, root.ell
    points = system.pencil.points[slice(*system.pencil.active)]
    symmetric, _ = bases(root.T.shape[0], ell.dtype)
    square = xp.outer(points, points).ravel() @ symmetric
    kappa, tasks = ell + (m - 1) * x.phi, system.count * system.o
    queries = 0 if system.pencil.train_train else 1
    u = system.sigma**2 * (queries + points @ root.T @ points) + xp.sum(tasks * kappa * x.phi * x.v)
    R = xp.sum(system.d * x.v)
    kappa_y = slopes.own + (m - 1) * slopes.phi
    of_tasks = (x.phi * x.v) ** 2 * kappa_y + (kappa * x.v) ** 2 * slopes.phi
    u_y = system.sigma**2 * (square @ slopes.T) + of_tasks @ tasks
    R_y = -(slopes.own + m * slopes.phi) @ (system.d * x.v**2)
    rate = slopes.tau[MEANS] / (root.tau + ell * slopes.tau[ELL])
    limit = m * (held(root, slopes, u_y) + rate * u)
    return per_task(system, limit - ell**2 * (held(root, slopes, R_y) - rate * R))


def held(root: Root, slopes: Slopes, slope):
    """Slopes in the means' sources at fixed ridge, of a function with the total slopes given."""
    share = root.ell / (root.tau + root.ell * slopes.tau[ELL])
    return slope[MEANS] - share * slopes.tau[MEANS] * slope[ELL]


def per_task(system: PencilSystem, means):
    """The task error is a mean over the m tasks."""
    last = np.append(np.zeros(system.weights.shape[0]), 1.0).astype(means.dtype)
    return means * (1 - last + last / system.m)


def first_order(system: PencilSystem, root: Root, x: Marginal, slopes: Slopes):
    """The next order of all means: a second derivative of F along the root.

    T moves with the sources, and its second derivatives enter through the slope of F in T alone:
    with the map for T and tau weighted accordingly, they are second derivatives at fixed T.
    """
    xp = namespace(root.ell)
    ell, T = root.ell, root.T
    symmetric, _ = bases(T.shape[0], ell.dtype)
    Z = root.tau + ell * slopes.tau[ELL]
    along, rate, velocity = residuals(system, root, x, slopes)
    unit = np.eye(slopes.tau.size, dtype=ell.dtype)

    at = T, x.mean, x.spread, x.v
    parts, moving = along_line(lambda *at: _slopes_of_F(system, *at), at, velocity)
    F_T, F_own = _chain(system, x.mean, x.spread, x.v, *parts[:3])
    # Noise moves G and G between tasks at fixed T besides, as in `first_slopes`.
    share = x.phi * x.v
    both = _square(parts[1] + parts[2], x.mean) * (system.m * share**2 - 2 * share)
    F_noise = xp.sum(system.o * (both + _square(parts[1], x.mean)))
    F_T = F_T.ravel() @ symmetric
    slope = slopes.own @ F_own + F_T @ slopes.T + unit[NOISE] * F_noise + unit[ROWS] * parts[3]

    spent = ell * slope[ELL] / Z
    adjoint = (F_T - spent * all_overlaps(system, x, root.f)[-1, :-1]) @ slopes.inverse
    adjoint = (symmetric @ adjoint).reshape(T.shape)

    def lagrangian(T, mean, spread, v, explicit, own, between, *f):
        weighted = _constraints(system, T, adjoint, spent, *f) + own
        return _chain(system, mean, spread, v, explicit, weighted, between)

    f = () if root.f is None else (root.f,)
    f_velocity = () if root.f is None else (_velocity_of_f(system, root, slopes.g @ along),)
    _, second = along_line(lagrangian, (*at, *parts[:3], *f), (*velocity, *moving[:3], *f_velocity))
    second_T, second_own = second
    second = slopes.own @ second_own + (second_T.ravel() @ symmetric) @ slopes.T
    second = second + unit[ROWS] * moving[3]
    rest = held(root, slopes, slope) - 2 * spent * held(root, slopes, slopes.tau)
    first = held(root, slopes, second) - rate * rest
    psi, chi = (slope[i] - spent * slopes.tau[i] for i in (NOISE, START))
    return per_task(system, first + slopes.tau[MEANS] / Z * (psi + ell**2 * chi))


def residuals(system: PencilSystem, root: Root, x: Marginal, slopes: Slopes):
    """psi - ell^2 chi as a slope: (the direction in all sources, how tau grows, velocities).

    The direction holds the ridge; velocities are of (T, r, K_c, v).
    """
    ell = root.ell
    unit = np.eye(slopes.tau.size, dtype=ell.dtype)
    along = unit[NOISE] - ell**2 * unit[START]
    rate = slopes.tau @ along / (root.tau + ell * slopes.tau[ELL])
    along = along - ell * rate * unit[ELL]
    symmetric, _ = bases(root.T.shape[0], ell.dtype)
    velocity = _velocity(system, x, along @ slopes.own, symmetric @ (slopes.T @ along))
    return along, rate, velocity


def along_line(function, at, velocity):
    """(value, derivative) of a rational function along a line, as `jax.jvp`: by a complex step.

    The same operations give both, so the program is half as long as that of the product rule, and
    nothing is subtracted, so all digits are right.
    """
    xp = namespace(velocity)
    step = np.finfo(at[0].dtype).eps ** 2
    turned = lax.complex if xp is jnp else lambda x, y: x + 1j * y
    moved = (turned(x, step * v) for x, v in zip(at, velocity, strict=True))
    found = function(*moved)
    return tuple(jax.tree.map(part, found) for part in (xp.real, lambda x: xp.imag(x) / step))


def _velocity(system: PencilSystem, x: Marginal, own, T):
    """How (T, r, K_c, v) move with unit noise, the ridges `own` and T."""
    a = round(T.size**0.5)
    T = T.reshape(a, a)
    change = embedded(system.pencil, T)[..., None] * system.s
    phi, mean, spread = moved(x.mean, x.spread, change)
    spread = spread + x.mean[:, None] * x.mean[None] * system.o
    mean = mean - x.mean * (system.o * x.phi)
    phi = phi - system.o * x.phi**2
    return T, mean, spread, -(x.v**2) * (own + system.m * phi)


def _slopes_of_F(system: PencilSystem, T, mean, spread, v):
    """Slopes of F: in T at fixed G, in G within and between tasks, per eigenvalue, and in rows."""
    xp = namespace(v)
    m = system.m
    between = mean[:, None] * (mean * v)
    own = spread + between
    within, across = overlaps(system, own), overlaps(system, between).even
    symmetric, antisymmetric = bases(T.shape[0], T.dtype)
    kronecker = kron(T) / system.n_t
    R = sandwich(symmetric, kronecker)
    queries = 0 if system.pencil.train_train else 1 / system.n_v
    R = bordered(R, xp.zeros_like(R[0]), queries)
    N, Q = _resolvents(R, xp.stack([within.even - across, within.even + (m - 1) * across]))
    N_a, Q_a = _resolvents(sandwich(antisymmetric, kronecker), within.odd)

    Q_all = (m - 1) * Q[0] + Q[1]
    in_T = _weigh(Q_all[:-1, :-1], m * Q_a) @ T.ravel() / system.n_t
    found = (
        -in_T.reshape(T.shape),
        -_in_overlaps(system, own, (m - 1) * N[0] + N[1], m * N_a),
        -_in_overlaps(system, between, (m - 1) * (N[1] - N[0]), None),
        Q_all[-1, -1] * queries,
    )
    if system.fourth_moments is None:
        return found
    own_T, own_G, own_rows = _slopes_of_fourth(system, system.fourth_moments, T, own, queries)
    return found[0] + own_T, found[1] + own_G, found[2], found[3] + own_rows


def _slopes_of_fourth(system: PencilSystem, fourth_moments: FourthMoments, T, own, queries):
    """Of the fourth moments' part of F, in T, in G within a task and in rows.

    It is - m sum_ab C_ab {tr T q_a T q_b/n_t + (e^T q_a e)(e^T q_b e)/n_v}/2 with q = sum s_k G_k
    over each range of `FourthMoments`, whose covariance is C.
    """
    xp = namespace(own)
    pencil, m = system.pencil, system.m
    ranges, covariance = fourth_moments
    inner, _, corner = parts(pencil, own)
    weights = ranges * (system.count * system.s)
    q, corner = contract("ijk,ak->aij", inner, weights), weights @ corner
    mixed, mixed_corner = contract("ab,bij->aij", covariance, q), covariance @ corner
    first, last = pencil.active
    border = (first, own.shape[0] - last)
    pulled = xp.pad(T @ mixed @ T, ((0, 0), border, border)) / system.n_t
    at_end = np.diag(tested(pencil)).astype(pulled.dtype)
    pulled = pulled + queries * mixed_corner[:, None, None] * at_end
    in_T = -m / system.n_t * xp.sum(q @ T @ mixed, 0)
    in_G = -m * contract("aij,ak->ijk", pulled, weights)
    return in_T, in_G, m * queries * (corner @ mixed_corner)


def _weigh(even, odd):
    """Weights of the overlaps' products, from those on symmetric and antisymmetric matrices."""
    a = round((2 * even.shape[0] + 0.25) ** 0.5 - 0.5)
    symmetric, antisymmetric = bases(a, even.dtype)
    both = sandwich(symmetric.T, even)
    return exchange(both if odd is None else both - sandwich(antisymmetric.T, odd))


def _in_overlaps(system: PencilSystem, G, even, odd):
    """Slopes in G of half of tr even Gamma_S - tr odd Gamma_A, (d, d, k)."""
    xp = namespace(G)
    inner, outer, corner = parts(system.pencil, G)
    (first, last), d, a = system.pencil.active, G.shape[0], inner.shape[0]
    symmetric, _ = bases(a, G.dtype)
    block = _weigh(even[:-1, :-1], odd) @ inner.reshape(a * a, -1)
    side = (symmetric @ even[-1, :-1]).reshape(a, a) @ outer
    side = xp.pad(side, ((first, d - last), (0, 0)))[:, None] * tested(system.pencil)[:, None]
    padding = (first, d - last), (first, d - last), (0, 0)
    whole = xp.pad(block.reshape(inner.shape), padding) + side + side.swapaxes(0, 1)
    corner = even[-1, -1] * corner * np.diag(tested(system.pencil))[..., None]
    return (whole + corner) * (system.count * system.s**2)


def _resolvents(R, gamma):
    """(1 - R Gamma)^{-1} R and Gamma (1 - R Gamma)^{-1}."""
    inverted = inverse(np.eye(R.shape[0], dtype=R.dtype) - R @ gamma)
    return inverted @ R, gamma @ inverted


def _velocity_of_f(system: PencilSystem, root: Root, g):
    """f moves with g by -T_0 g f/n_t."""
    symmetric, _ = bases(root.T.shape[0], g.dtype)
    pulled = (symmetric @ g).reshape(root.T.shape) @ root.f
    return -(root.T @ pulled - root.f * (root.f @ pulled)) / system.n_t


def _constraints(system: PencilSystem, T, adjoint, spent, f=None):
    """Slopes in G of the map for T, weighted by `adjoint`, and of -`spent` tau, (d, d, k)."""
    per = T @ adjoint @ T / -system.n_t
    if f is None:
        per = embedded(system.pencil, per) + spent * np.diag(tested(system.pencil))
    else:
        share = spent + f @ adjoint @ f / system.n_t
        per = embedded(system.pencil, per + share * f[:, None] * f)
    return per[..., None] * (system.count * system.s)


def _chain(system: PencilSystem, mean, spread, v, explicit, own, between):
    """Slopes in T and in each eigenvalue's ridge, from those in T, in G and between tasks.

    With W = own + between: - sum_k s {K own K + v (K W r r^T + r r^T W K) + m v^2 (r^T W r) r r^T}
    and - v^2 r^T W r.
    """
    xp = namespace(v)
    both = own + between
    pulled = xp.sum(both * mean, 1)
    square = xp.sum(pulled * mean, 0)
    bent = xp.sum(spread * pulled, 1) * v
    half = bent + system.m / 2 * v**2 * square * mean
    inner = xp.sum(spread[:, :, None] * own, 1)
    inner = xp.sum(inner[:, :, None] * spread, 1)
    cross = half[:, None] * mean[None]
    in_T, *_ = parts(system.pencil, inner + cross + cross.swapaxes(0, 1))
    in_T = contract("ijk,k->ij", in_T, system.s)
    return explicit - in_T, -(v**2) * square


def _square(W, r):
    """r^T W r."""
    xp = namespace(r)
    return xp.sum(xp.sum(W * r, 1) * r, 0)
