"""Registered names of functions, which are imported at their first use."""

import importlib
from collections.abc import Callable
from typing import Any

_makers: dict[str, Callable[..., Any] | str] = {}


def register(name: str, make: Callable[..., Any] | str) -> None:
    """Let `name` stand for what `make(**options)` returns.

    make: a callable, or its place as "package.module:callable".
    """
    _makers[name] = make


def registered() -> list[str]:
    """The registered names."""
    return sorted(_makers)


def maker(name: str) -> Callable[..., Any]:
    """The callable of a registered name, imported if necessary."""
    make = _makers[name]
    # A string defers the import, so that `import negmaml` stays fast.
    if isinstance(make, str):
        module, _, attribute = make.partition(":")
        return getattr(importlib.import_module(module), attribute)
    return make
