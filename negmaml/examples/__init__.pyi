from negmaml.examples import bilevel as bilevel
from negmaml.examples import digits as digits
from negmaml.examples import distillation as distillation
from negmaml.examples import equinox_model as equinox_model
from negmaml.examples import flax_model as flax_model
from negmaml.examples import kernel_rates as kernel_rates
from negmaml.examples import lazy_network as lazy_network
from negmaml.examples import learned_loss as learned_loss
from negmaml.examples import learned_optimizer as learned_optimizer
from negmaml.examples import learned_rates as learned_rates
from negmaml.examples import maml_plus_plus as maml_plus_plus
from negmaml.examples import mlp as mlp
from negmaml.examples import schools as schools
from negmaml.examples import sinusoid as sinusoid
from negmaml.examples import training_sweep as training_sweep

__all__ = [
    "bilevel",
    "digits",
    "distillation",
    "equinox_model",
    "flax_model",
    "kernel_rates",
    "lazy_network",
    "learned_loss",
    "learned_optimizer",
    "learned_rates",
    "maml_plus_plus",
    "mlp",
    "schools",
    "sinusoid",
    "training_sweep",
]
