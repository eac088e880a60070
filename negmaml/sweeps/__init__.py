"""Sweeps: a function over a grid of points and seeds, labelled, resumable, on many devices.

Functions that are registered under a name are attributes: `negmaml.sweeps.linear` is
`negmaml.linear.LinearModel()`.
"""

from negmaml.sweeps.api import plan, prepare, sweep
from negmaml.sweeps.lock import StoreError
from negmaml.sweeps.registry import named, names, register

__all__ = ["StoreError", "plan", "prepare", "register", "sweep"]


def __getattr__(name: str):
    if name in names():
        return named(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
