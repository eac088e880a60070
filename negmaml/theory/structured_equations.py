r"""The equations of the structured theory: any covariance of inputs and of tasks, any pencil.

In the eigenbasis of the input covariance, with s its eigenvalues, averaging over the data of a task
replaces S by T Sigma in the task's pencil, T one small symmetric matrix. Per eigenvalue, the task's
variables z given omega have precision C + s T + s e_out e_out^T, from which follow what the task
adds to the precision of omega, phi(s), and their mean z = r omega and spread K_c given omega:

    v = 1/(ell + m phi)                    variance of omega, all m tasks together
    G = K_c + r r^T v                      second moments of one task's z; r r^T v between two tasks
    T = A (1 + g A/n_t)^{-1},              g = sum_k s_k G(s_k)
    tau = n_v - sum_k s_k G_out,out        weight of a task's query rows;  ridge = ell tau

Everything is in units of tau, in which both limits without ridge, tau = 0 and ell = 0, are regular.
Every average wanted is a derivative in a source (`Sources`) of one function, whose first two terms
in 1/p are here: `limit_slopes` and `fluctuations`. negmaml/theory/structured.md derives all of it.
"""

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.numerics import contract
from negmaml.rules.pencil import Pencil

class System(NamedTuple):
    """One training set as this theory sees it; everything is real and traced.

    s, count: eigenvalues of the input covariance, positive, and how many there are of each, (k,).
    o: nu^2/p times the weights' covariance on them, averaged over equal eigenvalues, (k,).
    d: squared components of omega_0 - w0, summed over equal eigenvalues, (k,).
    weights: the quadratic forms of omega* - w0 wanted, by their values on the eigenvalues, (J, k).
    m, n_t, n_v, sigma, ridge: as in the problem. pencil: of the rule.
    """

    s: jax.Array
    count: jax.Array
    o: jax.Array
    d: jax.Array
    weights: jax.Array
    m: jax.Array
    n_t: jax.Array
    n_v: jax.Array
    sigma: jax.Array
    ridge: jax.Array
    pencil: Pencil

    @property
    def inner(self) -> slice:
        """The pencil's variables that S couples."""
        return slice(self.pencil.first, self.pencil.first + self.pencil.points.shape[0])


class Sources(NamedTuple):
    """What the averages are derivatives in, in units of tau; all but ell are zero in the end.

    ell: ridge on omega. forms: (J,), of ridges `weights`. rows: weight of fresh query rows.
    noise: strength of residuals. start: of a ridge along omega_0 - w0.
    """

    ell: jax.Array
    forms: jax.Array
    rows: jax.Array
    noise: jax.Array
    start: jax.Array


def no_sources(system: System, ell) -> Sources:
    """Only the ridge."""
    zero = jnp.zeros_like(ell)
    return Sources(ell, jnp.zeros(system.weights.shape[0], zero.dtype), zero, zero, zero)


class Marginal(NamedTuple):
    """Per eigenvalue: phi (k,), r (d, k), K_c (d, d, k) of this module's head, and v (k,).

    kappa is what a task sees of all others and the ridge, (k,).
    """

    phi: jax.Array
    mean: jax.Array
    spread: jax.Array
    v: jax.Array
    kappa: jax.Array

    def own(self):
        """G, (d, d, k)."""
        return self.spread + self.between()

    def between(self):
        """G between two tasks, (d, d, k)."""
        return self.mean[:, None] * self.mean[None] * self.v


def eliminate(system: System, T):
    """(phi, r, K_c) of the pencil C + s (T + e_out e_out^T): all variables but omega integrated out."""
    pencil, first = system.pencil, system.pencil.first
    size = pencil.constant.shape[0]
    last = np.zeros((size, size))
    last[-1, -1] = 1
    scaled = jnp.pad(T, (first, size - first - T.shape[0])) + jnp.asarray(last, T.dtype)
    return condition(pencil.constant[..., None] + scaled[..., None] * system.s)


