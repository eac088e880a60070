r"""The equations of the structured theory: any covariance of inputs and of tasks, any pencil.

In the eigenbasis of the input covariance, with s its eigenvalues, averaging over the data of a task
replaces S by T Sigma in the task's pencil, T one small symmetric matrix on the variables that the
pencil's A involves. Per eigenvalue, the task's variables z given omega have the precision
C + s (T + e e^T), e the variable that is tested, from which follow what the task adds to the
precision of omega, phi(s), and the mean z = r omega and the spread K_c of z given omega:

    v = 1/(ell + m phi)                    variance of omega, all m tasks together
    G = K_c + r r^T v                      second moments of one task's z; r r^T v between two tasks
    T = A (1 + g A/n_t)^{-1},              g = sum_k s_k G(s_k)
    tau = n_v - e^T g e                    weight of a task's query rows;  ridge = ell tau

Everything is in units of tau, in which both limits without ridge, tau = 0 and ell = 0, are regular.

Where the outer loss is on the training points themselves (`Pencil.train_train`), each row of data
enters as A/n_t + e e^T at once. T then stands for T + e e^T above, on e too, with T_0 the T above:

    T = T_0 + f f^T,    f = e - T_0 g e/n_t,    tau = n_t - e^T g f

and T_0 and f both follow from g. Elsewhere f is e.
negmaml/theory/anisotropic.md derives it.
"""

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.arrays import contract, namespace
from negmaml._core.factorisations import inverse
from negmaml._core.settings import own_settings
from negmaml.rules.pencil import Pencil


class FourthMoments(NamedTuple):
    """How squared lengths x_k^2/s_k of inputs along the eigenvectors vary together.

    Their covariance, less that of Gaussian inputs, is the sum of
    ranges_ak covariance_ab ranges_bl; ranges (J, k), covariance (J, J).
    """

    ranges: jax.Array
    covariance: jax.Array


class PencilSystem(NamedTuple):
    """One training set as this theory sees it; everything is real and traced.

    s, count: eigenvalues of the input covariance, positive, and how many there are of each, (k,).
    o: nu^2/p times the weights' covariance on them, averaged over equal eigenvalues, (k,).
    d: squared components of omega_0 - w0, summed over equal eigenvalues, (k,).
    weights: the quadratic forms of omega* - w0 wanted, by their values on the eigenvalues, (J, k).
    m, n_t, n_v, sigma, ridge: as in the problem. pencil: of the rule.
    fourth_moments: fourth moments of inputs that are not Gaussian; None for those that are.
    """

    s: jax.Array
    count: jax.Array  # type: ignore[assignment]
    o: jax.Array
    d: jax.Array
    weights: jax.Array
    m: jax.Array
    n_t: jax.Array
    n_v: jax.Array
    sigma: jax.Array
    ridge: jax.Array
    pencil: Pencil
    fourth_moments: FourthMoments | None = None

    @property
    def start(self):
        """d of each direction, where there are several of one eigenvalue, (k,)."""
        return self.d / namespace(self.count).where(self.count > 0, self.count, 1)


class Marginal(NamedTuple):
    """Per eigenvalue: phi (k,), r (d, k), K_c (d, d, k) of this module's head, and v (k,)."""

    phi: jax.Array
    mean: jax.Array
    spread: jax.Array
    v: jax.Array

    def between(self):
        """G between two tasks, (d, d, k)."""
        return self.mean[:, None] * (self.mean * self.v)

    def own(self):
        """G within a task, (d, d, k)."""
        return self.spread + self.between()


def marginal(system: PencilSystem, T, ell) -> Marginal:
    """The state of every eigenvalue."""
    phi, mean, spread = eliminate(system.pencil, system.s, T)
    return Marginal(phi, mean, spread, 1 / (ell + system.m * phi))


def eliminate(pencil: Pencil, s, T):
    """(phi, r, K_c) of the pencil C + s (T + e e^T): all variables but omega integrated out."""
    data = embedded(pencil, T)
    if not pencil.train_train:
        data = data + np.diag(tested(pencil)).astype(T.dtype)
    return condition(pencil.constant[..., None] + data[..., None] * s)


def tested(pencil: Pencil):
    """e."""
    return np.arange(pencil.constant.shape[0]) == pencil.constant.shape[0] - 1


def embedded(pencil: Pencil, T):
    """T on all variables."""
    xp = namespace(T)
    first, last = pencil.active
    return xp.pad(T, (first, pencil.constant.shape[0] - last))


def parts(pencil: Pencil, G, f=None):
    """G (d, d, k) of variables A involves (a, a, k), G f (a, k) and f^T G f (k,); f = e if None."""
    xp = namespace(G)
    active = slice(*pencil.active)
    inner = G[active, active]
    if f is None:
        return inner, G[active, -1], G[-1, -1]
    outer = xp.sum(inner * f[:, None], 1)
    return inner, outer, xp.sum(outer * f[:, None], 0)


def along_f(pencil: Pencil, values, f=None):
    """f^T values, (d, ...), with f = e if None."""
    if f is None:
        return values[-1]
    return contract("i,i...->...", f, values[slice(*pencil.active)])


def condition(form):
    """(phi, r, K_c) of quadratic forms (d, d, k): variable after variable, from the last.

    A pencil is quasi-definite, positive on points and negative on multipliers, so no pivot
    vanishes in this order. The forms lie along the last axis, which vectorises.
    """
    return (_traced_condition if namespace(form) is jnp else _condition)(form)


