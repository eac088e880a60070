"""Checks of arguments: each raises an error with the name, the value and the allowed values.

They return the value in the form that the package works with: fractions as floats, lists of numbers
as arrays, NumPy integers as Python integers. Traced values are returned unchanged.
"""

import inspect
import reprlib
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

import jax
import numpy as np

from negmaml._core.taylor import Node

_SHORT = reprlib.Repr()
_SHORT.maxother = _SHORT.maxstring = 120


def short_repr(value) -> str:
    """The repr of a value, shortened to one line."""
    return " ".join(_SHORT.repr(value).split())


def check_count(name: str, value) -> int:
    """Return `value` as an int if it is an integer of at least 1; else raise."""
    # True and False are Integral, but not meant as counts.
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(
            f"{name} must be an integer of at least 1, got {short_repr(value)}; use int(...)"
        )
    if value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return int(value)


def check_choice(name: str, value, allowed: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of the allowed strings."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, allowed))}, got {short_repr(value)}"
        )


def check_flag(name: str, value) -> bool:
    """Return `value` as a bool; raise TypeError unless it is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {short_repr(value)}")
    return bool(value)


def check_callable(name: str, value, form: str) -> Any:
    """Return `value`; raise TypeError unless it is callable.

    form: its arguments or result in words, for the message.
    """
    if not callable(value):
        raise TypeError(f"{name} must be a function {form}, got {short_repr(value)}")
    return value


def check_takes(name: str, value, form: str, count: int) -> Any:
    """Return `value`; raise TypeError unless it can be called with `count` positional arguments."""
    check_callable(name, value, form)
    try:
        inspect.signature(value).bind(*range(count))
    except TypeError as mismatch:
        raise TypeError(
            f"{name} must be a function {form}, got {short_repr(value)} ({mismatch})"
        ) from None
    except ValueError:  # a function in C without a signature
        pass
    return value


def check_finite(name: str, value, meaning: str) -> Any:
    """Return the pytree `value` if all its numbers are real and finite, of any sign; else raise."""
    structure: Any
    # None is an empty pytree for JAX and would pass unseen.
    leaves, structure = jax.tree.flatten(value, is_leaf=lambda x: x is None)
    if not sum(np.size(leaf) for leaf in leaves if not _is_key(leaf)):
        raise ValueError(
            f"{name} must hold at least one number, got {short_repr(value)} ({meaning}); give 0.0 "
            "for none"
        )
    return structure.unflatten([_finite(name, leaf, meaning) for leaf in leaves])


def _finite(name: str, leaf, meaning: str):
    """Return a number or array if it is finite, fractions as floats."""
    if isinstance(leaf, jax.core.Tracer | Node):
        return leaf
    # Fractions become floats, which JAX accepts.
    plain = isinstance(leaf, Real) and not isinstance(leaf, int | float | np.generic)
    leaf = float(leaf) if plain else leaf
    numbers = np.asarray(None if _is_key(leaf) else leaf)
    if numbers.dtype.kind not in "iuf" and not jax.numpy.issubdtype(numbers.dtype, np.floating):
        raise TypeError(f"{name} must hold real numbers, got {short_repr(leaf)} ({meaning})")
    if not np.all(np.isfinite(numbers.astype(float))):
        raise ValueError(
            f"{name} must be finite, got {short_repr(leaf)}; {meaning}: any sign and zero are "
            "allowed, NaN and infinity are not"
        )
    return leaf


def _is_key(leaf) -> bool:
    return jax.dtypes.issubdtype(getattr(leaf, "dtype", np.dtype(float)), jax.dtypes.extended)


def as_array(name: str, value) -> Any:
    """Return lists and tuples of numbers as an array, anything else unchanged."""
    if not isinstance(value, list | tuple) or (
        isinstance(value, tuple) and hasattr(value, "_fields")
    ):
        return value
    leaves = jax.tree.leaves(value, is_leaf=lambda x: x is None)
    # Lists with JAX arrays, traced or not, are stacked by JAX and stay differentiable.
    if any(isinstance(leaf, jax.Array) for leaf in leaves):
        return jax.numpy.stack([jax.numpy.asarray(as_array(name, part)) for part in value])
    fractions = any(isinstance(leaf, Real) and not isinstance(leaf, int | float | np.generic)
                    for leaf in leaves)  # fmt: skip
    try:
        return np.asarray(value, float if fractions else None)
    except (ValueError, TypeError) as ragged:
        raise ValueError(
            f"{name} must be a number or a list of numbers, rows of one length, got "
            f"{short_repr(value)}"
        ) from ragged


def check_array(name: str, value, meaning: str, least: float = -np.inf, strict=False) -> Any:
    """Return a number, array or list of finite numbers of at least (strict: above) `least`."""
    value = as_array(name, value)
    if not jax.tree_util.all_leaves([value]):
        raise TypeError(f"{name} must be a number or an array, got {short_repr(value)} ({meaning})")
    value = check_finite(name, value, meaning)
    if isinstance(value, jax.core.Tracer) or least == -np.inf:
        return value
    lowest = np.min(np.asarray(value, float))
    if lowest < least or (strict and lowest == least):
        bound = f"above {least:g}" if strict else f"at least {least:g}"
        raise ValueError(f"{name} must be {bound} ({meaning}), got {short_repr(value)}")
    return value


def check_scalar(name: str, value, meaning: str) -> Any:
    """Return `value` if it is one finite number; else raise."""
    value = check_array(name, value, meaning)
    if np.ndim(value) != 0:
        raise ValueError(
            f"{name} must be a scalar, got shape {np.shape(value)}; "
            f"use jax.vmap for several values of {name}"
        )
    return value


def check_nonnegative(name: str, value, meaning: str) -> Any:
    """Return `value` if it is a finite scalar of at least 0; else raise."""
    value = check_scalar(name, value, meaning)
    if not isinstance(value, jax.core.Tracer) and value < 0:
        raise ValueError(f"{name} must be at least 0 ({meaning}), got {value!r}")
    return value


def check_positive(name: str, value) -> float:
    """Return a number above zero as a float; else raise."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number above 0, such as 1e-6, got {short_repr(value)}")
    number = float(value)
    if not 0 < number < float("inf"):
        raise ValueError(f"{name} must be a finite number above 0, such as 1e-6, got {value!r}")
    return number


