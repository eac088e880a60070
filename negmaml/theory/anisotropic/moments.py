r"""Quadratic forms of omega* - w0 and the task error: the limit and the term of order 1/p after it.

Every mean is a slope in one of the *sources*. One source per mean is a ridge `weights` on omega,
or the weight of fresh query rows. Two more are the residuals' strength (noise) and a ridge along
omega_0 - w0 (start). With subscripts for total derivatives in sources along the root, in units of
tau, and a equal to one on points,

    limit = E_y (m u) - ell^2 (E_y R - 2 tau_y R/Z)                                          (A8)
    E_y f = f_y + tau_y (f - ell f_ell)/Z,        Z = tau + ell tau_ell                      (A9)
    u = sigma^2 (1 + a^T T a) + sum_k o_k kappa phi v,    kappa = ell + (m-1) phi            (A10)
    R = sum_k d_k v                                                                          (A11)

The next order is the same with psi for m u and chi for R, which are slopes of

    F = { (m-1) log det_S(1 - R Gamma_-) + log det_S(1 - R Gamma_+)                          (A14)
          - m log det_A(1 - R Gamma) } / 2
    psi = F_noise - N tau_noise/Z,    chi = F_start - N tau_start/Z                          (A15)
    N = ell F_ell + sum_y y F_y

at fixed ridge: det_S on symmetric, det_A on antisymmetric d x d matrices, R as in (A12) and Gamma
as in (A13), Gamma_- less and Gamma_+ with m - 1 times Gamma across tasks. Hence a second derivative
of F, in directions that hold the ridge.
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
    bases,
    bordered,
    contract_output,
    exchange,
    kron,
    marginal,
    marginal_jvp,
    minus_T_slope,
    output_matrix,
    overlaps,
    pad_to_pencil,
    pencil_blocks,
    sandwich,
    total_overlaps,
)
from negmaml.theory.anisotropic.solver import PencilRoot, solve

# Positions of the sources. Those of the means lie between the ridge and the last two; fresh query
# rows are the last of them.
ELL, MEANS, ROWS, NOISE, START = 0, slice(1, -2), -3, -2, -1


class Expansion(NamedTuple):
    """The two leading orders of every form E (omega* - w0)^T H (omega* - w0), and the task error.

    limit, first: (J + 1,), the task error last. ridge_attenuation: s of (A21). converged: whether
    the root was found.
    """

    limit: jax.Array
    first: jax.Array
    ridge_attenuation: jax.Array
    converged: jax.Array


def limiting_means(system: PencilSystem, ridged: bool):
    """Return the leading order of all means; NaN where no root was found."""
    root, x, slopes = solve_and_linearize(system, ridged)
    return jnp.where(root.converged, leading_order(system, root, x, slopes), jnp.nan)


def solve_and_linearize(
    system: PencilSystem, ridged: bool
) -> tuple[PencilRoot, Marginal, "Slopes"]:
    """Return the root, the marginal there and the slopes; `ridged`: whether ridge may be > 0."""
    root = solve(system, ridged)
    x = marginal(system, root.T, root.ell)
    return root, x, slopes_at_root(system, root, x)


def expand(system: PencilSystem, root: PencilRoot, x: Marginal, slopes: "Slopes") -> Expansion:
    """Return the two leading orders of all means, from the results of `solve_and_linearize`."""
    limit, first = leading_order(system, root, x, slopes), first_order(system, root, x, slopes)
    product = root.ell * slopes.tau[ELL]
    attenuation = ((product - root.tau) / (product + root.tau)) ** 2
    return Expansion(limit, first, attenuation, root.converged)


class Slopes(NamedTuple):
    """Total derivatives along the root in the sources, y of them.

    ridge: of the ridge on omega per eigenvalue, at fixed T, (y, k). T: (n, y), in the basis of
    symmetric matrices. phi: (y, k). tau: (y,). inverse: of one less the map's derivative, (n, n).
    g: (n, y).
    """

    ridge: jax.Array
    T: jax.Array
    phi: jax.Array
    tau: jax.Array
    inverse: jax.Array
    g: jax.Array


def slopes_at_root(system: PencilSystem, root: PencilRoot, x: Marginal) -> Slopes:
    """Return the `Slopes`, by the implicit function theorem: the map for T has the slope R Gamma_+.

    Sources move G by r r^T `lift` at fixed T: a ridge by -v^2, and noise by giving each task an
    omega of its own, of variance `noise o`.
    """
    xp = namespace(root.T)
    T, active = root.T, slice(*system.pencil.active)
    symmetric, _ = bases(T.shape[0], T.dtype)
    # (1 - R Gamma_+)^-1 turns a move of g at fixed T into the total one.
    gram = total_overlaps(system, x, root.f)
    R = minus_T_slope(system, T, root.f)
    inverted = inverse(np.eye(R.shape[0], dtype=T.dtype) - R @ gram[:-1, :-1])

    # Ridges in the order of the sources: ell, the forms, query rows, noise, the start.
    nothing = xp.zeros_like(x.v)[None]
    ridge = xp.concatenate(
        [xp.ones_like(nothing), system.weights, nothing, nothing, system.start[None]]
    )
    unit = np.eye(ridge.shape[0], dtype=T.dtype)
    fitted = x.phi * x.v  # the share of omega that one task determines
    # Around its own omega, one task has 1 - phi v and the m - 1 others phi v of the variance o.
    lift = system.o * ((1 - fitted) ** 2 + (system.m - 1) * fitted**2)
    lift = unit[NOISE][:, None] * lift - ridge * x.v**2
    # r r^T per eigenvalue, and a a^T of the label noise, on symmetric matrices.
    mean, points = x.mean[active], system.pencil.points[active]
    squares = symmetric.T @ (mean[:, None] * mean).reshape(symmetric.shape[0], -1)
    lift = lift * (system.count * system.s)
    noise = system.sigma**2 * unit[NOISE]
    g = (
        contract("ak,yk->ay", squares, lift)
        + (xp.outer(points, points).ravel() @ symmetric)[:, None] * noise
    )
    T_y = -inverted @ (R @ g)
    # tau = n_v - e^T g e of (A7), whose g moves with the sources and with T.
    through, noisy = (
        contract_output(system.pencil, y, root.f) for y in (x.mean, system.pencil.points)
    )
    output = lift @ through**2 + noisy**2 * noise - gram[-1, :-1] @ T_y
    tau_y = system.n_v * unit[ROWS] - output
    # phi' = r^T (s T') r, since r makes the form of z given omega stationary.
    phi_y = contract("ak,ay->yk", squares, T_y) * system.s
    return Slopes(ridge, T_y, phi_y, tau_y, inverted, g - gram[:-1, :-1] @ T_y)


def leading_order(system: PencilSystem, root: PencilRoot, x: Marginal, slopes: Slopes):
    """Return the limit of all means, (A8)."""
    xp = namespace(root.ell)
    m, ell = system.m, root.ell
    points = system.pencil.points[slice(*system.pencil.active)]
    symmetric, _ = bases(root.T.shape[0], ell.dtype)
    square = xp.outer(points, points).ravel() @ symmetric
    # u and R of (A10) and (A11); `count` directions share one eigenvalue.
    kappa, tasks = ell + (m - 1) * x.phi, system.count * system.o
    queries = 0 if system.pencil.train_train else 1  # T holds them in the other case
    u = system.sigma**2 * (queries + points @ root.T @ points) + xp.sum(tasks * kappa * x.phi * x.v)
    R = xp.sum(system.d * x.v)
    # d(kappa phi v) with v = 1/(kappa + phi) is (phi v)^2 dkappa + (kappa v)^2 dphi.
    kappa_y = slopes.ridge + (m - 1) * slopes.phi
    of_tasks = (x.phi * x.v) ** 2 * kappa_y + (kappa * x.v) ** 2 * slopes.phi
    u_y = system.sigma**2 * (square @ slopes.T) + of_tasks @ tasks
    R_y = -(slopes.ridge + m * slopes.phi) @ (system.d * x.v**2)
    # tau_y/Z of (A8) and (A9).
    rate = slopes.tau[MEANS] / (root.tau + ell * slopes.tau[ELL])
    limit = m * (at_fixed_ridge(root, slopes, u_y) + rate * u)
    return mean_error(system, limit - ell**2 * (at_fixed_ridge(root, slopes, R_y) - rate * R))


def at_fixed_ridge(root: PencilRoot, slopes: Slopes, slope):
    """Return f_y - tau_y ell f_ell/Z of (A9) in the means' sources, from the total slopes of f."""
    share = root.ell / (root.tau + root.ell * slopes.tau[ELL])
    return slope[MEANS] - share * slopes.tau[MEANS] * slope[ELL]


