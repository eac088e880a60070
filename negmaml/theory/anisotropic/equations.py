r"""The saddle point equations (A4) to (A7) of anisotropic.md: any covariances, any pencil.

In the eigenbasis of the input covariance, with s its eigenvalues, the mean over the data of a task
replaces S by T Sigma in the task's pencil. T is one small symmetric matrix on the *active*
variables, those that the pencil's A involves. Per eigenvalue, the task's variables z given omega
have the precision C + s (T + e e^T), where e is the unit vector of the output variable. Eliminating
z gives the precision phi(s) that the task adds to omega, the conditional mean z = r omega and the
conditional covariance K_c. Then

    v = 1/(ell + m phi)                    variance of omega, all m tasks together           (A4)
    G = K_c + r r^T v                      second moments within a task, r r^T v across two  (A5)
    T = A (1 + g A/n_t)^{-1},              g = sum_k s_k G(s_k)                              (A6)
    tau = n_v - e^T g e,                   ridge = ell tau                                   (A7)

in units of tau, the weight of a task's query rows. If the outer loss is on the training points
themselves (`Pencil.train_train`), each row of data enters as A/n_t + e e^T. With T_0 the T above,

    T = T_0 + f f^T,    f = e - T_0 g e/n_t,    tau = n_t - e^T g f                          (A22)

then stands for T + e e^T, with e among the active variables. Elsewhere f is e.
"""

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.arrays import contract, namespace
from negmaml._core.display import add_fields_repr
from negmaml._core.factorisations import inverse
from negmaml._core.settings import own_settings
from negmaml.rules.pencil import Pencil


@add_fields_repr
class FourthMoments(NamedTuple):
    """Covariances of the squared components x_k^2/s_k of inputs, less those of Gaussian inputs.

    They are sum_ab bin_weights_ak covariance_ab bin_weights_bl: a function of two eigenvalues that
    is known on a few bins. bin_weights: (J, k). covariance: (J, J).
    """

    bin_weights: jax.Array
    covariance: jax.Array


class PencilSystem(NamedTuple):
    """One training set in the terms of this theory; all numbers are real and traced.

    s, count: the distinct positive eigenvalues of the input covariance and their counts, (k,).
    o: nu^2/p times the weights' covariance on them, a mean over equal eigenvalues, (k,).
    d: squared components of omega_0 - w0, a sum over equal eigenvalues, (k,).
    weights: the quadratic forms of omega* - w0, by their values on the eigenvalues, (J, k).
    m, n_t, n_v, sigma, ridge: as in the problem. pencil: of the rule.
    fourth_moments: of inputs that are not Gaussian, else None.
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
        """d per direction: a mean over equal eigenvalues, (k,)."""
        return self.d / namespace(self.count).where(self.count > 0, self.count, 1)


class Marginal(NamedTuple):
    """phi (k,), r (d, k), K_c (d, d, k) and v (k,) of (A4) and (A5), per eigenvalue."""

    phi: jax.Array
    mean: jax.Array
    cov: jax.Array
    v: jax.Array

    def cross_task(self):
        """Return G across two tasks, (d, d, k)."""
        return self.mean[:, None] * (self.mean * self.v)

    def within_task(self):
        """Return G within a task, (d, d, k)."""
        return self.cov + self.cross_task()


def marginal(system: PencilSystem, T, ell) -> Marginal:
    """Return the `Marginal` of every eigenvalue at given T and ell."""
    pencil = system.pencil
    # The precision C + s (T + e e^T); a train-train T holds e e^T already.
    data = pad_to_pencil(pencil, T)
    if not pencil.train_train:
        data = data + output_matrix(pencil, T.dtype)
    phi, mean, cov = marginalize(pencil.constant[..., None] + data[..., None] * system.s)
    return Marginal(phi, mean, cov, 1 / (ell + system.m * phi))


def output_matrix(pencil: Pencil, dtype):
    """Return e e^T, (d, d)."""
    d = pencil.constant.shape[0]
    return np.diag(np.arange(d) == d - 1).astype(dtype)


def pad_to_pencil(pencil: Pencil, T):
    """Return a matrix on the active variables as one on all variables, (d, d, ...)."""
    first, last = pencil.active
    padding = [(first, pencil.constant.shape[0] - last)] * 2 + [(0, 0)] * (T.ndim - 2)
    return namespace(T).pad(T, padding)


def pencil_blocks(pencil: Pencil, G, f=None):
    """Return G (a, a, k) on active variables, G f (a, k) and f^T G f (k,); f = e if None."""
    xp = namespace(G)
    active = slice(*pencil.active)
    inner = G[active, active]
    if f is None:
        return inner, G[active, -1], G[-1, -1]
    outer = xp.sum(inner * f[:, None], 1)
    return inner, outer, xp.sum(outer * f[:, None], 0)


def contract_output(pencil: Pencil, values, f=None):
    """Return f^T values for values of shape (d, ...); f = e if None."""
    if f is None:
        return values[-1]
    return contract("i,i...->...", f, values[slice(*pencil.active)])


def marginalize(form):
    """Return (phi, r, K_c) of quadratic forms (d, d, k), eliminating all variables but the first.

    A pencil is quasi-definite, positive on points and negative on multipliers, so no pivot
    vanishes if variables are eliminated from the last to the first. The forms lie along the last
    axis, which vectorises.
    """
    return (_traced_marginalize if namespace(form) is jnp else _marginalize)(form)


def _marginalize(form):
    xp = namespace(form)
    cov = 1 / form[-1:, -1:]
    for j in range(form.shape[0] - 2, -1, -1):
        column = form[j, j + 1 :]
        mean = -xp.sum(cov * column, 1)
        # The Schur complement of all later variables, and their regression on variable j.
        pivot = form[j, j] + xp.sum(column * mean, 0)
        mean = xp.pad(mean, ((1, 0), (0, 0)), constant_values=1)
        cov = xp.pad(cov, ((1, 0), (1, 0), (0, 0)))
        if j:  # omega itself, j = 0, is not integrated out
            cov = cov + mean[:, None] * mean[None] / pivot
    return pivot, mean, cov


_traced_marginalize = jax.custom_jvp(_marginalize)


@_traced_marginalize.defjvp
@own_settings
def _marginalize_jvp(primals, tangents):
    (form,), (change,) = primals, tangents
    # One rule in place of the derivative of the elimination, which is several times as long.
    phi, mean, cov = _traced_marginalize(form)
    return (phi, mean, cov), marginal_jvp(mean, cov, change)


def marginal_jvp(mean, cov, change):
    """Return the changes of (phi, r, K_c) with the form L: r^T L' r, -K_c L' r, -K_c L' K_c."""
    xp = namespace(mean, change)
    pull = xp.sum(change * mean, 1)
    product = xp.sum(cov[:, :, None] * change, 1)
    return (
        xp.sum(mean * pull, 0),
        -xp.sum(cov * pull, 1),
        -xp.sum(product[:, :, None] * cov, 1),
    )


