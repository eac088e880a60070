"""The function of a sweep: the axes that it takes, their roles, its outputs and its programs.

Any JAX function `function(key, **point) -> dict of arrays` can be swept; it is wrapped as a
`SweepFunction` with every default. A subclass describes itself in more detail.
"""

import inspect
import json
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.checks import did_you_mean, short_repr
from negmaml._core.deprecation import warn_renamed
from negmaml._core.fingerprint import Identity, UnidentifiedError, identify
from negmaml._core.keys import key_of
from negmaml._core.registry import maker, registered
from negmaml.sweeps.grid import SweepGrid
from negmaml.sweeps.names import check_output_dims, check_output_name, check_outputs
from negmaml.sweeps.parse import name_tuple
from negmaml.sweeps.values import numpy_dtype


# A protocol, so that an object of any class can be swept if it has all members.
@runtime_checkable
class SweepFunction(Protocol):
    """A function for `nm.sweep` that describes its axes: subclass it and write `__call__`.

    Everything else has a default. An object that is not a subclass has to define all members.

    Attributes:
        accepts: the names of its points; None for any.
        requires: the names without a default.
        static_axes: names that set shapes or branches; None for all names whose values are
            integers, strings or truth values.
        vectorized_axes: names it takes as one array each and returns as leading dims. Its outputs
            at one value must not depend on the other values.
        output_dims: the dims of outputs that do not lead with all vectorized axes.

    >>> class Powers(SweepFunction):
    ...     accepts = requires = ("size", "powers")
    ...     vectorized_axes = ("powers",)
    ...     def __call__(self, key, *, size, powers):
    ...         total = jnp.sum(jax.random.normal(key, (size,)))
    ...         return {"value": total ** powers}
    >>> from negmaml.sweeps import sweep
    >>> dict(sweep(Powers(), {"size": [2, 3], "powers": [1.0, 2.0, 4.0]}, 5)["value"].sizes)
    {'size': 2, 'seed': 5, 'powers': 3}
    """

    accepts: tuple[str, ...] | None = None
    requires: tuple[str, ...] = ()
    static_axes: tuple[str, ...] | None = None
    vectorized_axes: tuple[str, ...] = ()
    output_dims: Mapping[str, Sequence[str]] = {}

    if TYPE_CHECKING:  # a subclass may name its points as keywords
        __call__: Callable[..., dict[str, jax.Array]]
    else:

        def __call__(self, key, **point) -> dict[str, jax.Array]:
            """The outputs of one cell: numbers are traced, static values are plain."""
            raise NotImplementedError

    def check(self, **point: Any) -> None:
        """Raise ValueError or TypeError for invalid values; called before anything is traced."""
        return None

    def batched(
        self, keys: jax.Array, numbers: Mapping[str, jax.Array], shared: Mapping[str, Any]
    ) -> dict[str, jax.Array]:
        """`__call__` for keys (B,) and numbers of shape (B,); outputs lead with B.

        shared: static values and vectorized axes, the same for all cells.
        """
        return jax.vmap(lambda key, own: self(key, **shared, **own))(keys, dict(numbers))

    def batch_cells(self, **statics: Any) -> int | None:
        """Cells of one call of the program; None to compute them from its memory."""
        return None

    def compiler_options(self, platform: str, cells: int, **statics: Any) -> dict[str, Any] | None:
        """Compiler options of a program that `cells` cells will use; None for XLA's defaults."""
        return None


class Plain(SweepFunction):
    """Any function as a `SweepFunction`.

    Its names are read from its signature; everything else has the default.
    """

    def __init__(self, function: Callable):
        self.function = function
        self.accepts, self.requires = _signature(function)

    def __call__(self, key, **point):
        return self.function(key, **point)


MEMBERS = ("accepts", "requires", "static_axes", "vectorized_axes", "output_dims", "check",
           "batched", "batch_cells", "compiler_options")  # fmt: skip


