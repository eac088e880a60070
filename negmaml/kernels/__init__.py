"""Exact meta-learning in kernel space, and the kernels of networks."""

from negmaml.kernels.model import KernelModel, LeftOut, leave_one_task_out, meta_train

__all__ = ["KernelModel", "LeftOut", "leave_one_task_out", "meta_train"]
