"""Rows of the tables of calls: wrong calls with their error, and pairs of equal right calls."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

PATH = "{path}"  # stands for a store that is not there yet


class Wrong(NamedTuple):
    """A call that raises a TypeError or ValueError of ours whose message matches `said`."""

    function: Callable
    arguments: dict[str, Any]
    said: str
    error: Any = (TypeError, ValueError)

    def __str__(self):
        return _label(self.function, self.said, self.arguments)


class Right(NamedTuple):
    """Two calls with the same result."""

    label: str
    call: Callable[[], Any]
    same_as: Callable[[], Any]

    def __str__(self):
        return self.label


def wrong(call: Callable, good: dict[str, Any], /, **values) -> list[Wrong]:
    """The good call with every one of these values of every named argument; the error names it."""
    return [
        Wrong(call, good | {name: value}, rf"\b{name}\b")
        for name, some in values.items()
        for value in some
    ]


def _label(function, said: str, arguments) -> str:
    name = said.replace(r"\b", "")
    shown = repr(arguments.get(name, said))
    text = f"{getattr(function, '__name__', 'call')}-{name}-{shown}"
    text = re.sub(r" at 0x[0-9a-f]+", "", text)  # the same in every process
    return re.sub(r"[^\w.+-]+", "-", text)[:70]
