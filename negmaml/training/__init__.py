"""The outer loop, its checkpoints, and runs spread over devices."""

from negmaml.training.devices import map_over_devices
from negmaml.training.loop import fit
from negmaml.training.state import Fit

__all__ = ["Fit", "fit", "map_over_devices"]