@dataclass(frozen=True)
class Roles:
    """A function with the roles of its axes.

    The caller's arguments take precedence over the attributes of the function.
    """

    function: SweepFunction
    static: tuple[str, ...] | None
    vectorized: tuple[str, ...]
    output_dims: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Output:
    """One array that the function returns for a cell.

    dims, shape: the trailing dims of the array and their sizes. dtype: the name of its NumPy dtype.
    """

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of one cell."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def roles(function, static=None, vectorized=None, output_dims=None) -> Roles:
    """The roles of the axes of `function`; arguments that are not None override its attributes."""
    # A class is callable, but a call makes an object instead of a dict of outputs.
    if not callable(function) or isinstance(function, type):
        raise TypeError(f"function must be callable as function(key, **point), got {function!r}")
    static = None if static is None else name_tuple("static", static)
    vectorized = None if vectorized is None else name_tuple("vectorized", vectorized)
    swept = function
    if not isinstance(function, SweepFunction):
        # An object that defines some members was probably meant as a SweepFunction.
        if some := [name for name in MEMBERS if hasattr(function, name)]:
            raise TypeError(
                f"function has {', '.join(some)}, but not all that a sweep asks of its function; "
                "subclass negmaml.sweeps.SweepFunction, which has the defaults"
            )
        swept = Plain(function)
    # The old name of the attribute, which subclasses may still define.
    own_vectorized = swept.vectorized_axes
    if hasattr(swept, "whole_axes"):
        warn_renamed("SweepFunction.whole_axes", "vectorized_axes")
        own_vectorized = swept.whole_axes
    for name in ("accepts", "requires", "static_axes", "vectorized_axes"):
        if (own := getattr(swept, name)) is not None:
            name_tuple(f"{name} of the function", own)
    dims = swept.output_dims if output_dims is None else output_dims
    if not isinstance(dims, Mapping):
        raise TypeError(f"output_dims must map outputs to the names of their dims, got {dims!r}")
    own_dims = {name: name_tuple(f"output_dims[{name!r}]", some) for name, some in dims.items()}
    check_output_dims(own_dims)
    return Roles(
        swept,
        swept.static_axes if static is None else static,
        own_vectorized if vectorized is None else vectorized,
        own_dims,
    )


def _signature(function) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """(accepted names, names without a default) of the arguments after the key."""
    parameters = list(inspect.signature(function).parameters.values())
    kinds = inspect.Parameter
    if not parameters or parameters[0].kind in (kinds.KEYWORD_ONLY, kinds.VAR_KEYWORD):
        raise TypeError(f"function must take a key first: function(key, **point), got {function!r}")
    named = [
        p for p in parameters[1:] if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
    ]
    requires = tuple(p.name for p in named if p.default is kinds.empty)
    # **point accepts every name.
    if any(p.kind is kinds.VAR_KEYWORD for p in parameters):
        return None, requires
    return tuple(p.name for p in named), requires


def inputs(grid: SweepGrid, batch: tuple[int, ...] = ()):
    """(keys, numbers, vectorized axes) that cells of this batch shape are traced with."""
    names = [n for axis in grid.axes for n in axis.names if n not in grid.static]
    number = jnp.result_type(float)
    # Only the dtype of keys is needed, which depends on the default generator.
    key = jax.eval_shape(lambda: key_of(0))
    vectorized = {
        n: jax.ShapeDtypeStruct(np.shape(v), number) for n, v in grid.vectorized_values().items()
    }
    return (
        jax.ShapeDtypeStruct(batch, key.dtype),
        dict.fromkeys(names, jax.ShapeDtypeStruct(batch, number)),
        vectorized,
    )


def outputs(roles: Roles, grid: SweepGrid) -> tuple[Output, ...]:
    """The outputs of every cell; ValueError if groups of static values disagree."""
    _check_values(roles.function, grid)
    first: tuple[Output, ...] | None = None
    for group in grid.groups():
        if first is not None and _declares(roles.function, first, grid):
            break
        shapes = _cell_shapes(roles.function, grid, group)
        found = tuple(_output(name, shapes[name], roles, grid) for name in shapes)
        if first is not None and found != first:
            raise ValueError(
                f"function must return the same keys, shapes and dtypes everywhere; at "
                f"{grid.groups()[0]} it returns {_text(first)}, at {group} {_text(found)}"
            )
        first = found
    assert first is not None
    names = [output.name for output in first]
    check_outputs({o.name: dict(zip(o.dims, o.shape, strict=True)) for o in first}, grid)
    for name in roles.output_dims:
        if name not in names:
            raise ValueError(
                f"output_dims: the function returns no {name!r}{did_you_mean(name, names)}; it "
                f"returns {', '.join(names)}"
            )
    return first


def _declares(function: SweepFunction, found: tuple[Output, ...], grid: SweepGrid) -> bool:
    """True if the function declares that its outputs have only vectorized axes.

    Then one group is traced: tracing many groups can take longer than a small sweep.
    """
    vectorized = {axis.names[0] for axis in grid.vectorized}
    return all(o.name in function.output_dims and vectorized >= set(o.dims) for o in found)


