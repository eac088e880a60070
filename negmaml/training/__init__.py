"""The outer loop, its checkpoints, its test, and runs spread over devices."""

from negmaml._core.deprecation import renamed_exports
from negmaml.training.devices import map_over_devices
from negmaml.training.evaluation import Evaluation, evaluate
from negmaml.training.loop import fit
from negmaml.training.state import FitResult

__all__ = ["Evaluation", "FitResult", "evaluate", "fit", "map_over_devices"]

__getattr__ = renamed_exports(__name__, {"Fit": "FitResult"})
