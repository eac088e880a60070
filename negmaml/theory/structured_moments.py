r"""Distance and task error of the structured theory: the limit and the term of order 1/p after it.

With primes for total derivatives along the root, Z = tau + ell tau_ell, and for any source y in
which a mean is a derivative (a ridge Sigma^j, or the weight of fresh query rows)

    E_y f = f_y + tau_y (f - ell f_ell)/Z

the mean is E_y (m u) - ell^2 (E_y R - 2 tau_y R/Z) in the limit, and the same with psi for m u and chi
for R at the next order, where psi and chi are the slopes of F at fixed ridge,

    psi = F_noise - N tau_noise/Z,   chi = F_start - N tau_start/Z,   N = ell F_ell + sum_y y F_y.

All of it is one second derivative of F and tau along the root, in directions that hold the ridge.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from negmaml._core.numerics import contract
from negmaml.theory.structured_equations import (
    Marginal,
    System,
    bases,
    fluctuations,
    limit_slopes,
    marginal,
    inverse,
    kron,
    no_sources,
    per_eigenvalue,
    sandwich,
    output_column,
    tau,
    together,
    update,
)
from negmaml.theory.structured_saddle import Root, solve

# Positions in `Sources`, flattened: the means' sources lie between the ridge and the last two.
ELL, MEANS, ROWS, NOISE, START = 0, slice(1, -2), -3, -2, -1


class Expansion(NamedTuple):
    """limit, first: of every form E (omega* - w0)^T H (omega* - w0), then the task error, (J + 1,).

    fade: of the resummation. converged: whether the root was found.
    """

    limit: jax.Array
    first: jax.Array
    fade: jax.Array
    converged: jax.Array


def expand(system: System, ridged: bool) -> Expansion:
    """The two leading orders of all means; `ridged` says whether ridge may be > 0."""
    root = solve(system, ridged)
    x = marginal(system, root.T, no_sources(system, root.ell))
    slopes = first_slopes(system, root, x)
    limit, first = leading(system, root, x, slopes), first_order(system, root, x, slopes)
    product = root.ell * slopes.tau[ELL]
    fade = ((product - root.tau) / (product + root.tau)) ** 2
    return Expansion(limit, first, fade, root.converged)


class Slopes(NamedTuple):
    """Total derivatives along the root in every source, in the order of `Sources`.

    T: (n, sources), in the basis of symmetric matrices. tau, u, R: (sources,).
    inverse: (n, n), of the map's derivative less one.
    """

    T: jax.Array
    tau: jax.Array
    u: jax.Array
    R: jax.Array
    inverse: jax.Array


def first_slopes(system: System, root: Root, x: Marginal) -> Slopes:
    """By the implicit function theorem: the map's derivative is the Hessian's R Gamma_+."""
    m, T, a = system.m, root.T, system.pencil.points
    symmetric, _ = bases(T.shape[0], T.dtype)
    gram, column, _ = together(system, x)
    R, column = sandwich(symmetric, kron(T)) / system.n_t, symmetric.T @ column
    inverted = inverse(jnp.eye(R.shape[0], dtype=T.dtype) - R @ sandwich(symmetric, gram))

    # Sources that are ridges on omega, and what each adds to it on every eigenvalue.
    s, count, v, phi = system.s, system.count, x.v, x.phi
    ridges = jnp.stack(
        [jnp.ones_like(s), *system.weights, jnp.zeros_like(s), jnp.zeros_like(s)]
        + [per_eigenvalue(system)]
    )
    # G moves by r r^T times this at fixed T.
    lift = -ridges * v**2
    lift = lift.at[NOISE].set(system.o * ((1 - phi * v) ** 2 + (m - 1) * (phi * v) ** 2))
    inner = x.mean[system.inner]
    r2 = (inner[:, None] * inner[None]).reshape(-1, s.size)
    by_noise, by_rows = (jnp.asarray(np.eye(ridges.shape[0])[i], T.dtype) for i in (NOISE, ROWS))
    g = contract("an,yn->ay", r2, lift * (count * s))
    g = symmetric.T @ (g + system.sigma**2 * jnp.outer(jnp.outer(a, a).ravel(), by_noise))
    T_y = -inverted @ (R @ g)
    output = contract("n,yn->y", x.mean[-1] ** 2, lift * (count * s)) - column @ T_y
    tau_y = system.n_v * by_rows - system.sigma**2 * by_noise - output
    phi_y = contract("an,ay->yn", r2, symmetric @ T_y) * s
    kappa_y = ridges + (m - 1) * phi_y
    moved = (phi * v) ** 2 * kappa_y + (x.kappa * v) ** 2 * phi_y
    aTa = symmetric.T @ jnp.outer(a, a).ravel()
    u_y = system.sigma**2 * (aTa @ T_y) + moved @ (count * system.o)
    R_y = -(ridges + m * phi_y) @ (system.d * v**2)
    return Slopes(T_y, tau_y, u_y, R_y, inverted)


def leading(system: System, root: Root, x: Marginal, slopes: Slopes):
    """The limit of all means."""
    u, R = limit_slopes(system, root.T, x)
    Z = root.tau + root.ell * slopes.tau[ELL]
    rate = slopes.tau[MEANS] / Z
    limit = system.m * (held(root, slopes, slopes.u) + rate * u)
    return per_task(system, limit - root.ell**2 * (held(root, slopes, slopes.R) - rate * R))


def held(root: Root, slopes: Slopes, slope):
    """Slopes in the means' sources at fixed ridge, of a function whose total slopes are given."""
    share = root.ell / (root.tau + root.ell * slopes.tau[ELL])
    return slope[MEANS] - share * slopes.tau[MEANS] * slope[ELL]


