"""Exact meta-learning in kernel space, and the kernels of networks."""

from negmaml.kernels.analytic import relu_network
from negmaml.kernels.leave_one_out import LeftOut, leave_one_task_out
from negmaml.kernels.model import KernelModel, meta_train
from negmaml.kernels.tangent import neural_tangent

__all__ = [
    "KernelModel",
    "LeftOut",
    "leave_one_task_out",
    "meta_train",
    "neural_tangent",
    "relu_network",
]
