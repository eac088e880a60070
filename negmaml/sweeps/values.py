"""Values of axes that a program can tell apart, and NumPy dtypes for outputs."""

import math
from collections.abc import Collection, Sequence
from functools import cache
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.checks import short_repr
from negmaml.sweeps.grid import Axis

MORE_BITS = "or enable 64 bits: jax.config.update('jax_enable_x64', True)"


def as_value(name: str, value: Any) -> bool | int | float | str:
    """A Python bool, int, float or str; raises ValueError or TypeError for anything else."""
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"grid: axis {name!r} holds a traced value; sweep computes when it is called, so call "
            "it outside of jit, vmap and grad"
        )
    if value is np.ma.masked:
        raise ValueError(f"grid: axis {name!r} holds a masked value; leave it out")
    if np.ndim(value) != 0:
        raise TypeError(
            f"grid: axis {name!r} must hold numbers, strings or truth values, got "
            f"{short_repr(value)}; zip axes with a tuple of names"
        )
    # Scalars of NumPy and JAX become Python's, whose repr enters the address of a cell.
    value = value.item() if hasattr(value, "item") else value
    # Fractions and NumPy scalars of other kinds.
    if isinstance(value, Real) and not isinstance(value, bool | int | float):
        try:
            value = float(value)
        except OverflowError:
            value = math.inf if value > 0 else -math.inf
    if not isinstance(value, bool | int | float | str):
        raise TypeError(
            f"grid: axis {name!r} holds {short_repr(value)}, not a number, string or truth value"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"grid: axis {name!r} holds {value!r}; any finite number is allowed")
    if isinstance(value, str) and ("\0" in value or (not value.isascii() and not _encodes(value))):
        raise ValueError(f"grid: axis {name!r} holds {value!r}, which is no text of Unicode")
    return value


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@cache
def _limits(x64: bool) -> tuple[np.iinfo, np.finfo]:
    """The limits of integers and of floats in JAX's current precision."""
    return (np.iinfo(np.int64), np.finfo(np.float64)) if x64 else (
        np.iinfo(np.int32), np.finfo(np.float32)
    )  # fmt: skip


def canonical(name: str, value: Any, static: bool) -> Any:
    """The canonical value: a float, or for a static axis the value itself; -0.0 becomes 0.0.

    Raises ValueError for a number that JAX's current dtype would change.
    """
    # Adding 0.0 turns -0.0 into 0.0, so that both are the same cell.
    integers, limits = _limits(jnp.result_type(float) == jnp.float64)
    if static:
        _check_range(name, value, integers)
        return value + 0.0 if isinstance(value, float) else value
    if isinstance(value, str):
        raise TypeError(f"grid: axis {name!r} must hold numbers, got {value!r}")
    _check_range(name, value, limits)
    # Integers above 2^24 are not exact in float32.
    held = limits.dtype.type(value)
    if isinstance(value, int) and int(held) != value:
        raise ValueError(
            f"grid: axis {name!r} holds the integer {value}, which {limits.dtype} rounds to "
            f"{int(held)}; give a float if that is meant, name the axis in static, {MORE_BITS}"
        )
    # XLA flushes subnormal numbers to zero.
    if 0 < abs(value) < limits.tiny:
        raise ValueError(
            f"grid: axis {name!r} holds {value!r}, which is 0 in {limits.dtype}, whose smallest "
            f"number is {limits.tiny:.2g}; use 0, {MORE_BITS}"
        )
    return float(value) + 0.0


def _check_range(name: str, value: Any, limits) -> None:
    """Raise unless a value is within the limits of its dtype."""
    most = int(limits.max)
    if isinstance(value, int | float) and not -most - 1 <= value <= most:
        raise ValueError(
            f"grid: axis {name!r} holds {short_repr(value)}, which is beyond {limits.dtype}; use a "
            f"smaller one, {MORE_BITS}"
        )


def check_labels(name: str, values: Sequence) -> None:
    """Raise if an array of labels would change the values of a static axis."""
    # NumPy would turn numbers beside strings into strings, and truth values into numbers.
    texts = [isinstance(value, str) for value in values]
    truths = [isinstance(value, bool) for value in values]
    if any(texts) != all(texts) or any(truths) != all(truths):
        raise TypeError(
            f"grid: axis {name!r} must hold numbers, strings or truth values, and not a mixture, "
            f"got {short_repr(list(values))}"
        )


def indistinct(axis: Axis, static: Collection[str], x64: bool) -> str:
    """A description of two values of an axis that are equal in float32 or float64, or "".

    They would be two cells with the same values and different random numbers.
    """
    dtype = np.dtype(np.float64 if x64 else np.float32)
    columns = [
        axis.column(name) if name in static else np.array(axis.column(name), dtype).tolist()
        for name in axis.names
    ]
    seen: dict[tuple, tuple] = {}
    for row, held in zip(axis.values, zip(*columns, strict=True), strict=True):
        other = seen.setdefault(held, row)
        if other != row:
            both = " and ".join(str(r[0] if len(r) == 1 else r) for r in (other, row))
            return f"axis {','.join(axis.names)} holds {both}, which are one in {dtype}"
    return ""


def numpy_dtype(name: str, dtype: Any) -> str:
    """The smallest NumPy dtype, of at least 8 bits, that holds every value of an output."""
    if jax.dtypes.issubdtype(dtype, jax.dtypes.extended):
        raise TypeError(
            f"output {name!r} holds {dtype}, which no array of NumPy does; return "
            "jax.random.key_data of keys"
        )
    if dtype == jax.dtypes.float0:
        raise TypeError(f"output {name!r} is the derivative by an integer (float0), which is empty")
    # bfloat16 and other types of ml_dtypes are not built into NumPy, so a file cannot name them.
    if np.dtype(dtype).kind in "biufc" and np.dtype(dtype).isbuiltin == 1:
        return str(np.dtype(dtype))
    if jnp.issubdtype(dtype, jnp.floating):
        return "float32"
    return "int8" if jnp.issubdtype(dtype, jnp.signedinteger) else "uint8"
