"""A clear error for options that only other functions of the theory have."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from negmaml._core.checks import short_repr

P = ParamSpec("P")
R = TypeVar("R")

DEFAULTS = {"method": "proportional", "meta_ridge": 0.0, "measure": "auto",
            "split": "train-validation"}  # fmt: skip
_TAKEN: dict[str, list[str]] = {name: [] for name in DEFAULTS}


def named_options(function: Callable[P, R]) -> Callable[P, R]:
    """Return the function, which raises ValueError for an option that only others have.

    The default value of such an option is accepted and ignored.
    """
    own = inspect.signature(function).parameters
    for name in DEFAULTS:
        if name in own:
            _TAKEN[name].append(f"theory.{function.__name__}")

    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        # Users pass one dictionary of options to several functions, so a default is no mistake.
        for name in DEFAULTS.keys() - own.keys():
            if name not in options:
                continue
            value = options.pop(name)
            if not (isinstance(value, str | float | int) and value == DEFAULTS[name]):
                raise ValueError(
                    f"{name} is no option of theory.{function.__name__}, got {short_repr(value)}; "
                    f"{', '.join(_TAKEN[name])} take it"
                )
        return function(*args, **options)

    return call