@jax.custom_jvp
def condition(form):
    """(phi, r, K_c) of quadratic forms (d, d, k): variable after variable, from the last.

    A pencil is quasi-definite, positive on points and negative on multipliers, so no pivot
    vanishes in this order. The forms lie along the last axis, which vectorises.
    """
    size = form.shape[0]
    spread = 1 / form[-1:, -1:]
    for j in range(size - 2, -1, -1):
        column = form[j, j + 1 :]
        mean = -jnp.sum(spread * column, 1)
        pivot = form[j, j] + jnp.sum(column * mean, 0)
        mean = jnp.pad(mean, ((1, 0), (0, 0)), constant_values=1)
        spread = jnp.pad(spread, ((1, 0), (1, 0), (0, 0)))
        if j:
            spread = spread + mean[:, None] * mean[None] / pivot
    return pivot, mean, spread


@condition.defjvp
def _condition_jvp(primals, tangents):
    """phi' = r^T L' r,  r' = -K L' r,  K' = -K L' K."""
    (form,), (change,) = primals, tangents
    phi, mean, spread = condition(form)
    moved = jnp.sum(change * mean, 1)
    product = jnp.sum(spread[:, :, None] * change, 1)
    slopes = (
        jnp.sum(mean * moved, 0),
        -jnp.sum(spread * moved, 1),
        -jnp.sum(product[:, :, None] * spread, 1),
    )
    return (phi, mean, spread), slopes


@jax.custom_jvp
def inverse(matrix):
    """Of (..., n, n), with its derivative in products."""
    return jnp.linalg.inv(matrix)


@inverse.defjvp
def _inverse_jvp(primals, tangents):
    found = inverse(primals[0])
    return found, -(found @ tangents[0] @ found)


@jax.custom_jvp
def log_det(matrix):
    """log |det| of (..., n, n)."""
    return jnp.linalg.slogdet(matrix)[1]


@log_det.defjvp
def _log_det_jvp(primals, tangents):
    (matrix,), (change,) = primals, tangents
    return log_det(matrix), jnp.sum(inverse(matrix).mT * change, (-1, -2))


def marginal(system: System, T, at: Sources) -> Marginal:
    """The state of every eigenvalue; `noise` gives each task an omega of its own, variance noise o."""
    phi, mean, spread = eliminate(system, T)
    soft = at.noise * system.o
    damp = 1 / (1 + soft * phi)
    spread = spread + mean[:, None] * mean[None] * (soft * damp)
    mean, phi = mean * damp, phi * damp
    own = at.ell + at.start * per_eigenvalue(system) + contract("j,jk->k", at.forms, system.weights)
    return Marginal(phi, mean, spread, 1 / (own + system.m * phi), own + (system.m - 1) * phi)


def per_eigenvalue(system: System):
    """d of one of several equal eigenvalues."""
    return system.d / jnp.where(system.count > 0, system.count, 1)


def update(system: System, x: Marginal, noise=0.0):
    """(T, sum_k s_k G_out,out): the right-hand sides of the equations for T and tau."""
    pencil = system.pencil
    A, a = pencil.coupling, pencil.points
    weighted = x.own() * (system.count * system.s)
    g = jnp.sum(weighted[system.inner, system.inner], -1)
    g = g + noise * system.sigma**2 * a[:, None] * a[None]
    T = inverse(jnp.eye(A.shape[0], dtype=A.dtype) + A @ g / system.n_t) @ A
    return (T + T.T) / 2, jnp.sum(weighted[-1, -1])


def tau(system: System, output, at: Sources):
    """tau, given sum_k s_k G_out,out."""
    return system.n_v / (1 - at.rows) - at.noise * system.sigma**2 - output


def limit_slopes(system: System, T, x: Marginal):
    """(u, R): the leading terms' slopes in `noise` (of one task) and in `start`.

        u = sigma^2 (1 + a^T T a) + sum_k o_k kappa phi v        R = sum_k d_k v
    """
    a = system.pencil.points
    noise = system.sigma**2 * (1 + a @ T @ a)
    u = noise + jnp.sum(system.count * system.o * x.kappa * x.phi * x.v)
    return u, jnp.sum(system.d * x.v)