def _condition(form):
    """(phi, r, K_c) of quadratic forms (d, d, k): variable after variable, from the last."""
    xp = namespace(form)
    spread = 1 / form[-1:, -1:]
    for j in range(form.shape[0] - 2, -1, -1):
        column = form[j, j + 1 :]
        mean = -xp.sum(spread * column, 1)
        pivot = form[j, j] + xp.sum(column * mean, 0)
        mean = xp.pad(mean, ((1, 0), (0, 0)), constant_values=1)
        spread = xp.pad(spread, ((1, 0), (1, 0), (0, 0)))
        if j:
            spread = spread + mean[:, None] * mean[None] / pivot
    return pivot, mean, spread


_traced_condition = jax.custom_jvp(_condition)


@_traced_condition.defjvp
@own_settings
def _condition_jvp(primals, tangents):
    (form,), (change,) = primals, tangents
    phi, mean, spread = _traced_condition(form)
    return (phi, mean, spread), moved(mean, spread, change)


def moved(mean, spread, change):
    """Changes of (phi, r, K_c) with the form: r^T L' r, -K L' r, -K L' K."""
    xp = namespace(mean, change)
    pull = xp.sum(change * mean, 1)
    product = xp.sum(spread[:, :, None] * change, 1)
    return (
        xp.sum(mean * pull, 0),
        -xp.sum(spread * pull, 1),
        -xp.sum(product[:, :, None] * spread, 1),
    )


def update(system: PencilSystem, x: Marginal):
    """(T, g, n_v - tau, f): the right-hand sides of the equations of this module's head."""
    xp = namespace(x.v)
    A = system.pencil.coupled()
    inner, _, corner = parts(system.pencil, x.own())
    weights = system.count * system.s
    g = contract("ijk,k->ij", inner, weights)
    T = A @ inverse(np.eye(A.shape[0], dtype=A.dtype) + g @ A / system.n_t)
    T = (T + T.T) / 2
    if not system.pencil.train_train:
        return T, g, xp.sum(corner * weights), None
    f = np.eye(A.shape[0], dtype=A.dtype)[-1] - T @ g[:, -1] / system.n_t
    return T + f[:, None] * f, g, g[:, -1] @ f, f


def response(system: PencilSystem, T, f):
    """Less the derivative of T in g, on symmetric matrices in the `bases`."""
    xp = namespace(T)
    symmetric, _ = bases(T.shape[0], T.dtype)
    R = kron(T)
    if f is not None:  # tau, in units of which T is, moves as well
        square = xp.outer(f, f).ravel()
        R = R - square[:, None] * square
    return sandwich(symmetric, R) / system.n_t


class Overlaps(NamedTuple):
    """X -> sum_k s_k^2 G X G, as far as the images of R need it; see `overlaps`.

    even: on symmetric X of the variables A involves and f f^T last, (n + 1, n + 1). odd: on
    antisymmetric X, (n', n'). Both in the `bases`.
    """

    even: jax.Array
    odd: jax.Array


def overlaps(system: PencilSystem, G, f=None) -> Overlaps:
    """Of (d, d, k); f = e if None."""
    xp = namespace(G)
    inner, outer, corner = parts(system.pencil, G, f)
    weights = system.count * system.s**2
    symmetric, antisymmetric = bases(inner.shape[0], G.dtype)
    flat = inner.reshape(-1, corner.size)
    gram = exchange(contract("xk,yk->xy", flat * weights, flat))
    side = contract("ik,jk->ij", outer * weights, outer).ravel() @ symmetric
    last = xp.sum(weights * corner**2)
    return Overlaps(bordered(sandwich(symmetric, gram), side, last), sandwich(antisymmetric, gram))


def bordered(matrix, side, corner):
    """With one more row and column."""
    xp = namespace(matrix)
    wide = xp.concatenate([matrix, side[:, None]], 1)
    return xp.concatenate([wide, xp.append(side, corner)[None]])


def exchange(gram):
    """Between (i a, j b) and (i j, a b), on matrices (d^2, d^2)."""
    d = round(gram.shape[0] ** 0.5)
    return gram.reshape(d, d, d, d).swapaxes(1, 2).reshape(d * d, d * d)


def kron(T):
    """X -> T X T as a matrix on a x a matrices."""
    a = T.shape[0]
    return (T[:, None, :, None] * T[None, :, None, :]).reshape(a * a, a * a)


def bases(a: int, dtype):
    """Orthonormal bases of the symmetric and antisymmetric a x a matrices, columns of (a^2, .)."""
    return tuple(basis.astype(dtype) for basis in _bases(a))


@cache
def _bases(a: int):
    unit = np.eye(a * a).reshape(a, a, a * a)
    symmetric = [unit[i, j] + unit[j, i] for i in range(a) for j in range(i, a)]
    antisymmetric = [unit[i, j] - unit[j, i] for i in range(a) for j in range(i + 1, a)]
    return tuple(
        np.array([x / np.linalg.norm(x) for x in vectors]).T
        for vectors in (symmetric, antisymmetric)
    )


def sandwich(basis, matrix):
    """A matrix on a x a matrices, in a basis of a subspace."""
    return basis.T @ matrix @ basis
