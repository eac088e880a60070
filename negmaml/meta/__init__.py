"""Adaptation and meta-gradients for any JAX loss and parameter pytree."""

from negmaml._core.deprecation import renamed_exports
from negmaml.meta.algorithms import (
    anil,
    fomaml,
    imaml,
    maml,
    maml_value_and_grad,
    meta_sgd,
    reptile,
)
from negmaml.meta.batching import Tasks
from negmaml.meta.convolution import im2col_convolution
from negmaml.meta.gradients import MetaSGDParams
from negmaml.meta.inner import adapt
from negmaml.meta.stateful import Stateful, per_step_state

__all__ = [
    "MetaSGDParams",
    "Stateful",
    "Tasks",
    "adapt",
    "anil",
    "fomaml",
    "im2col_convolution",
    "imaml",
    "maml",
    "maml_value_and_grad",
    "meta_sgd",
    "per_step_state",
    "reptile",
]

__getattr__ = renamed_exports(
    __name__, {"LearnedRates": "MetaSGDParams", "state_per_step": "per_step_state"}
)