def fluctuations(system: System, T, x: Marginal, rows):
    r"""F, the next order: of the Hessian between two copies in the order parameters of all tasks,

        F = { (m-1) log det_S(1 - R Gamma_-) + log det_S(1 - R Gamma_+) - m log det_A(1 - R Gamma) } / 2

    det_S on symmetric, det_A on antisymmetric matrices, with R X = T X T/n_t and, for the query rows,
    X_out/n_v; Gamma = sum_k s_k^2 G X G within a task, Gamma_- less, Gamma_+ with m - 1 times that
    between tasks, which vanishes on antisymmetric matrices.
    """
    own = pairs(system, x.own())
    between = pairs(system, x.between())
    common = pair_sum(own, between, system.m - 1)
    single = pair_sum(own, between, -1.0)
    _, antisymmetric = bases(T.shape[0], T.dtype)
    both = kron(T) / system.n_t
    operators = jnp.stack([symmetric_operator(system, both, x, rows) for x in (single, common)])
    one = jnp.eye(operators.shape[-1], dtype=T.dtype)
    single, common = log_det(one - operators)
    total = (system.m - 1) * single + common
    if antisymmetric.shape[1]:
        operator = sandwich(antisymmetric, both) @ sandwich(antisymmetric, own[0])
        total = total - system.m * log_det(jnp.eye(operator.shape[0], dtype=T.dtype) - operator)
    return total / 2


def pairs(system: System, G):
    """(sum s^2 G X G as a matrix on r x r matrices X, its out-column, its out-out entry)."""
    r = system.pencil.points.shape[0]
    weight = system.count * system.s**2
    inside, out = G[system.inner, system.inner], G[system.inner, -1]
    flat = inside.reshape(r * r, -1)
    gram = contract("an,bn->ab", flat * weight, flat)
    gram = gram.reshape(r, r, r, r).swapaxes(1, 2).reshape(r * r, r * r)
    column = contract("in,jn->ij", out * weight, out).reshape(r * r)
    return gram, column, jnp.sum(weight * G[-1, -1] ** 2)


def kron(T):
    """X -> T X T as a matrix on r x r matrices."""
    r = T.shape[0]
    return (T[:, None, :, None] * T[None, :, None, :]).reshape(r * r, r * r)


def pair_sum(own, between, factor):
    """Gamma within a task plus `factor` times that between tasks."""
    return tuple(a + factor * b for a, b in zip(own, between, strict=True))


def together(system: System, x: Marginal):
    """Gamma_+: what a change of T in all tasks at once does to one task's g."""
    return pair_sum(pairs(system, x.own()), pairs(system, x.between()), system.m - 1)


def output_column(system: System, x: Marginal):
    """Derivative of tau in T, in the basis of symmetric matrices."""
    symmetric, _ = bases(system.pencil.points.shape[0], x.v.dtype)
    return symmetric.T @ together(system, x)[1]


def symmetric_operator(system: System, both, gamma, rows):
    """R Gamma on symmetric matrices (in `bases`) and the query rows, (n + 1, n + 1)."""
    symmetric, _ = bases(system.pencil.points.shape[0], both.dtype)
    gram, column, corner = gamma
    R, column = sandwich(symmetric, both), symmetric.T @ column
    query = (1 - rows) ** 2 / system.n_v
    return jnp.block(
        [
            [R @ sandwich(symmetric, gram), (R @ column)[:, None]],
            [query * column[None], (query * corner)[None, None]],
        ]
    )


def sandwich(basis, matrix):
    """A matrix on r x r matrices, in a basis of a subspace."""
    return basis.T @ matrix @ basis


def bases(r: int, dtype):
    """Orthonormal bases of the symmetric and antisymmetric r x r matrices, columns of (r^2, .)."""
    return tuple(jnp.asarray(basis, dtype) for basis in _bases(r))


@cache
def _bases(r: int):
    unit = np.eye(r * r).reshape(r, r, r * r)
    symmetric = [unit[i, j] + unit[j, i] for i in range(r) for j in range(i, r)]
    antisymmetric = [unit[i, j] - unit[j, i] for i in range(r) for j in range(i + 1, r)]
    return tuple(
        np.array([x / np.linalg.norm(x) for x in vectors]).reshape(-1, r * r).T
        for vectors in (symmetric, antisymmetric)
    )
