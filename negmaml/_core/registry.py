"""Registered names of functions, which are imported at their first use."""

import importlib
from collections.abc import Callable
from typing import Any

_makers: dict[str, Callable[..., Any] | str] = {}


def register(name: str, make: Callable[..., Any] | str) -> None:
    """Register a sweep function under a name, as `nm.sweeps.NAME` and in files of `negmaml sweep`.

    Arguments:
        name: the name, which stands for the result of `make(**options)`.
        make: a callable, or its place as "package.module:callable", which is imported at its first
            use. The options are those that a file gives.

    >>> import negmaml as nm
    >>> nm.sweeps.register("linear", "negmaml.linear:LinearModel")  # as the package does
    >>> nm.sweeps.linear.requires[:5]
    ('p', 'm', 'n_t', 'n_v', 'n_r')
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