def per_task(system: System, means):
    """The task error is a mean over the m tasks."""
    last = jnp.asarray(np.append(np.zeros(system.weights.shape[0]), 1.0), means.dtype)
    return means * (1 - last + last / system.m)


def first_order(system: System, root: Root, x: Marginal, slopes: Slopes):
    """The next order of all means: a second derivative of F along the root.

    T moves with the sources, and its second derivatives enter through F_T alone: with the map's
    residual and tau weighted accordingly, they are second derivatives at fixed T.
    """
    ell, shape = root.ell, root.T.shape
    symmetric, _ = bases(shape[0], ell.dtype)
    t, (v, unravel) = symmetric.T @ root.T.ravel(), ravel_pytree(no_sources(system, ell))
    Z = root.tau + ell * slopes.tau[ELL]

    def at(t, v):
        sources, T = unravel(v), (symmetric @ t).reshape(shape)
        return sources, T, marginal(system, T, sources)

    def F(t, v):
        sources, T, x = at(t, v)
        return fluctuations(system, T, x, sources.rows)

    # psi - ell^2 chi, as a slope along one direction that holds the ridge.
    unit = jnp.asarray(np.eye(v.size), v.dtype)
    along = unit[NOISE] - ell**2 * unit[START]
    tau_along = slopes.tau @ along
    along = along - ell / Z * tau_along * unit[ELL]
    moves = slopes.T @ along, along
    (F_t, F_v), (F_t_along, F_v_along) = jax.jvp(jax.grad(F, (0, 1)), (t, v), moves)
    slope = F_v + F_t @ slopes.T
    share = ell * slope[ELL] / Z
    adjoint = (F_t - share * output_column(system, x)) @ slopes.inverse

    def constraints(t, v):
        sources, _, x = at(t, v)
        new, output = update(system, x, sources.noise)
        return adjoint @ (symmetric.T @ new.ravel()) - share * tau(system, output, sources)

    _, (c_t_along, c_v_along) = jax.jvp(jax.grad(constraints, (0, 1)), (t, v), moves)
    second = F_v_along + c_v_along + (F_t_along + c_t_along) @ slopes.T
    first = held(root, slopes, second)
    rest = held(root, slopes, slope) - 2 * share * held(root, slopes, slopes.tau)
    first = first - tau_along / Z * rest
    psi, chi = (slope[i] - share * slopes.tau[i] for i in (NOISE, START))
    return per_task(system, first + slopes.tau[MEANS] / Z * (psi + ell**2 * chi))
