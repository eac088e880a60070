"""Differentiable meta-learning with inner learning rates of either sign, and the theory of them."""

from negmaml import linear, sweeps, tasks, theory
from negmaml.batching import Tasks
from negmaml.devices import map_over_devices
from negmaml.inner import InnerOptimizer, adapt
from negmaml.linear import Simulation, simulate
from negmaml.meta import (
    LearnedRates,
    anil,
    fomaml,
    imaml,
    maml,
    maml_value_and_grad,
    meta_sgd,
    reptile,
)
from negmaml.patches import convolution
from negmaml.problem import MixedLinearRegression
from negmaml.rules import GradientDescent, GradientFlow, Proximal, Rule
from negmaml.sweeps import sweep
from negmaml.train import Fit, fit
from negmaml.verify import Verification, verify
from negmaml.version import __version__ as __version__

__all__ = [
    "Fit",
    "GradientDescent",
    "GradientFlow",
    "InnerOptimizer",
    "LearnedRates",
    "MixedLinearRegression",
    "Proximal",
    "Rule",
    "Simulation",
    "Tasks",
    "Verification",
    "adapt",
    "anil",
    "convolution",
    "fit",
    "fomaml",
    "imaml",
    "linear",
    "maml",
    "maml_value_and_grad",
    "map_over_devices",
    "meta_sgd",
    "reptile",
    "simulate",
    "sweep",
    "sweeps",
    "tasks",
    "theory",
    "verify",
]
