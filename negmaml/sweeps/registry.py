"""Sweep functions that go by a name: in spec files, and as attributes of `negmaml.sweeps`."""

from collections.abc import Callable
from functools import cache

from negmaml.sweeps.parse import near

_makers: dict[str, Callable] = {}


def register(name: str, make: Callable) -> None:
    """Let `name` stand for the sweep function that `make(**options)` returns."""
    _makers[name] = make


def names() -> list[str]:
    """The registered names."""
    return sorted(_makers)


@cache
def named(name: str):
    """The function of a name, with the options it has by default."""
    return made(name)


def made(name: str, **options):
    """The function of a name; ValueError for an unknown one, TypeError for an unknown option."""
    if name not in _makers:
        raise ValueError(f"no sweep function {name!r}{near(name, names())}; there are {names()}")
    return _makers[name](**options)
