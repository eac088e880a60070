"""Printed forms of objects: one line or a few, never many numbers; in a notebook a table.

A class decorated with `add_table_repr` returns a `Table` from `_summary`. `add_fields_repr` makes
the table of the fields of a result, and `call_text` prints an object as the call that makes it.
Everything here takes traced arrays and objects of any kind, since printing must not fail.
"""

import dataclasses
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

C = TypeVar("C", bound=type)
LEAVES = 4  # of a pytree that are shown by name
NUMBERS = 6  # of an array that are written out
RANGED = 10**6  # numbers of an array whose range is looked up
WIDTH = 100  # characters of a result on one line
_SHORT = reprlib.Repr()
_SHORT.maxother = _SHORT.maxstring = 60


class Table(NamedTuple):
    """A title, rows of cells, and names of the columns if they need any."""

    title: str
    rows: Sequence[Sequence[str]]
    columns: Sequence[str] = ()

    def text(self) -> str:
        """The title, and the rows indented and aligned below it."""
        lines = [*([self.columns] if self.columns else []), *self.rows]
        lines = [[printable(cell) for cell in line] for line in lines]
        widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
        padded = [
            "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines
        ]
        return "\n".join([printable(self.title), *("  " + line.rstrip() for line in padded)])

    def html(self) -> str:
        """The table as HTML, for a notebook."""

        def line(cells, tag):
            return "".join(
                f"<{tag} style='text-align:left'>{escape(printable(c))}</{tag}>" for c in cells
            )

        head = f"<tr>{line(self.columns, 'th')}</tr>" if self.columns else ""
        body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in self.rows)
        return f"<b>{escape(printable(self.title))}</b><table>{head}{body}</table>"


def printable(text: str) -> str:
    r"""A text whose control characters, which could steer a terminal, are spelled out.

    Ends of lines stay.

    >>> printable("a\x1b[31m")
    'a\\x1b[31m'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """A printable text, ends of lines spelled out too."""
    return printable(text).replace("\n", r"\n")


def add_table_repr(cls: C) -> C:
    """Add printed forms to a class: the `Table` that its method `_summary` returns."""
    summary: Callable[[Any], Table] = cls._summary  # type: ignore[attr-defined]
    named: Any = cls
    named.__repr__ = lambda self: summary(self).text()
    named._repr_html_ = lambda self: summary(self).html()
    return cls


def add_fields_repr(cls: C) -> C:
    """Add printed forms to a named tuple or dataclass: its fields, on one line if they fit."""

    def text(self) -> str:
        line = f"{cls.__name__}({', '.join(f'{k}={value_text(v)}' for k, v in _fields(self))})"
        return line if len(line) <= WIDTH else table(self).text()

    def table(self) -> Table:
        return Table(cls.__name__, [(name, _cell(value)) for name, value in _fields(self)])

    named: Any = cls
    named.__repr__ = text
    named._repr_html_ = lambda self: table(self).html()
    return cls


def _fields(self) -> list[tuple[str, Any]]:
    """The names and values of the fields of a named tuple or dataclass."""
    if isinstance(self, tuple):
        return list(zip(self._fields, self, strict=True))  # type: ignore[attr-defined]
    return [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]


def _cell(value) -> str:
    """A value in a table: as it is if it is short, else the shapes of its leaves."""
    text = value_text(value)
    tree = isinstance(value, Mapping | tuple | list)
    return tree_text(value) if tree and len(text) > WIDTH // 2 else text


def call_text(self) -> str:
    """A dataclass as the call that makes it, without fields at their defaults.

    The only field without a default needs no name: `GradientDescent(0.1, steps=3)`.
    """
    fields = [field for field in dataclasses.fields(self) if field.init]
    required = [field for field in fields if _has_no_default(field)]
    parts = []
    for field in fields:
        value = getattr(self, field.name)
        if [field] == required and field is fields[0]:
            parts.append(value_text(value))
        elif not _is_same(value, field.default):
            parts.append(f"{field.name}={value_text(value)}")
    return f"{type(self).__name__}({', '.join(parts)})"


def _has_no_default(field: dataclasses.Field) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def _is_same(value, default) -> bool:
    """True for a plain value that equals the default; arrays may be traced and are not compared."""
    plain = isinstance(value, bool | int | float | str)
    return value is default or (plain and type(value) is type(default) and value == default)


def value_text(value) -> str:
    """A value on one line: short arrays as code, others as type, shape and range."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return _array_text(value)
    if isinstance(value, Mapping):
        items = [f"{key!r}: {value_text(held)}" for key, held in list(value.items())[:LEAVES]]
        return f"{{{', '.join(items + ['...'] * (len(value) > LEAVES))}}}"
    if isinstance(value, tuple) and hasattr(value, "init") and hasattr(value, "update"):
        return f"<optax.{value.init.__qualname__.partition('.')[0]}>"
    if type(value) in (tuple, list):
        parts = [value_text(part) for part in value[:LEAVES]] + ["..."] * (len(value) > LEAVES)
        inner = ", ".join(parts) + "," * (type(value) is tuple and len(value) == 1)
        return f"({inner})" if type(value) is tuple else f"[{inner}]"
    if isinstance(value, tuple) and type(value).__repr__ is tuple.__repr__:
        return f"{type(value).__name__}{value_text(tuple(value))}"
    if callable(value) and not dataclasses.is_dataclass(value):
        return f"<{_name(value)}>"
    # A pytree prints itself as a call, of any length.
    text = repr(value) if dataclasses.is_dataclass(value) else _SHORT.repr(value)
    return re.sub(r" at 0x[0-9a-f]+", "", " ".join(text.split()))


