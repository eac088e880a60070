"""Sweeps: a function over a grid of points and seeds, labelled, resumable, on many devices.

Functions that are registered under a name are attributes: `negmaml.sweeps.linear` is
`negmaml.linear.LinearModel()`.
"""

from negmaml._core.lazy import missing_name, public_names
from negmaml._core.registry import register, registered
from negmaml.sweeps.api import sweep
from negmaml.sweeps.functions import SweepFunction, named
from negmaml.sweeps.merging import merge
from negmaml.sweeps.planning import plan, prepare
from negmaml.sweeps.points import random_points
from negmaml.sweeps.storage import StoreError
from negmaml.sweeps.store_status import status

__all__ = [
    "StoreError",
    "SweepFunction",
    "merge",
    "plan",
    "prepare",
    "random_points",
    "register",
    "status",
    "sweep",
]

_public = public_names(__name__)


def __dir__() -> list[str]:
    return sorted({*_public(), *registered()})


def __getattr__(name: str) -> SweepFunction:
    if name in registered():
        return named(name)
    raise missing_name(__name__, name, [*__all__, *registered()])