def update(system: PencilSystem, x: Marginal):
    """Return (T, g, n_v - tau, f): the right sides of (A6) and (A7), or of (A22)."""
    xp = namespace(x.v)
    A = system.pencil.coupled()
    # g and e^T g e of (A6) and (A7): sums over all eigenvalues with their counts.
    inner, _, corner = pencil_blocks(system.pencil, x.within_task())
    weights = system.count * system.s
    g = contract("ijk,k->ij", inner, weights)
    # T_0 of (A22), which is T of (A6) otherwise.
    T = A @ inverse(np.eye(A.shape[0], dtype=A.dtype) + g @ A / system.n_t)
    T = (T + T.T) / 2  # symmetric but for rounding
    if not system.pencil.train_train:
        return T, g, xp.sum(corner * weights), None
    f = np.eye(A.shape[0], dtype=A.dtype)[-1] - T @ g[:, -1] / system.n_t
    return T + f[:, None] * f, g, g[:, -1] @ f, f


def minus_T_slope(system: PencilSystem, T, f):
    """Return minus the derivative of T in g, on symmetric matrices in the `bases`."""
    xp = namespace(T)
    symmetric, _ = bases(T.shape[0], T.dtype)
    # dT = -T dg T/n_t, as for every inverse.
    R = kron(T)
    if f is not None:  # the unit tau of T moves as well
        square = xp.outer(f, f).ravel()
        R = R - square[:, None] * square
    return sandwich(symmetric, R) / system.n_t


class Overlaps(NamedTuple):
    """The map Gamma of (A13) for one G, X -> sum_k s_k^2 G X G, on the images of R.

    even: on symmetric X of the active variables, and f f^T last, (n + 1, n + 1). odd: on
    antisymmetric X, (n', n'). Both in the `bases`.
    """

    even: jax.Array
    odd: jax.Array


def overlaps(system: PencilSystem, G, f=None) -> Overlaps:
    """Return the `Overlaps` of G, (d, d, k); f = e if None."""
    xp = namespace(G)
    inner, outer, corner = pencil_blocks(system.pencil, G, f)
    weights = system.count * system.s**2
    symmetric, antisymmetric = bases(inner.shape[0], G.dtype)
    # sum_k s_k^2 G_ia G_jb has the indices (i a, j b) of a Gram matrix; Gamma needs (i j, a b).
    flat = inner.reshape(-1, corner.size)
    gram = exchange(contract("xk,yk->xy", flat * weights, flat))
    # The images of R on e: X = f f^T, with sum_k s_k^2 G f f^T G beside it.
    side = contract("ik,jk->ij", outer * weights, outer).ravel() @ symmetric
    last = xp.sum(weights * corner**2)
    return Overlaps(bordered(sandwich(symmetric, gram), side, last), sandwich(antisymmetric, gram))


def total_overlaps(system: PencilSystem, x: Marginal, f):
    """Return Gamma_+ of (A14): within a task, and m - 1 times across, on symmetric X and f f^T."""
    across = overlaps(system, x.cross_task(), f).even
    return overlaps(system, x.within_task(), f).even + (system.m - 1) * across


def bordered(matrix, side, corner):
    """Return a symmetric matrix with one more row and column."""
    xp = namespace(matrix)
    wide = xp.concatenate([matrix, side[:, None]], 1)
    return xp.concatenate([wide, xp.append(side, corner)[None]])


def exchange(gram):
    """Return a matrix (d^2, d^2) with indices (i a, j b) reordered to (i j, a b), or back."""
    d = round(gram.shape[0] ** 0.5)
    return gram.reshape(d, d, d, d).swapaxes(1, 2).reshape(d * d, d * d)


def kron(T, T_2=None):
    """Return the matrix of X -> T X T', with T' = T if None."""
    T_2 = T if T_2 is None else T_2
    size = T.shape[0] * T_2.shape[0]
    return (T[:, None, :, None] * T_2[None, :, None, :]).reshape(size, size)


def bases(a: int, dtype):
    """Return orthonormal bases of symmetric and antisymmetric a x a matrices, as columns."""
    return tuple(basis.astype(dtype) for basis in _bases(a))


# In NumPy, since programs take them as constants.
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
    """Return B^T M B: a map of a x a matrices restricted to the subspace with basis B."""
    return basis.T @ matrix @ basis
