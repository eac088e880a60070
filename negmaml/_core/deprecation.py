"""Old names that keep working for one release, with a DeprecationWarning that names the new one.

Three kinds of names are renamed: what a module exports, arguments, and attributes of results.

    __getattr__ = renamed_exports(__name__, {"distance": "weight_error"})

    @renamed_arguments(part="worker")
    def sweep(..., *, worker=None): ...

    class Simulation(NamedTuple):
        well_conditioned: Array

    Simulation.reliable = renamed_attribute("Simulation.reliable", "well_conditioned")
"""

import sys
import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from negmaml._core.calls import reject_wrong_call
from negmaml._core.lazy import exported, missing_name

P = ParamSpec("P")
R = TypeVar("R")


def renamed_text(old: str, new: str) -> str:
    """The text of every warning about an old name."""
    return f"{old} was renamed: use {new}. The old name will be removed in the next release."


def warn_renamed(old: str, new: str, stacklevel: int = 3) -> None:
    """Warn that the name `old` is now `new`, at the caller's line."""
    # By default the third frame is the user's: past this function and the wrapper that calls it.
    warnings.warn(renamed_text(old, new), DeprecationWarning, stacklevel=stacklevel)


def renamed_exports(
    module: str, names: Mapping[str, str], otherwise: Callable[[str], Any] | None = None
) -> Callable[[str], Any]:
    """The `__getattr__` of a module with the old names {old: new} of its exports.

    otherwise: the `__getattr__` that finds all other names, if the module has one.
    """

    def get(name: str) -> Any:
        if name not in names:
            if otherwise is not None:
                return otherwise(name)
            raise missing_name(module, name, exported(vars(sys.modules[module])))
        warn_renamed(f"{module}.{name}", f"{module}.{names[name]}")
        # By getattr, so that a lazy package imports the new name.
        return getattr(sys.modules[module], names[name])

    return get


def renamed_arguments(
    values: Mapping[Any, Any] | None = None, **names: str
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator for a function that still accepts keywords by their old names, old="new".

    values: new values for old ones of these keywords, where they were renamed as well.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            # Both names at once would hide which value counts, so that raises.
            for old in names.keys() & kwargs.keys():
                new, value = names[old], kwargs.pop(old)
                if new in kwargs:
                    raise TypeError(f"{function.__name__} got both {old} and {new}: pass {new}")
                before, after = "...", ""
                if values is not None and value in values:
                    before, after = repr(value), repr(values[value])
                    value = values[value]
                warn_renamed(f"{function.__name__}({old}={before})", f"{new}={after}")
                kwargs[new] = value
            try:
                return function(*args, **kwargs)
            except TypeError as error:
                reject_wrong_call(error, function, args, kwargs)
                raise

        return call

    return decorate


def renamed_attribute(old: str, new: str) -> Any:
    """Property that returns the attribute `new`; `old` is its qualified old name in the warning."""

    def get(self) -> Any:
        warn_renamed(old, new)
        return getattr(self, new)

    return property(get, doc=f"Deprecated name of `{new}`.")
