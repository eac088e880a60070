"""Adaptation and meta-gradients for any JAX loss and parameter pytree."""

from negmaml._core.deprecation import renamed_exports
from negmaml._core.lazy import public_names
from negmaml.meta.algorithms import (
    anil,
    fomaml,
    imaml,
    maml,
    maml_plus_plus,
    maml_value_and_grad,
    meta_sgd,
    reptile,
)
from negmaml.meta.annealing import maml_plus_plus_params
from negmaml.meta.batching import Tasks
from negmaml.meta.convolution import im2col_convolution
from negmaml.meta.evolution import evolution_strategies, persistent_evolution_strategies
from negmaml.meta.heads import LogisticHead, PrototypeHead, RidgeHead
from negmaml.meta.inner import adapt
from negmaml.meta.memory import memory_plan
from negmaml.meta.minibatches import Minibatches
from negmaml.meta.model_variables import (
    MetaSGDParams,
    ParamsAndRule,
    PESParams,
    Stateful,
    Variables,
    variables,
)
from negmaml.meta.per_step import PerStepModel, per_step_model, per_step_state
from negmaml.meta.warm_starts import warm_start

__all__ = [
    "LogisticHead",
    "MetaSGDParams",
    "Minibatches",
    "PESParams",
    "ParamsAndRule",
    "PerStepModel",
    "PrototypeHead",
    "RidgeHead",
    "Stateful",
    "Tasks",
    "Variables",
    "adapt",
    "anil",
    "evolution_strategies",
    "fomaml",
    "im2col_convolution",
    "imaml",
    "maml",
    "maml_plus_plus",
    "maml_plus_plus_params",
    "maml_value_and_grad",
    "memory_plan",
    "meta_sgd",
    "per_step_model",
    "per_step_state",
    "persistent_evolution_strategies",
    "reptile",
    "variables",
    "warm_start",
]

__dir__ = public_names(__name__)
__getattr__ = renamed_exports(
    __name__, {"LearnedRates": "MetaSGDParams", "state_per_step": "per_step_state"}
)