def mean_error(system: PencilSystem, means):
    """Return the means with the last one, the sum of the m task errors, divided by m."""
    # A weight on the query rows of all m tasks has m errors for its slope.
    last = np.append(np.zeros(system.weights.shape[0]), 1.0).astype(means.dtype)
    return means * (1 - last + last / system.m)


def first_order(system: PencilSystem, root: PencilRoot, x: Marginal, slopes: Slopes):
    """Return the next order of all means: a second derivative of F along the root.

    T moves with the sources, and its second derivatives enter only through the slope of F in T.
    With the map for T and tau weighted accordingly, they are second derivatives at fixed T.
    """
    xp = namespace(root.ell)
    ell, T = root.ell, root.T
    symmetric, _ = bases(T.shape[0], ell.dtype)
    Z = root.tau + ell * slopes.tau[ELL]
    along, rate, velocity = residual_direction(system, root, x, slopes)
    unit = np.eye(slopes.tau.size, dtype=ell.dtype)

    # The explicit slopes of F: in T, in G within and across tasks, and in rows.
    at = T, x.mean, x.cov, x.v
    explicit, moving = complex_step_jvp(lambda *at: _slopes_of_F(system, *at), at, velocity)
    F_T, F_ridge = _chain_rule(system, x.mean, x.cov, x.v, *explicit[:3])
    # Noise moves G within and across tasks at fixed T besides, as in `slopes_at_root`.
    fitted = x.phi * x.v
    both = _quadratic_form(explicit[1] + explicit[2], x.mean) * (system.m * fitted**2 - 2 * fitted)
    F_noise = xp.sum(system.o * (both + _quadratic_form(explicit[1], x.mean)))
    F_T = F_T.ravel() @ symmetric
    slope = slopes.ridge @ F_ridge + F_T @ slopes.T
    slope = slope + unit[NOISE] * F_noise + unit[ROWS] * explicit[3]

    # Holding the ridge costs `spent` of tau, and T follows its map: both as multipliers.
    spent = ell * slope[ELL] / Z
    adjoint = (F_T - spent * total_overlaps(system, x, root.f)[-1, :-1]) @ slopes.inverse
    adjoint = (symmetric @ adjoint).reshape(T.shape)

    def lagrangian(T, mean, cov, v, in_T, within, across, *f):
        weighted = _constraints(system, T, adjoint, spent, *f) + within
        return _chain_rule(system, mean, cov, v, in_T, weighted, across)

    f = () if root.f is None else (root.f,)
    f_velocity = () if root.f is None else (_velocity_of_f(system, root, slopes.g @ along),)
    at, velocity = (*at, *explicit[:3], *f), (*velocity, *moving[:3], *f_velocity)
    _, (second_T, second_ridge) = complex_step_jvp(lagrangian, at, velocity)
    second = slopes.ridge @ second_ridge + (second_T.ravel() @ symmetric) @ slopes.T
    second = second + unit[ROWS] * moving[3]
    rest = at_fixed_ridge(root, slopes, slope) - 2 * spent * at_fixed_ridge(
        root, slopes, slopes.tau
    )
    first = at_fixed_ridge(root, slopes, second) - rate * rest
    # (A15), where ell and y are the only sources that are not zero.
    psi, chi = (slope[i] - spent * slopes.tau[i] for i in (NOISE, START))
    return mean_error(system, first + slopes.tau[MEANS] / Z * (psi + ell**2 * chi))


