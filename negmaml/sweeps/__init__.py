"""Sweeps: a function over a grid of points and seeds, labelled, resumable, on many devices."""

from negmaml.sweeps.api import plan, prepare, sweep
from negmaml.sweeps.linear import LinearModel, linear
from negmaml.sweeps.lock import StoreError

__all__ = ["LinearModel", "StoreError", "linear", "plan", "prepare", "sweep"]
