"""Exact meta-learning in kernel space, and the kernels of networks."""

from negmaml._core.deprecation import renamed_exports
from negmaml._core.lazy import public_names
from negmaml.kernels.analytic import relu_network
from negmaml.kernels.leave_one_out import LeftOut, leave_one_task_out
from negmaml.kernels.model import KernelModel, meta_train
from negmaml.kernels.tangent import empirical_ntk

__all__ = [
    "KernelModel",
    "LeftOut",
    "empirical_ntk",
    "leave_one_task_out",
    "meta_train",
    "relu_network",
]

__dir__ = public_names(__name__)
__getattr__ = renamed_exports(__name__, {"neural_tangent": "empirical_ntk"})
