"""Checks of what a user gives: each raises an error that names the argument and what is allowed."""

from collections.abc import Sequence
from numbers import Integral

import jax
import numpy as np


def check_count(name: str, value) -> int:
    """`value` as an int, if it is an integer of at least 1; raises otherwise."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer of at least 1, got {value!r}; use int(...)")
    if value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return int(value)


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise unless `value` is one of the allowed ones."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_key(name: str, key) -> None:
    """Raise unless `key` is one random key of JAX, typed or an array of raw uint32."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
    raw = dtype == np.uint32 and isinstance(key, jax.Array | np.ndarray)
    if not (typed or raw):
        seed = key if isinstance(key, Integral) and not isinstance(key, bool) else 0
        raise TypeError(
            f"{name} must be a random key, got {key!r}; write {name}=jax.random.key({seed})"
        )
    if len(shape or ()) != (0 if typed else 1):
        raise ValueError(
            f"{name} must be one random key, got an array of shape {shape}; "
            "use jax.vmap for several keys"
        )


def check_finite(name: str, value, meaning: str) -> None:
    """Raise unless every number of the pytree `value` is real and finite; the sign is free."""
    for leaf in jax.tree.leaves(value, is_leaf=lambda x: x is None):
        if isinstance(leaf, jax.core.Tracer):
            continue
        numbers = np.asarray(leaf)
        if numbers.dtype.kind not in "iuf" and not jax.numpy.issubdtype(numbers.dtype, np.floating):
            raise TypeError(f"{name} must hold real numbers, got {leaf!r} ({meaning})")
        if not np.all(np.isfinite(numbers.astype(float))):
            raise ValueError(
                f"{name} must be finite, got {leaf!r}; {meaning}: any sign and zero are allowed, "
                "NaN and infinity are not"
            )


def check_nonnegative(name: str, value, meaning: str) -> None:
    """Raise unless `value` is a finite scalar of at least 0."""
    if np.ndim(value) != 0:
        raise ValueError(
            f"{name} must be a scalar, got shape {np.shape(value)}; "
            f"use jax.vmap for several values of {name}"
        )
    check_finite(name, value, meaning)
    if not isinstance(value, jax.core.Tracer) and value < 0:
        raise ValueError(f"{name} must be at least 0 ({meaning}), got {value!r}")


def check_symmetric(name: str, matrix, semidefinite: bool = True) -> None:
    """Raise unless `matrix` is square, finite, symmetric and, if asked, positive semidefinite."""
    shape = np.shape(matrix)
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"{name} must be a square matrix, got shape {shape}")
    check_finite(name, matrix, "a symmetric matrix")
    if isinstance(matrix, jax.core.Tracer):
        return
    numbers = np.asarray(matrix, float)
    size = max(np.abs(numbers).max(), np.finfo(float).tiny)
    gap = np.abs(numbers - numbers.T).max()
    if gap > 1e-5 * size:  # the rounding of a float32 product
        raise ValueError(
            f"{name} must be symmetric, but entries differ from their mirror by up to {gap:.3g}; "
            "pass (A + A.T) / 2 if that is rounding"
        )
    lowest = np.linalg.eigvalsh((numbers + numbers.T) / 2)[0] if semidefinite else 0.0
    if lowest < -1e-5 * size * shape[0] ** 0.5:
        raise ValueError(
            f"{name} must be positive semidefinite, its lowest eigenvalue is {lowest:.3g}"
        )
