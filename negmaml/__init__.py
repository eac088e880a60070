"""Differentiable meta-learning with inner learning rates of either sign, and the theory of them."""

from negmaml import linear, sweeps, theory
from negmaml.inner import InnerOptimizer, adapt
from negmaml.linear import Simulation, simulate
from negmaml.meta import (
    LearnedRates,
    Tasks,
    anil,
    fomaml,
    imaml,
    maml,
    maml_value_and_grad,
    meta_sgd,
    reptile,
)
from negmaml.problem import MixedLinearRegression
from negmaml.rules import GradientDescent, GradientFlow, Proximal, Rule
from negmaml.sweeps import sweep
from negmaml.verify import Verification, verify
from negmaml.version import __version__ as __version__

__all__ = [
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
    "fomaml",
    "imaml",
    "linear",
    "maml",
    "maml_value_and_grad",
    "meta_sgd",
    "reptile",
    "simulate",
    "sweep",
    "sweeps",
    "theory",
    "verify",
]
