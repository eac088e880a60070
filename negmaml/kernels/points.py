"""Points of tasks, checked and stacked, and kernel matrices between points.

A kernel is a function (x1, x2) -> matrix of shape (points of x1, points of x2), where points lie
along the first axis. Matrices are made from tiles of at most `TILE` points a side, so that the
memory of a kernel does not grow with the number of points.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from negmaml._core.checks import as_array, check_array, check_callable, check_finite, short_repr
from negmaml._core.pytree import as_pytree
from negmaml.meta import Tasks
from negmaml.meta.batching import as_tasks, leading_axis

TILE = 1024  # points a side


class Points(NamedTuple):
    """Tasks with their points stacked: supports of all tasks first, then queries of all tasks.

    x: (m (n_t + n_v), ...).   y_t: (m, n_t, o).   y_v: (m, n_v, o).
    """

    x: jax.Array
    y_t: jax.Array
    y_v: jax.Array

    @property
    def sizes(self) -> tuple[int, int, int]:
        """m, n_t, n_v."""
        m, n_t = self.y_t.shape[:2]
        return m, n_t, self.y_v.shape[1]


def as_kernel(kernel: Callable) -> Any:
    """Return `kernel` as a pytree; for a kernel of GPJax, its cross-covariance."""
    if not callable(kernel):
        raise TypeError(
            f"kernel must be a function (x1, x2) -> matrix, got {short_repr(kernel)}; a matrix K "
            "of all points is lambda i, j: K[i][:, j] on tasks whose inputs are indices of points"
        )
    return as_pytree(getattr(kernel, "cross_covariance", kernel))


def as_start(name: str, f0) -> Any:
    """Return f_0 as a pytree; raise a TypeError unless it is callable."""
    return as_pytree(check_callable(name, f0, "of points x, with values like the labels"))


def stack(tasks: Tasks, f0: Callable | None) -> tuple[Points, bool]:
    """(points with labels less those of f0, whether labels have an axis of outputs)."""
    tasks = as_tasks(tasks)
    leading_axis("tasks.support and tasks.query", tuple(tasks))
    (x_t, y_t), (x_v, y_v) = (
        pair(f"tasks.{name}", part) for name, part in zip(("support", "query"), tasks, strict=True)
    )
    for name, x, y in (("support", x_t, y_t), ("query", x_v, y_v)):
        if y.ndim not in (2, 3) or x.ndim < 2 or x.shape[:2] != y.shape[:2] or 0 in y.shape:
            raise ValueError(
                f"tasks.{name} must be (x, y) with x of shape (tasks, points, ...) and y of shape "
                f"(tasks, points) or (tasks, points, outputs), got {x.shape} and {y.shape}"
            )
    if x_t.shape[2:] != x_v.shape[2:] or y_t.shape[2:] != y_v.shape[2:]:
        raise ValueError(
            "points of tasks.support and tasks.query must have the same shapes, got x "
            f"{x_t.shape[2:]} and {x_v.shape[2:]}, y {y_t.shape[2:]} and {y_v.shape[2:]}"
        )
    x = _stack(x_t, x_v)
    # Labels relative to f_0, so that training starts from zero.
    start = start_values(f0, x, y_t.shape[2:])
    return Points(x, *_less(y_t, y_v, start)), y_t.ndim == 3


@jax.jit
def _stack(x_t, x_v):
    return jnp.concatenate([x.reshape(-1, *x.shape[2:]) for x in (x_t, x_v)])


@jax.jit
def _less(y_t, y_v, start):
    """Labels less the values of f_0, with an axis of outputs."""
    (m, n_t), n_v, outputs = y_t.shape[:2], y_v.shape[1], start.shape[1]
    y_t = y_t.reshape(m, n_t, -1) - start[: m * n_t].reshape(m, n_t, outputs)
    return y_t, y_v.reshape(m, n_v, -1) - start[m * n_t :].reshape(m, n_v, outputs)


def pair(name: str, part) -> tuple[jax.Array, jax.Array]:
    """Return (x, y) as arrays, y of floating point; raise unless `part` is a pair of arrays."""
    if not isinstance(part, tuple | list) or len(part) != 2:
        raise TypeError(f"{name} must be a pair (x, y) of arrays, got {type(part).__name__}")
    part = tuple(as_array(name, leaf) for leaf in part)
    check_finite(name, [leaf for leaf in part if not np.iscomplexobj(leaf)], "inputs and labels")
    x, y = (jnp.asarray(leaf) for leaf in part)
    if jnp.issubdtype(y.dtype, jnp.complexfloating):
        raise TypeError(
            f"labels in {name} must be real, got {y.dtype}; split them into two outputs"
        )
    return x, y.astype(jnp.result_type(float, y))


def start_values(f0: Callable | None, x, outputs: tuple[int, ...]):
    """f0 at points x, shape (points, outputs or 1); zeros without f0."""
    if f0 is None:
        return np.zeros((len(x), 1), np.float32)
    values = jnp.asarray(f0(x))
    if values.shape != (len(x), *outputs):
        raise ValueError(
            f"f0 must return values like the labels, {(len(x), *outputs)} for {len(x)} points, got "
            f"{values.shape}"
        )
    if jnp.issubdtype(values.dtype, jnp.complexfloating):
        raise TypeError(f"f0 must return real numbers, got {values.dtype}")
    return values.reshape(len(x), -1)


def cross(kernel: Callable, x1, x2) -> jax.Array:
    """The kernel between two sets of points, shape (len(x1), len(x2)), tile by tile."""
    # A single tile needs no concatenation.
    if max(len(x1), len(x2)) <= TILE:
        return _tile(kernel, x1, x2)
    rows = [
        jnp.concatenate([_tile(kernel, x1[i], x2[j]) for j in _tiles(len(x2))], 1)
        for i in _tiles(len(x1))
    ]
    return jnp.concatenate(rows)


def gram(kernel: Callable, x) -> jax.Array:
    """The kernel among points, made exactly symmetric and checked if its values are known.

    Raises ValueError for a kernel that is not finite, symmetric, or positive semidefinite to
    working precision.
    """
    K = cross(kernel, x, x)
    if isinstance(K, jax.core.Tracer):
        return (K + K.T) / 2
    # One program for all checks of a matrix.
    K, scale, gap, definite = _symmetric(K)
    if not np.isfinite(scale):
        raise ValueError("kernel must be finite, got NaN or infinity between points of tasks")
    if gap > _tolerance(K, scale):
        raise ValueError(
            f"kernel must be symmetric, got k(x, x') - k(x', x) of up to {gap:.3g} where values "
            f"are up to {scale:.3g}; give (k(x, x') + k(x', x)) / 2, or float64"
        )
    if scale and not definite:
        raise ValueError(
            "kernel must be positive semidefinite to working precision, got values up to "
            f"{scale:.3g} and an eigenvalue of {jnp.linalg.eigvalsh(K)[0]:.3g}; correct the "
            "kernel, or use float64 if that is rounding"
        )
    return K


@jax.jit
def _symmetric(K):
    """(symmetric K, largest value, largest asymmetry, whether positive semidefinite)."""
    scale, gap, K = jnp.max(jnp.abs(K)), jnp.max(jnp.abs(K - K.T)), (K + K.T) / 2
    # Independent errors of that size in every entry move an eigenvalue by about the square root of
    # the number of rows times it.
    lifted = K + len(K) ** 0.5 * _tolerance(K, scale) * jnp.eye(len(K), dtype=K.dtype)
    return K, scale, gap, jnp.all(jnp.isfinite(lax.linalg.cholesky(lifted)))


def _tolerance(K, scale):
    """The largest error of an entry from rounding in a sum within the kernel."""
    return 100 * jnp.finfo(K.dtype).eps * scale


def _tiles(points: int):
    """Slices that cover all points, at most `TILE` each and of sizes that differ by one at most."""
    # Tiles of nearly one size compile at most two programs per side.
    count = -(-points // TILE)
    ends = [points * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(ends)]


def _tile(kernel: Callable, x1, x2) -> jax.Array:
    K = jnp.asarray(kernel(x1, x2))
    if K.shape != (len(x1), len(x2)):
        raise ValueError(
            f"kernel must return a matrix of shape ({len(x1)}, {len(x2)}) for {len(x1)} and "
            f"{len(x2)} points, got {K.shape}; jax.vmap a kernel of two single points twice"
        )
    if jnp.issubdtype(K.dtype, jnp.complexfloating):
        raise TypeError(f"kernel must return real numbers, got {K.dtype}; take its real part")
    return K.astype(jnp.result_type(float, K))


def check_ridges(meta_ridge):
    """The ridges as an array; ValueError or TypeError unless all are finite and at least 0."""
    ridges = check_array("meta_ridge", meta_ridge, "a ridge, or an array of them", 0)
    return ridges if isinstance(ridges, jax.core.Tracer) else np.asarray(ridges)