def check_broadcast(shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape that named arrays broadcast to; raise ValueError if they do not."""
    try:
        return np.broadcast_shapes(*shapes.values())
    except ValueError as mismatch:
        given = ", ".join(f"{name} {shape}" for name, shape in shapes.items() if shape)
        raise ValueError(
            f"shapes of {', '.join(shapes)} must broadcast against each other, got {given}; give "
            "each an axis of its own, x[:, None], or one length"
        ) from mismatch


def check_symmetric(name: str, matrix, semidefinite: bool = True) -> None:
    """Raise unless `matrix` is square, finite, symmetric and, by default, positive semidefinite.

    Errors of the size of rounding in a product of matrices of its precision are allowed.
    """
    shape = np.shape(matrix)
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"{name} must be a square matrix, got shape {shape}")
    check_finite(name, matrix, "a symmetric matrix")
    if isinstance(matrix, jax.core.Tracer):
        return
    given = np.asarray(matrix)
    # Asymmetry and eigenvalues are judged by the precision of the given entries.
    single = given.dtype.kind == "f" and given.dtype.itemsize < 8
    numbers = given.astype(float)
    # Errors of a product grow with its number of terms.
    rounding = len(numbers) * (1e-6 if single else 1e-13) * np.abs(numbers).max()
    gap = np.abs(numbers - numbers.T).max()
    if gap > rounding:
        raise ValueError(
            f"{name} must be symmetric, got entries that differ by {gap:.3g} from those across the "
            "diagonal; use (A + A.T) / 2 if that is what you mean"
        )
    if semidefinite:
        _check_semidefinite(name, numbers, rounding)


def _check_semidefinite(name: str, matrix: np.ndarray, rounding: float) -> None:
    # Cholesky needs a definite matrix; the shift by the rounding errors makes it one.
    try:  # a Cholesky factorization takes a third of the time of eigenvalues
        np.linalg.cholesky(matrix + max(rounding, np.finfo(float).tiny) * np.eye(len(matrix)))
    except np.linalg.LinAlgError:
        least = np.linalg.eigvalsh(matrix)[0]
        raise ValueError(
            f"{name} must be positive semidefinite, got an eigenvalue of {least:.3g}; a covariance "
            "matrix has none below 0"
        ) from None


def check_optional(check: Callable[[str, Any], Any], name: str, value) -> Any:
    """Return None for None, else the result of check(name, value)."""
    return None if value is None else check(name, value)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """ "; did you mean ...?" with the nearest valid name, or nothing."""
    close = get_close_matches(name, list(names), 1, 0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
