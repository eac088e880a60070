"""Meta-training and its evaluation: the outer loop, checkpoints, several devices."""

from negmaml._core.deprecation import renamed_exports
from negmaml._core.lazy import public_names
from negmaml.training.evaluation import Evaluation, evaluate
from negmaml.training.loading import load
from negmaml.training.loop import fit
from negmaml.training.nonfinite import LossScale
from negmaml.training.result import FitResult
from negmaml.training.seeds import map_over_devices

__all__ = ["Evaluation", "FitResult", "LossScale", "evaluate", "fit", "load", "map_over_devices"]

__dir__ = public_names(__name__)
__getattr__ = renamed_exports(__name__, {"Fit": "FitResult"})
