"""Differentiable meta-learning with inner learning rates of either sign, and the theory of them."""

from negmaml import linear, theory
from negmaml.linear import Simulation, simulate
from negmaml.meta import Tasks, adapt, maml
from negmaml.problem import MixedLinearRegression
from negmaml.rules import GradientDescent, GradientFlow, Proximal, Rule
from negmaml.verify import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "GradientDescent",
    "GradientFlow",
    "MixedLinearRegression",
    "Proximal",
    "Rule",
    "Simulation",
    "Tasks",
    "Verification",
    "adapt",
    "linear",
    "maml",
    "simulate",
    "theory",
    "verify",
]
