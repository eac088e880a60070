"""Meta-gradients for any JAX loss and parameter pytree; nothing here knows a problem."""

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
from negmaml.meta.convolution import convolution
from negmaml.meta.gradients import LearnedRates
from negmaml.meta.inner import adapt
from negmaml.meta.stateful import Stateful, state_per_step

__all__ = [
    "LearnedRates",
    "Stateful",
    "Tasks",
    "adapt",
    "anil",
    "convolution",
    "fomaml",
    "imaml",
    "maml",
    "maml_value_and_grad",
    "meta_sgd",
    "reptile",
    "state_per_step",
]
