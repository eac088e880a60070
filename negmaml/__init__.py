"""Differentiable meta-learning with inner learning rates of either sign, and the theory of them."""

from negmaml import linear, sweeps, tasks, theory
from negmaml._core.pytree import pytree, static
from negmaml._core.version import __version__ as __version__
from negmaml.advice import Advice, advise
from negmaml.linear import LinearModel, Simulation, simulate
from negmaml.meta import (
    LearnedRates,
    Tasks,
    adapt,
    anil,
    convolution,
    fomaml,
    imaml,
    maml,
    maml_value_and_grad,
    meta_sgd,
    reptile,
)
from negmaml.paper.roads import Verification, verify
from negmaml.problem import MixedLinearRegression
from negmaml.rules import (
    GradientDescent,
    GradientFlow,
    InnerOptimizer,
    Momentum,
    Preconditioned,
    Proximal,
    Rule,
    Schedule,
)
from negmaml.sweeps import sweep
from negmaml.training import Fit, fit, map_over_devices

sweeps.register("linear", LinearModel)

__all__ = [
    "Advice",
    "Fit",
    "GradientDescent",
    "GradientFlow",
    "InnerOptimizer",
    "LearnedRates",
    "MixedLinearRegression",
    "Momentum",
    "Preconditioned",
    "Proximal",
    "Rule",
    "Schedule",
    "Simulation",
    "Tasks",
    "Verification",
    "adapt",
    "advise",
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
    "pytree",
    "reptile",
    "simulate",
    "static",
    "sweep",
    "sweeps",
    "tasks",
    "theory",
    "verify",
]


def __getattr__(name: str):
    """The estimators, which need scikit-learn, when they are asked for."""
    if name in ("MetaRegressor", "MetaRegressorCV"):
        from negmaml import advice

        return getattr(advice, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
