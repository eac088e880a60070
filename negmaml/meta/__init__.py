"""Meta-gradients for any JAX loss and parameter pytree; nothing here knows a problem."""

from negmaml.meta.algorithms import (
    LearnedRates,
    anil,
    fomaml,
    imaml,
    maml,
    maml_value_and_grad,
    meta_sgd,
    reptile,
)
from negmaml.meta.batching import Tasks
from negmaml.meta.inner import adapt
from negmaml.meta.patches import convolution

__all__ = [
    "LearnedRates",
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
]
