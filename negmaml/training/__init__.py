"""The outer loop, its checkpoints, its test, and runs spread over devices."""

from negmaml.training.devices import map_over_devices
from negmaml.training.evaluation import Evaluation, evaluate
from negmaml.training.loop import fit
from negmaml.training.state import Fit

__all__ = ["Evaluation", "Fit", "evaluate", "fit", "map_over_devices"]
