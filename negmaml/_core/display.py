"""Printed forms of results: a title and a few lines, never their numbers; in a notebook a table.

A class decorated with `add_table_repr` returns a `Table` from `_summary`. Everything here takes
traced arrays and objects of any kind, since printing must not fail.
"""

from collections.abc import Callable, Sequence
from html import escape
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

C = TypeVar("C", bound=type)
LEAVES = 4  # of a pytree that are shown by name


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