def _cell_shapes(
    function: SweepFunction, grid: SweepGrid, group
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the outputs of one cell of a group of static values."""

    def cell(key, numbers, vectorized):
        try:
            found = function(key, **group, **numbers, **vectorized)
        except Exception as error:
            if isinstance(function, Plain):
                error.add_note(_where(error, function.function, group, [*numbers, *vectorized]))
            raise
        if not isinstance(found, dict) or not found:
            got = "an array" if hasattr(found, "dtype") else type(found).__name__
            raise TypeError(
                f"function must return a dict of arrays, got {got}; write return {{'name': ...}}"
            )
        for name, value in found.items():
            check_output_name(name)
            if isinstance(value, str | bytes | None):
                raise TypeError(f"function must return a dict of arrays, got {value!r} at {name!r}")
        return found

    # Abstract evaluation: errors of the function are raised before anything compiles.
    shapes = jax.eval_shape(cell, *inputs(grid))
    return {name: shapes[name] for name in sorted(shapes)}


def _where(error: Exception, function: Callable, group: Mapping, traced: Sequence[str]) -> str:
    """The line of the user's file that raised an error, and the point there."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    file = code.co_filename if code else ""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f"line {frame.lineno} of {file}" for frame in frames if frame.filename == file]
    values = [f"{name}={short_repr(value)}" for name, value in group.items()]
    hint = f"traced {' and '.join(traced)} (an axis in static has plain values)"
    parts = [*lines[-1:], *values, *[hint] * bool(traced)]
    return f"in the function of the sweep, {', '.join(parts)}"


def identify_programs(
    function: SweepFunction, grid: SweepGrid, groups: Sequence[Mapping], code_version: str | None
) -> dict[str, Identity]:
    """The identity of the program of each group of static values, by the group as text.

    Vectorized axes are traced with two values, so that the identity survives an extension.
    """
    # One cell, because the batch depends on memory and devices, and the identity must not.
    keys, numbers, vectorized = inputs(grid, (1,))
    # Two values stand for any number, so the identity stays the same when an axis grows.
    lengths = {n: (2,) if w.shape else () for n, w in vectorized.items()}
    few = {n: jax.ShapeDtypeStruct(lengths[n], w.dtype) for n, w in vectorized.items()}
    found = {}
    for group in groups:

        def cell(keys, numbers, vectorized, group=group):
            return function.batched(keys, numbers, {**group, **vectorized})

        try:
            found[group_text(group)] = identify(cell, keys, numbers, few, code_version=code_version)
        except (TypeError, ValueError, IndexError) as error:
            # With shortened axes the function failed: trace it at full length, or raise its error.
            if isinstance(error, UnidentifiedError) or few == vectorized:
                raise
            found[group_text(group)] = identify(
                cell, keys, numbers, vectorized
            )  # it wants them all
    return found


def group_text(group: Mapping[str, Any]) -> str:
    """A group of static values as text that does not depend on the order of its axes."""
    return json.dumps(group, sort_keys=True)


def _check_values(function: SweepFunction, grid: SweepGrid) -> None:
    """Check every value of every axis once, with the first values of all other axes."""
    # Checks are per axis: checking every cell would take too long.
    base = {n: axis.column(n)[0] for axis in (*grid.axes, *grid.vectorized) for n in axis.names}
    for axis in grid.axes:
        for row in axis.values:
            function.check(**(base | dict(zip(axis.names, row, strict=True))))


def _output(name: str, shape: jax.ShapeDtypeStruct, roles: Roles, grid: SweepGrid) -> Output:
    vectorized = {axis.names[0]: len(axis) for axis in grid.vectorized if axis.dim}
    # eval_shape returns a nested dict or list as it is, without a shape.
    if not hasattr(shape, "shape"):
        raise TypeError(f"function must return a dict of arrays, got a nest at {name!r}")
    if name in roles.output_dims:
        # A vectorized axis that is a constant in this grid has no dim in the output either.
        dims = tuple(
            d for d in roles.output_dims[name] if d in vectorized or d not in roles.vectorized
        )
    else:
        # Outputs lead with the vectorized axes unless output_dims names other dims.
        leads = bool(vectorized) and shape.shape[: len(vectorized)] == tuple(vectorized.values())
        dims = tuple(vectorized) if leads else ()
    # Remaining dims get the name of the output: dims of one name in two outputs would need equal
    # sizes.
    dims += tuple(f"{name}_{i}" for i in range(len(dims), len(shape.shape)))
    sizes = dict(zip(dims, shape.shape, strict=False))
    if len(dims) != len(shape.shape) or any(sizes[d] != vectorized.get(d, sizes[d]) for d in dims):
        raise ValueError(
            f"output {name!r} has shape {shape.shape} and not the dims {dims} of sizes "
            f"{vectorized}; name its dims with output_dims"
        )
    return Output(name, dims, tuple(shape.shape), numpy_dtype(name, shape.dtype))


def _text(found: tuple[Output, ...]) -> str:
    return ", ".join(f"{o.name} {o.dtype}{list(o.shape)}" for o in found)


@cache
def named(name: str) -> SweepFunction:
    """The registered function of a name, with default options."""
    return made(name)


def made(name: str, **options) -> SweepFunction:
    """The registered function of a name; ValueError for an unknown name or option."""
    if name not in registered():
        known = registered()
        raise ValueError(
            f"no sweep function {name!r}{did_you_mean(name, known)}; there are {known}"
        )
    make = maker(name)
    known = list(inspect.signature(make).parameters)
    for option in options:
        if option not in known:
            raise ValueError(
                f"{name!r} has no option {option!r}{did_you_mean(option, known)}; it has {known}"
            )
    return make(**options)
