"""The residuals of every task under the model that is meta-trained on all other tasks."""

from collections.abc import Callable
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import lax

from negmaml._core.checks import check_optional
from negmaml._core.deprecation import renamed_attribute
from negmaml._core.display import add_fields_repr
from negmaml._core.jit import jit_fast_compile
from negmaml._core.meshes import any_mesh
from negmaml._core.pytree import pytree
from negmaml._core.settings import own_settings
from negmaml._core.types import Array, ArrayLike
from negmaml.kernels.points import as_kernel, as_start, check_ridges, gram, stack
from negmaml.kernels.solve import leave_out
from negmaml.kernels.system import adapted_losses, check_spectral, right_side, systems, task_blocks
from negmaml.meta import Tasks
from negmaml.rules import InnerRule


@add_fields_repr
@pytree
class LeftOut:
    """Residuals of each task under the model that was trained on all others.

    Attributes:
        support: labels less predictions before adapting, batch + (m, n_t, outputs).
        query: labels of the query likewise, batch + (m, n_v, outputs).
        well_conditioned: batch, as in `KernelModel`.
        blocks: the kernel within each task.

    >>> import negmaml as nm
    >>> x = jnp.linspace(-1.0, 1.0, 24).reshape(4, 6, 1)
    >>> tasks = nm.Tasks((x[:, :3], x[:, :3, 0]), (x[:, 3:], x[:, 3:, 0]))
    >>> rates, ridges = nm.GradientDescent(jnp.array([-0.5, 0.0, 0.5])), jnp.array([0.1, 1.0])
    >>> left = nm.kernels.leave_one_task_out(lambda a, b: a @ b.T, tasks, rates, meta_ridge=ridges)
    >>> loss = left.losses(nm.GradientDescent(0.2)).mean(-1)  # over tasks
    >>> loss.shape, left.query.shape  # rates, ridges, tasks, n_v, outputs
    ((3, 2), (3, 2, 4, 3, 1))
    """

    support: Any
    query: Any
    well_conditioned: Any
    blocks: Any

    own: ClassVar[Any] = renamed_attribute("LeftOut.own", "blocks")
    reliable: ClassVar[Any] = renamed_attribute("LeftOut.reliable", "well_conditioned")

    @own_settings
    @any_mesh
    def losses(self, rule: InnerRule) -> Array:
        """Half the mean squared error on the query of each task after adapting to its support.

        Returns shape batch + the rule's shape + (m,): tasks are the sample, so differences between
        rules have the standard error of their mean over tasks.
        """
        rule = check_spectral(rule)
        return adapted_losses(self.blocks, rule, self.support, self.query)


@own_settings
@any_mesh
def leave_one_task_out(
    kernel: Callable[..., Any],
    tasks: Tasks,
    rule: InnerRule,
    *,
    meta_ridge: ArrayLike = 0.0,
    f0: Callable[..., Any] | None = None,
) -> LeftOut:
    r"""Residuals of every task under the model meta-trained on all others, without training again.

    Use it to choose rates and ridges on all tasks, without splits: `losses(rule)` of the result
    adapts to each left-out task by any rule. It follows in closed form from the one solution of all
    tasks (`negmaml.kernels.solve` derives it). Arguments, batches and errors are those of
    `meta_train`; at least two tasks are needed.

    >>> x = jnp.linspace(-1.0, 1.0, 24).reshape(4, 6, 1)
    >>> tasks = Tasks((x[:, :3], x[:, :3, 0]), (x[:, 3:], x[:, 3:, 0]))
    >>> from negmaml.rules import GradientDescent
    >>> rates = GradientDescent(jnp.array([-0.5, 0.0, 0.5]))
    >>> ridges = jnp.array([0.1, 1.0])
    >>> left = leave_one_task_out(lambda a, b: a @ b.T, tasks, rates, meta_ridge=ridges)
    >>> left.losses(GradientDescent(0.2)).shape  # rates, ridges, tasks
    (3, 2, 4)
    """
    kernel, f0 = as_kernel(kernel), check_optional(as_start, "f0", f0)
    rule = check_spectral(rule)
    ridges = check_ridges(meta_ridge)
    points, _ = stack(tasks, f0)
    # A single task leaves no task to train on.
    if points.sizes[0] < 2:
        raise ValueError("tasks must hold at least two to leave one out, got 1")
    K = gram(kernel, points.x)
    left, blocks = _leave_out(K, points.y_t, points.y_v, rule, jnp.ravel(ridges))
    # Flat lists of rules and ridges get their shapes back.
    batch = rule.batch_shape + jnp.shape(ridges)
    support, query, well_conditioned = (part.reshape(*batch, *part.shape[2:]) for part in left)
    return LeftOut(support, query, well_conditioned, blocks)


def _leave_out_all(K, y_t, y_v, rule: InnerRule, ridges):
    blocks = task_blocks(K, y_t.shape[0], y_t.shape[1])
    at, entries = systems(K, blocks, rule)
    ridges = ridges.astype(K.dtype)

    def one(entry):
        system = at(entry)
        return leave_out(system, right_side(system.C, y_t, y_v), y_t.astype(K.dtype), ridges)

    # One rule at a time, so that one matrix G is in memory.
    return lax.map(one, entries), blocks


_leave_out = jit_fast_compile(_leave_out_all, profile="heavy")
