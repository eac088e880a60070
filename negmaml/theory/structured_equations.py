r"""The equations of the structured theory; negmaml/theory/structured.md derives them.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.numerics import contract
from negmaml.rules.pencil import Pencil

POWERS = 4  # of Sigma by which the distance may be weighted: 1, Sigma, Sigma^2, Sigma^3


class System(NamedTuple):
    s: jax.Array
    count: jax.Array
    o: jax.Array
    d: jax.Array
    m: jax.Array
    n_t: jax.Array
    n_v: jax.Array
    sigma: jax.Array
    ridge: jax.Array
    pencil: Pencil


class Sources(NamedTuple):
    ell: jax.Array
    powers: jax.Array   # (POWERS,)
    rows: jax.Array
    noise: jax.Array
    start: jax.Array


def no_sources(ell):
    zero = jnp.zeros_like(ell)
    return Sources(ell, jnp.zeros(POWERS, ell.dtype), zero, zero, zero)


class Response(NamedTuple):
    phi: jax.Array   # (k,)
    mean: jax.Array   # (d, k)
    spread: jax.Array   # (d, d, k)


def response(system: System, T) -> Response:
    pencil, s = system.pencil, system.s
    size, r = pencil.constant.shape[0], pencil.coupling.shape[0]
    inner = slice(pencil.first, pencil.first + r)
    form = jnp.zeros_like(pencil.constant).at[inner, inner].set(T).at[-1, -1].add(1.0)
    form = pencil.constant[..., None] + form[..., None] * s
    for j in range(size - 1, 0, -1):
        pivot, column = form[j, j], form[:, j]
        form = form - column[:, None] * column[None] / pivot
        form = form.at[j].set(column / pivot).at[:, j].set(column / pivot).at[j, j].set(-1 / pivot)
    mean = (-form[:, 0]).at[0].set(1.0)
    spread = (-form).at[0].set(0.0).at[:, 0].set(0.0)
    return Response(form[0, 0], mean, spread)


class State(NamedTuple):
    total: jax.Array   # variance of omega (k,)
    phi: jax.Array
    mean: jax.Array
    spread: jax.Array
    kappa: jax.Array


def state(system: System, T, at: Sources) -> State:
    phi, mean, spread = response(system, T)
    soft = at.noise * system.o
    damp = 1 / (1 + soft * phi)
    spread = spread + mean[:, None] * mean[None] * (soft * damp)
    mean, phi = mean * damp, phi * damp
    own = at.ell + at.start * system.d / jnp.where(system.count > 0, system.count, 1)
    for power in range(POWERS):
        own = own + at.powers[power] * system.s**power
    total = 1 / (own + system.m * phi)
    return State(total, phi, mean, spread, own + (system.m - 1) * phi)


def overlaps(system, x: State):
    """G of one task (d, d, k)."""
    return x.spread + x.mean[:, None] * x.mean[None] * x.total


def inner_block(pencil, matrix):
    inner = slice(pencil.first, pencil.first + pencil.coupling.shape[0])
    return matrix[inner, inner]


def step(system: System, T, at: Sources):
    """New T, and g_out."""
    pencil = system.pencil
    G = overlaps(system, state(system, T, at)) * (system.count * system.s)
    g = jnp.sum(inner_block(pencil, G), -1)
    points = at.noise * system.sigma**2 * jnp.outer(pencil.points, pencil.points)
    A = pencil.coupling
    new = jnp.linalg.solve(jnp.eye(A.shape[0]) + A @ (g + points) / system.n_t, A)
    return (new + new.T) / 2, jnp.sum(G[-1, -1])


def tau(system: System, T, at: Sources):
    return system.n_v / (1 - at.rows) - at.noise * system.sigma**2 - step(system, T, at)[1]


def limit_sources(system: System, T, at: Sources):
    """u and R (at noise = 0)"""
    x = state(system, T, at)
    points = system.pencil.points
    noise = system.sigma**2 * (1 + points @ T @ points)
    u = noise + jnp.sum(system.count * system.o * x.kappa * x.phi * x.total)
    return u, jnp.sum(system.d * x.total)


def bases(r: int):
    """Orthonormal bases of symmetric and antisymmetric r x r matrices, as (r^2, .)"""
    i, j = np.triu_indices(r)
    S = np.zeros((r, r, i.size))
    for a, (x, y) in enumerate(zip(i, j)):
        S[x, y, a] = S[y, x, a] = 1.0 if x == y else 0.5**0.5
    i, j = np.triu_indices(r, 1)
    A = np.zeros((r, r, i.size))
    for a, (x, y) in enumerate(zip(i, j)):
        A[x, y, a], A[y, x, a] = 0.5**0.5, -(0.5**0.5)
    return S.reshape(r * r, -1), A.reshape(r * r, -1)


def fluctuations(system: System, T, at: Sources):
    """F of the 1/p term."""
    pencil, m = system.pencil, system.m
    x = state(system, T, at)
    G = overlaps(system, x)
    r = pencil.coupling.shape[0]
    S, A = bases(r)
    weight = system.count * system.s**2
    inner = slice(pencil.first, pencil.first + r)

    def pairs(M):
        """(P on r^2 x r^2; p_out r^2; p_oo)"""
        B = M[inner, inner]
        P = jnp.einsum("ikn,jln->ijkl", B * weight, B).reshape(r * r, r * r)
        out = M[inner, -1]
        p_out = jnp.einsum("in,jn->ij", out * weight, out).reshape(r * r)
        return P, p_out, jnp.sum(weight * M[-1, -1] ** 2)

    TT = jnp.kron(T, T) / system.n_t
    row = (1 - at.rows) ** 2 / system.n_v

    def symmetric(P, p_out, p_oo):
        TS = S.T @ TT @ S
        top = jnp.concatenate([TS @ (S.T @ P @ S), (TS @ (S.T @ p_out))[:, None]], 1)
        bottom = jnp.concatenate([row * (S.T @ p_out), (row * p_oo)[None]])[None]
        M = jnp.concatenate([top, bottom], 0)
        return jnp.linalg.slogdet(jnp.eye(M.shape[0]) - M)[1]

    own = pairs(G)
    cross = pairs(x.mean[:, None] * x.mean[None] * x.total)
    minus = symmetric(*(a - b for a, b in zip(own, cross)))
    plus = symmetric(*(a + (m - 1) * b for a, b in zip(own, cross)))
    anti = jnp.linalg.slogdet(jnp.eye(A.shape[1]) - (A.T @ TT @ A) @ (A.T @ own[0] @ A))[1]
    return ((m - 1) * minus + plus - m * anti) / 2