def residual_direction(system: PencilSystem, root: PencilRoot, x: Marginal, slopes: Slopes):
    """Return (direction in the sources, rate of tau, velocities) of psi - ell^2 chi as a slope.

    The direction holds the ridge; velocities are of (T, r, K_c, v).
    """
    ell = root.ell
    unit = np.eye(slopes.tau.size, dtype=ell.dtype)
    along = unit[NOISE] - ell**2 * unit[START]
    rate = slopes.tau @ along / (root.tau + ell * slopes.tau[ELL])
    # ell tau stays if ell moves against tau.
    along = along - ell * rate * unit[ELL]
    symmetric, _ = bases(root.T.shape[0], ell.dtype)
    velocity = _velocity(system, x, along @ slopes.ridge, symmetric @ (slopes.T @ along))
    return along, rate, velocity


def complex_step_jvp(function, at, velocity):
    """Return (value, derivative) of a rational function along a line, as `jax.jvp` does.

    A complex step gives both by the same operations, so the program is half as long as that of the
    product rule. Nothing is subtracted, so all digits are right.
    """
    xp = namespace(velocity)
    # Its square is below the precision, so that the real part is the value itself.
    step = np.finfo(at[0].dtype).eps ** 2
    to_complex = lax.complex if xp is jnp else lambda x, y: x + 1j * y
    moved = (to_complex(x, step * v) for x, v in zip(at, velocity, strict=True))
    found = function(*moved)
    return tuple(jax.tree.map(part, found) for part in (xp.real, lambda x: xp.imag(x) / step))


