r"""From a kernel matrix to the meta-system, in function values instead of parameters.

f = f_0 + <omega, psi(x)> with k(x, x') = <psi(x), psi(x')>. On task i a spectral rule q moves omega
by Psi_t^T q(K_tt / n_t) (y_t - f_t) / n_t, since Psi_t^T q(Psi_t Psi_t^T / n_t) = q(S) Psi_t^T. So
the residual on the query after adapting is linear in the values of f before it:

    y_v - f'_v = (y_v - f_v) - C (y_t - f_t),      C = K_vt q(K_tt / n_t) / n_t        (n_v x n_t)

With A the matrix of all tasks, [I, -C] on (query, support) of each, Phi = A Psi is the meta-system
of `negmaml.linear.system`, and Phi Phi^T and the other products that a solution needs are

    G = A K A^T = K_vv - C K_tv - (C K_tv)^T + C K_tt C^T,      H = K_t: A^T = K_tv - K_tt C^T

with C block-diagonal. For one gradient step C = rate K_vt / n_t: G is a quadratic in the rate, H is
linear.

Sizes below: T = m n_t support points and N = m n_v query points of m tasks; M = T + N.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from negmaml._core.arrays import contract, outer
from negmaml._core.factorisations import eigh
from negmaml.kernels.points import TILE
from negmaml.rules import InnerRule, check_filters


class TaskBlocks(NamedTuple):
    """The blocks of the kernel within each task, on support (t) and query (v) points.

    tt: (m, n_t, n_t).   vt: (m, n_v, n_t).
    """

    tt: jax.Array
    vt: jax.Array


def check_spectral(rule: InnerRule) -> InnerRule:
    """Return the rule, lists of numbers as arrays, if it is a function of S; else raise."""
    rule = check_filters("rule", rule)
    filters = rule.spectral()
    # Raises early, without computing, if the rule has no filter.
    jax.eval_shape(filters.label_filter, 0.0)
    if filters.preconditioner is not None:
        raise TypeError(
            f"rule must act in the kernel's own geometry, got {rule!r} with a preconditioner; "
            "put the preconditioner P into the kernel, psi(x)^T P psi(x')"
        )
    return rule


def task_blocks(K, m: int, n_t: int) -> TaskBlocks:
    """The blocks of a kernel matrix that lie within a task."""
    T = m * n_t
    # Advanced indices pick block (i, i) of each task i.
    each = jnp.arange(m)
    tt = K[:T, :T].reshape(m, n_t, m, n_t)[each, :, each]
    vt = K[T:, :T].reshape(m, -1, m, n_t)[each, :, each]
    return TaskBlocks(tt, vt)


@partial(jax.jit, static_argnames="sizes")
def task_kernels(kernel, x, sizes: tuple[int, int, int]) -> TaskBlocks:
    """The kernel within each of many tasks, a few tasks at a time."""
    m, n_t, n_v = sizes
    x_t, x_v = (part.reshape(m, -1, *x.shape[1:]) for part in (x[: m * n_t], x[m * n_t :]))

    def blocks(points):
        x_t, x_v = points
        # A kernel's rounding may break the symmetry that eigh assumes.
        K = kernel(x_t, x_t)
        return TaskBlocks((K + K.T) / 2, kernel(x_v, x_t))

    return lax.map(blocks, (x_t, x_v), batch_size=min(m, max(1, TILE // (n_t + n_v))))


def responses(blocks: TaskBlocks, rule: InnerRule):
    """C of each task, rule shape + (m, n_v, n_t)."""
    n_t = blocks.tt.shape[-1]
    if rule.spectral().constant_filter is not None:
        rate, D = outer(rule.spectral().constant_filter, blocks.vt / n_t)
        return rate.astype(D.dtype) * D
    # C = K_vt q(K_tt / n_t) / n_t by the eigendecomposition of K_tt / n_t.
    x, V = jax.vmap(eigh)(blocks.tt / n_t)
    filtered = rule.spectral().label_filter(jnp.maximum(x, 0)).astype(V.dtype) / n_t
    return contract("ivt,itk,...ik,isk->...ivs", blocks.vt, V, filtered, V)


class KernelSystem(NamedTuple):
    """G of shape (N, N), H of shape (T, N) and C of shape (m, n_v, n_t), at one rule."""

    G: jax.Array
    H: jax.Array
    C: jax.Array


def systems(
    K, blocks: TaskBlocks, rule: InnerRule
) -> tuple[Callable[[jax.Array], KernelSystem], jax.Array]:
    """Return (a function of one entry of a list, the list): a system for each rate of the rule.

    Map the function over the list one by one, so that only one G is in memory. For one gradient
    step, a further rate costs no matrix product.
    """
    m, n_v, n_t = blocks.vt.shape
    T = m * n_t
    tt, tv, vv = K[:T, :T], K[:T, T:], K[T:, T:]

    def times(C, matrix):  # C block-diagonal
        return contract("ivt,itn->ivn", C, matrix.reshape(m, n_t, -1)).reshape(m * n_v, -1)

    def linear_part(C):
        """C K_tv and its transpose, and (C K_tt)^T."""
        across = times(C, tv)
        return across + across.T, times(C, tt).T

    if rule.spectral().constant_filter is not None:
        # One gradient step has C = rate D: G is quadratic and H linear in the rate.
        D = blocks.vt / n_t
        G_1, H_1 = linear_part(D)
        G_2 = times(D, H_1)

        def at(rate):
            rate = rate.astype(K.dtype)
            return KernelSystem(vv - rate * G_1 + rate**2 * G_2, tv - rate * H_1, rate * D)

        return at, jnp.ravel(rule.spectral().constant_filter)

    def of_response(C):
        G_1, H_1 = linear_part(C)
        return KernelSystem(vv - G_1 + times(C, H_1), tv - H_1, C)

    return of_response, responses(blocks, rule).reshape(-1, m, n_v, n_t)


def right_side(C, y_t, y_v):
    """A (y - f_0), (m, n_v, o)."""
    return y_v.astype(C.dtype) - contract("ivt,ito->ivo", C, y_t.astype(C.dtype))


@jax.jit
def adapted_losses(blocks: TaskBlocks, rule: InnerRule, support, query):
    """Losses of tasks after adapting, from the residuals of the labels before it.

    support: batch + (m, n_t, o).   query: batch + (m, n_v, o).
    Returns half the mean squared error on the query, batch + the rule's shape + (m,).
    """
    C = responses(blocks, rule)
    *batch, m, n_t, outputs = support.shape
    s = support.reshape(-1, m, n_t, outputs)
    v = query.reshape(len(s), m, -1, outputs)

    def one(C):
        after = v - contract("ivt,bito->bivo", C, s)
        return jnp.mean(after**2, (-2, -1)) / 2

    # One rule at a time bounds the memory.
    losses = lax.map(one, C.reshape(-1, *C.shape[-3:]))  # rules, batch, m
    return jnp.moveaxis(losses, 0, 1).reshape(*batch, *rule.batch_shape, m)