def _name(function) -> str:
    """The name of a function, a class or a callable object."""
    return getattr(function, "__qualname__", type(function).__name__).rpartition("<locals>.")[2]


def _array_text(array) -> str:
    """An array of a few numbers as code; of a longer one type, shape and range."""
    if isinstance(array, jax.core.Tracer):
        return f"<{shape_text(array)}, traced>"
    try:
        numbers = np.asarray(array)
        if numbers.ndim == 0 and numbers.dtype.kind in "biuf":
            return str(numbers)
        if numbers.ndim == 1 and 0 < numbers.size <= NUMBERS and numbers.dtype.kind in "biuf":
            return f"array([{', '.join(map(str, numbers))}])"
        finite = numbers[np.isfinite(numbers)] if numbers.size <= RANGED else numbers[:0]
        ends = f", {finite.min():.4g} to {finite.max():.4g}" if finite.size else ""
    # Keys, texts, arrays of other processes and deleted ones have no numbers to show.
    except Exception:
        ends = ""
    return f"<{shape_text(array)}{ends}>"


def shape_text(value) -> str:
    """The dtype and shape of an array, such as float32[25,200]; the type of anything else."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    return repr(value) if isinstance(value, bool | int | float) else type(value).__name__


def tree_text(tree) -> str:
    """The leaves of a pytree on one line, the first few by name."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    # A single array has no path to print.
    if len(leaves) == 1 and not leaves[0][0]:
        return shape_text(leaves[0][1])
    shown = [f"{jax.tree_util.keystr(path)} {shape_text(leaf)}" for path, leaf in leaves[:LEAVES]]
    more = [f"and {len(leaves) - LEAVES} more"] if len(leaves) > LEAVES else []
    return ", ".join(shown + more) or "nothing"


def mean_text(values) -> str:
    """Mean and standard error of independent numbers, "1.23 ± 0.04 (n = 100)"; finite ones only."""
    if isinstance(values, jax.core.Tracer):
        return "traced"
    numbers = np.asarray(values, float).ravel()
    finite = numbers[np.isfinite(numbers)]
    lost = f", {numbers.size - finite.size} not finite" if finite.size < numbers.size else ""
    if finite.size == 0:
        return f"none finite (n = {numbers.size})"
    return f"{_with_error(finite)} (n = {finite.size}{lost})"


def mean_range_text(values, samples: str) -> str:
    """The lowest and the highest mean over the last axis, whose entries are independent samples.

    Entries along all other axes may share their random numbers, so they are never pooled: each
    mean has the standard error of its own row.
    """
    if isinstance(values, jax.core.Tracer) or np.ndim(values) < 2:
        return mean_text(values)
    rows = np.asarray(values, float).reshape(-1, np.shape(values)[-1])
    if len(rows) == 1:
        return mean_text(rows)
    finite = [row[np.isfinite(row)] for row in rows]
    lost = rows.size - sum(map(len, finite))
    known = sorted((row for row in finite if len(row)), key=np.mean)
    count = f"n = {rows.shape[1]} {samples} each" + (f", {lost} values not finite" if lost else "")
    if not known:
        return f"none finite ({count})"
    ends = f"{_with_error(known[0])} to {_with_error(known[-1])}"
    return f"{ends} over {len(rows)} rates ({count})"


def _with_error(numbers) -> str:
    """Mean and standard error of independent numbers."""
    error = f" ± {numbers.std(ddof=1) / numbers.size**0.5:.2g}" if numbers.size > 1 else ""
    return f"{numbers.mean():.4g}{error}"