def _velocity(system: PencilSystem, x: Marginal, ridge, T):
    """Return the velocities of (T, r, K_c, v) with unit noise, and those of the ridges and of T."""
    a = round(T.size**0.5)
    T = T.reshape(a, a)
    change = pad_to_pencil(system.pencil, T)[..., None] * system.s
    phi, mean, cov = marginal_jvp(x.mean, x.cov, change)
    # With unit noise omega of the task has a variance o of its own.
    cov = cov + x.mean[:, None] * x.mean[None] * system.o
    mean = mean - x.mean * (system.o * x.phi)
    phi = phi - system.o * x.phi**2
    return T, mean, cov, -(x.v**2) * (ridge + system.m * phi)


def _slopes_of_F(system: PencilSystem, T, mean, cov, v):
    """Return the slopes of (A14) in T at fixed G, in G within and across tasks, and in rows."""
    xp = namespace(v)
    m = system.m
    across = mean[:, None] * (mean * v)
    within = cov + across
    of_within, of_across = overlaps(system, within), overlaps(system, across).even
    symmetric, antisymmetric = bases(T.shape[0], T.dtype)
    # R of (A12) on symmetric matrices with e e^T last, and on antisymmetric ones, where e has none.
    kronecker = kron(T) / system.n_t
    R = sandwich(symmetric, kronecker)
    queries = 0 if system.pencil.train_train else 1 / system.n_v
    R = bordered(R, xp.zeros_like(R[0]), queries)
    gammas = of_within.even - of_across, of_within.even + (m - 1) * of_across
    N, Q = _resolvents(R, xp.stack(gammas))
    N_a, Q_a = _resolvents(sandwich(antisymmetric, kronecker), of_within.odd)

    # d log det(1 - R Gamma) = -tr Q dR - tr N dGamma, with the counts of tasks of (A14).
    Q_all = (m - 1) * Q[0] + Q[1]
    in_T = _product_weights(Q_all[:-1, :-1], m * Q_a) @ T.ravel() / system.n_t
    found = (
        -in_T.reshape(T.shape),
        -_slopes_in_overlaps(system, within, (m - 1) * N[0] + N[1], m * N_a),
        -_slopes_in_overlaps(system, across, (m - 1) * (N[1] - N[0]), None),
        Q_all[-1, -1] * queries,
    )
    if system.fourth_moments is None:
        return found
    more_T, more_G, more_rows = _slopes_of_F_4(system, system.fourth_moments, T, within, queries)
    return found[0] + more_T, found[1] + more_G, found[2], found[3] + more_rows


def _slopes_of_F_4(system: PencilSystem, fourth_moments: FourthMoments, T, within, queries):
    """Return the slopes of F_4, (A20), in T, in G within a task and in rows.

    F_4 = - m sum_ab C_ab {tr T q_a T q_b/n_t + (e^T q_a e)(e^T q_b e)/n_v}/2, where q = sum s_k G_k
    over each bin of `FourthMoments`, whose covariance is C.
    """
    xp = namespace(within)
    pencil, m = system.pencil, system.m
    bin_weights, covariance = fourth_moments
    # q_a on active variables, e^T q_a e, and both contracted with C.
    inner, _, corner = pencil_blocks(pencil, within)
    weights = bin_weights * (system.count * system.s)
    q, corner = contract("ijk,ak->aij", inner, weights), weights @ corner
    mixed, mixed_corner = contract("ab,bij->aij", covariance, q), covariance @ corner
    first, last = pencil.active
    border = (first, within.shape[0] - last)
    pulled = xp.pad(T @ mixed @ T, ((0, 0), border, border)) / system.n_t
    at_end = output_matrix(pencil, pulled.dtype)
    pulled = pulled + queries * mixed_corner[:, None, None] * at_end
    in_T = -m / system.n_t * xp.sum(q @ T @ mixed, 0)
    in_G = -m * contract("aij,ak->ijk", pulled, weights)
    return in_T, in_G, m * queries * (corner @ mixed_corner)


