"""The solvable model: sample data, build the meta-system, solve it, evaluate the solution."""

from negmaml._core.deprecation import renamed_exports
from negmaml._core.lazy import public_names
from negmaml.linear.data import Data, sample
from negmaml.linear.evaluate import sampled_test_loss
from negmaml.linear.simulation import Simulation, compile_simulation, simulate
from negmaml.linear.solve import MetaSolution, minimiser
from negmaml.linear.sweep import LinearModel
from negmaml.linear.system import meta_system

__all__ = [
    "Data",
    "LinearModel",
    "MetaSolution",
    "Simulation",
    "compile_simulation",
    "meta_system",
    "minimiser",
    "sample",
    "sampled_test_loss",
    "simulate",
]

__dir__ = public_names(__name__)
__getattr__ = renamed_exports(__name__, {"Solution": "MetaSolution"})
