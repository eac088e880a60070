from negmaml import advice as advice
from negmaml import kernels, linear, sweeps, tasks, theory
from negmaml import meta as meta
from negmaml import paper as paper
from negmaml import problem as problem
from negmaml import rules as rules
from negmaml import training as training
from negmaml._core.convergence import ConvergenceWarning
from negmaml._core.pytree import pytree, static
from negmaml._core.version import __version__ as __version__
from negmaml.advice import Advice, advise
from negmaml.advice import MetaRegressor as MetaRegressor
from negmaml.advice import MetaRegressorCV as MetaRegressorCV
from negmaml.linear import Simulation, simulate
from negmaml.meta import (
    LogisticHead,
    MetaSGDParams,
    Minibatches,
    ParamsAndRule,
    PerStepModel,
    PESParams,
    PrototypeHead,
    RidgeHead,
    Stateful,
    Tasks,
    Variables,
    adapt,
    anil,
    evolution_strategies,
    fomaml,
    im2col_convolution,
    imaml,
    maml,
    maml_plus_plus,
    maml_plus_plus_params,
    maml_value_and_grad,
    memory_plan,
    meta_sgd,
    per_step_model,
    per_step_state,
    persistent_evolution_strategies,
    reptile,
    variables,
    warm_start,
)
from negmaml.paper.cross_check import Verification, verify
from negmaml.problem import MixedLinearRegression
from negmaml.rules import (
    GradientDescent,
    GradientFlow,
    Implicit,
    InnerOptimizer,
    InnerRule,
    Momentum,
    Preconditioned,
    Proximal,
    Schedule,
)
from negmaml.sweeps import sweep
from negmaml.training import (
    Evaluation,
    FitResult,
    LossScale,
    evaluate,
    fit,
    load,
    map_over_devices,
)

__all__ = [
    "Advice",
    "ConvergenceWarning",
    "Evaluation",
    "FitResult",
    "GradientDescent",
    "GradientFlow",
    "Implicit",
    "InnerOptimizer",
    "InnerRule",
    "LogisticHead",
    "LossScale",
    "MetaSGDParams",
    "Minibatches",
    "MixedLinearRegression",
    "Momentum",
    "PESParams",
    "ParamsAndRule",
    "PerStepModel",
    "Preconditioned",
    "PrototypeHead",
    "Proximal",
    "RidgeHead",
    "Schedule",
    "Simulation",
    "Stateful",
    "Tasks",
    "Variables",
    "Verification",
    "adapt",
    "advise",
    "anil",
    "evaluate",
    "evolution_strategies",
    "fit",
    "fomaml",
    "im2col_convolution",
    "imaml",
    "kernels",
    "linear",
    "load",
    "maml",
    "maml_plus_plus",
    "maml_plus_plus_params",
    "maml_value_and_grad",
    "map_over_devices",
    "memory_plan",
    "meta_sgd",
    "per_step_model",
    "per_step_state",
    "persistent_evolution_strategies",
    "pytree",
    "reptile",
    "simulate",
    "static",
    "sweep",
    "sweeps",
    "tasks",
    "theory",
    "variables",
    "verify",
    "warm_start",
]
