"""What a sweep function takes and gives, found out before anything is computed."""

import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from negmaml.sweeps.grid import Grid


@dataclass(frozen=True)
class Contract:
    """A function and the role of its axes.

    accepts: names of the points it takes, None for any. requires: those without a default.
    static: names that set shapes, None to tell by their values. whole: axes it handles itself.
    output_dims: dimensions of outputs that lead with whole axes.
    """

    function: Callable
    accepts: tuple[str, ...] | None
    requires: tuple[str, ...]
    static: tuple[str, ...] | None
    whole: tuple[str, ...]
    output_dims: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Output:
    """One array that the function returns for a cell: its trailing dims, shape and dtype."""

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of one cell."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def contract(function, static=None, whole=None, output_dims=None) -> Contract:
    """The contract of `function`: its own attributes, its signature, or what the caller says."""
    if not callable(function):
        raise TypeError(f"function must be callable as function(key, **point), got {function!r}")
    accepts, requires = getattr(function, "accepts", None), getattr(function, "requires", ())
    if accepts is None:
        accepts, requires = _signature(function)
    if static is None:
        static = getattr(function, "static_axes", None)
    whole = getattr(function, "whole_axes", ()) if whole is None else whole
    dims = getattr(function, "output_dims", {}) if output_dims is None else output_dims
    static = None if static is None else tuple(static)
    return Contract(function, accepts, tuple(requires), static, tuple(whole), dict(dims))


def _signature(function) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """(accepted names, names without default) after the key."""
    parameters = list(inspect.signature(function).parameters.values())
    kinds = inspect.Parameter
    if not parameters or parameters[0].kind in (kinds.KEYWORD_ONLY, kinds.VAR_KEYWORD):
        raise TypeError(f"function must take a key first: function(key, **point), got {function!r}")
    named = [
        p for p in parameters[1:] if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
    ]
    requires = tuple(p.name for p in named if p.default is kinds.empty)
    if any(p.kind is kinds.VAR_KEYWORD for p in parameters):
        return None, requires
    return tuple(p.name for p in named), requires


def cell_shapes(function, grid: Grid, group: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """What the function returns for one cell of a group of static values."""
    names = [n for axis in grid.axes for n in axis.names if n not in grid.static]
    scalar = jax.ShapeDtypeStruct((), jax.numpy.result_type(float))
    key = jax.eval_shape(lambda: jax.random.key(0))
    call = partial(function, **group, **grid.whole_values())
    shapes = jax.eval_shape(
        lambda key, points: call(key, **points), key, dict.fromkeys(names, scalar)
    )
    if not isinstance(shapes, dict) or not shapes:
        raise TypeError(f"function must return a dict of arrays, got {type(shapes).__name__}")
    return {str(name): shapes[name] for name in sorted(shapes)}


def outputs(contract: Contract, grid: Grid) -> tuple[Output, ...]:
    """What every cell returns; raises ValueError when groups of static values disagree."""
    first: tuple[Output, ...] | None = None
    check = getattr(contract.function, "check", None)
    for group in grid.groups():
        shapes = cell_shapes(contract.function, grid, group)
        found = tuple(_output(name, shapes[name], contract, grid) for name in shapes)
        if first is not None and found != first:
            raise ValueError(
                f"function must return the same keys, shapes and dtypes everywhere; at "
                f"{grid.groups()[0]} it returns {_text(first)}, at {group} {_text(found)}"
            )
        first = found
    if check is not None:
        _check_values(check, grid)
    assert first is not None
    taken = {*grid.dims, *(n for a in (*grid.axes, *grid.whole) for n in a.names), "done", "finite"}
    if clash := taken & {output.name for output in first}:
        raise ValueError(f"function returns {sorted(clash)}, names that the grid or the store uses")
    return first


def _check_values(check: Callable, grid: Grid) -> None:
    """Every value of every axis once, next to the first values of the others."""
    base = {n: axis.column(n)[0] for axis in (*grid.axes, *grid.whole) for n in axis.names}
    for axis in grid.axes:
        for row in axis.values:
            check(**(base | dict(zip(axis.names, row, strict=True))))


def _output(name: str, shape: jax.ShapeDtypeStruct, contract: Contract, grid: Grid) -> Output:
    whole = {axis.names[0]: len(axis) for axis in grid.whole if axis.dim}
    if not hasattr(shape, "shape"):
        raise TypeError(f"function must return a dict of arrays, got a nest at {name!r}")
    if name in contract.output_dims:
        dims = tuple(d for d in contract.output_dims[name] if d in whole or d not in contract.whole)
    else:
        leads = bool(whole) and shape.shape[: len(whole)] == tuple(whole.values())
        dims = tuple(whole) if leads else ()
    dims += tuple(f"{name}_{i}" for i in range(len(dims), len(shape.shape)))
    sizes = dict(zip(dims, shape.shape, strict=False))
    if len(dims) != len(shape.shape) or any(sizes[d] != whole.get(d, sizes[d]) for d in dims):
        raise ValueError(
            f"output {name!r} has shape {shape.shape} and not the dims {dims} of sizes {whole}; "
            "name its dims with output_dims"
        )
    return Output(name, dims, tuple(shape.shape), str(np.dtype(shape.dtype)))


def _text(found: tuple[Output, ...]) -> str:
    return ", ".join(f"{o.name} {o.dtype}{list(o.shape)}" for o in found)


def fingerprint(function) -> str:
    """What makes two runs' functions the same: the name, and the source or the settings."""
    if isinstance(function, partial):
        return f"partial({fingerprint(function.func)}, {function.args!r}, {function.keywords!r})"
    if not hasattr(function, "__qualname__"):  # an object: its class and its settings
        cls = type(function)
        settings = repr(function) if " at 0x" not in repr(function) else ""
        return f"{cls.__module__}.{settings or cls.__qualname__}"
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        source = function.__code__.co_code.hex() if hasattr(function, "__code__") else ""
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    return f"{function.__module__}.{function.__qualname__}#{digest}"