def _product_weights(even, odd):
    """Return weights of products of overlaps from those on (anti)symmetric matrices."""
    a = round((2 * even.shape[0] + 0.25) ** 0.5 - 0.5)  # even is a (a + 1)/2 square
    symmetric, antisymmetric = bases(a, even.dtype)
    both = sandwich(symmetric.T, even)
    return exchange(both if odd is None else both - sandwich(antisymmetric.T, odd))


def _slopes_in_overlaps(system: PencilSystem, G, even, odd):
    """Return the slopes in G of half of tr even Gamma_S - tr odd Gamma_A, (d, d, k)."""
    xp = namespace(G)
    pencil = system.pencil
    inner, outer, corner = pencil_blocks(pencil, G)
    (first, last), d, a = pencil.active, G.shape[0], inner.shape[0]
    symmetric, _ = bases(a, G.dtype)
    at_end = output_matrix(pencil, G.dtype)[..., None]
    # Slopes of the three kinds of overlaps: inner, with the output once, and twice.
    block = _product_weights(even[:-1, :-1], odd) @ inner.reshape(a * a, -1)
    side = (symmetric @ even[-1, :-1]).reshape(a, a) @ outer
    side = xp.pad(side, ((first, d - last), (0, 0)))[:, None] * at_end[-1]
    whole = pad_to_pencil(pencil, block.reshape(inner.shape)) + side + side.swapaxes(0, 1)
    return (whole + even[-1, -1] * corner * at_end) * (system.count * system.s**2)


def _resolvents(R, gamma):
    """Return (1 - R Gamma)^{-1} R and Gamma (1 - R Gamma)^{-1}."""
    inverted = inverse(np.eye(R.shape[0], dtype=R.dtype) - R @ gamma)
    return inverted @ R, gamma @ inverted


def _velocity_of_f(system: PencilSystem, root: PencilRoot, g):
    """Return the velocity of f with that of g: -T_0 g f/n_t, from (A22)."""
    symmetric, _ = bases(root.T.shape[0], g.dtype)
    pulled = (symmetric @ g).reshape(root.T.shape) @ root.f
    return -(root.T @ pulled - root.f * (root.f @ pulled)) / system.n_t


def _constraints(system: PencilSystem, T, adjoint, spent, f=None):
    """Return the slopes in G of `adjoint` times the map for T, and of -`spent` tau, (d, d, k)."""
    per = T @ adjoint @ T / -system.n_t
    if f is None:
        per = pad_to_pencil(system.pencil, per) + spent * output_matrix(system.pencil, spent.dtype)
    else:
        share = spent + f @ adjoint @ f / system.n_t
        per = pad_to_pencil(system.pencil, per + share * f[:, None] * f)
    return per[..., None] * (system.count * system.s)


def _chain_rule(system: PencilSystem, mean, cov, v, in_T, within, across):
    """Return the slopes in T and in each eigenvalue's ridge, from those in T and in G.

    With K = K_c and W = within + across they are the explicit slope in T less
    sum_k s {K within K + v (K W r r^T + r r^T W K) + m v^2 (r^T W r) r r^T}, and -v^2 r^T W r.
    """
    xp = namespace(v)
    both = within + across
    pulled = xp.sum(both * mean, 1)
    square = xp.sum(pulled * mean, 0)
    half = xp.sum(cov * pulled, 1) * v + system.m / 2 * v**2 * square * mean
    inner = xp.sum(cov[:, :, None] * within, 1)
    inner = xp.sum(inner[:, :, None] * cov, 1)
    cross = half[:, None] * mean[None]
    of_T, *_ = pencil_blocks(system.pencil, inner + cross + cross.swapaxes(0, 1))
    return in_T - contract("ijk,k->ij", of_T, system.s), -(v**2) * square


def _quadratic_form(W, r):
    """Return r^T W r."""
    xp = namespace(r)
    return xp.sum(xp.sum(W * r, 1) * r, 0)
