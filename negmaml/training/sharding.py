"""The tasks of a meta-batch on several devices, with one all-reduce of the gradient.

Within `shard_map` each device adapts to its own tasks. The checks of varying axes are off: with
them the transpose of a replicated parameter sums over devices. That would also sum the inner
gradients, which is another algorithm.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

from negmaml._core.display import tree_text
from negmaml._core.meshes import as_mesh
from negmaml.meta.batching import leading_axis
from negmaml.meta.gradients import check_pair, of_variables


class TaskSharding(NamedTuple):
    """A mesh of devices, and the axes of it that share the tasks.

    Parameters are on all devices. Batches of tasks are split along their leading axis.
    """

    mesh: Mesh
    axes: tuple[str, ...]

    @property
    def size(self) -> int:
        """The number of parts that the tasks are split into."""
        return int(np.prod([self.mesh.shape[axis] for axis in self.axes]))

    def shard_gradient(self, value_and_grad: Callable) -> Callable:
        """Return `with_unconverged_fraction` of all tasks, each device computing its own part."""

        def sharded(model, tasks, scale=None, key=None):
            count = leading_axis("tasks", tasks)
            if count % self.size:
                raise ValueError(
                    f"mesh has {self.size} devices for the tasks, which must divide the {count} "
                    "tasks of a meta-batch; choose another number of tasks or devices"
                )
            same = PartitionSpec()
            run = jax.shard_map(
                self._mean_gradient,
                mesh=self.mesh,
                in_specs=(same, same, PartitionSpec(self.axes), same, same),
                out_specs=(PartitionSpec(), PartitionSpec(self.axes)),
                axis_names=set(self.axes),
                check_vma=False,
            )
            (loss, gradient, unconverged), aux = run(value_and_grad, model, tasks, scale, key)
            return ((loss, aux), gradient), unconverged

        return sharded

    def _mean_gradient(self, value_and_grad, model, tasks, scale, key):
        """Return ((loss, gradient, unconverged) of all tasks, aux of the tasks of this device)."""
        # Random keys are those of the number of a task among all.
        first = lax.axis_index(self.axes) * leading_axis("tasks", tasks)
        function = with_unconverged_fraction(value_and_grad)
        result, unconverged = function(model, tasks, scale, key, first)
        loss, aux, gradient = unpack_result(result)
        return self._all_reduce((loss, gradient, unconverged)), aux

    def _all_reduce(self, tree):
        """Return the mean over devices of the floating point leaves, one message per dtype."""
        treedef: Any
        leaves, treedef = jax.tree.flatten(tree)
        # Integers, such as counters of a model state, are equal on all devices.
        real = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
        for dtype in {leaf.dtype for leaf, r in zip(leaves, real, strict=True) if r}:
            own = [i for i, leaf in enumerate(leaves) if leaf.dtype == dtype]
            # One message costs less than one for each leaf: most leaves are small.
            flat = jnp.concatenate([leaves[i].ravel() for i in own])
            ends = np.cumsum([leaves[i].size for i in own])[:-1]
            for i, mean in zip(own, jnp.split(lax.pmean(flat, self.axes), ends), strict=True):
                leaves[i] = mean.reshape(leaves[i].shape)
        return treedef.unflatten(leaves)

    def context(self, key):
        """Return the context to compute in: the mesh, or none inside a trace, which has its own.

        Raises for a key whose trace has an axis of kind Explicit.
        """
        if not isinstance(key, jax.core.Tracer):
            return jax.set_mesh(self.mesh)
        own = getattr(jax.typeof(key), "sharding", None)
        if own is not None and any(kind == AxisType.Explicit for kind in own.mesh.axis_types):
            raise ValueError(
                "keys under vmap must be spread over axes of kind Auto; make the mesh with "
                "jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names))"
            )
        return contextlib.nullcontext()


def with_unconverged_fraction(value_and_grad: Callable) -> Callable:
    """Return (variables, tasks) -> (result, fraction of tasks that did not converge, or None).

    The function also takes a scale of the loss, a key for a random estimate of a gradient, the same
    on all devices, and the number of the first task.
    """
    function = of_variables(value_and_grad)

    def with_fraction(model, tasks, scale=None, key=None, first=0):
        result, converged = function(model, tasks, first, scale, key)
        return result, None if converged is True else jnp.mean(~converged, dtype=float)

    return with_fraction


def unpack_result(result) -> tuple[Any, Any, Any]:
    """Return (loss, aux, gradient) of a `value_and_grad`; raise unless it is such a pair."""
    check_pair(result)
    value, gradient = result
    loss, aux = value if isinstance(value, tuple) else (value, None)
    if jnp.shape(loss) != () or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise ValueError(
            f"value_and_grad must return one real number as the value, got {tree_text(loss)}"
        )
    return loss, aux, gradient


def task_sharding(mesh: Any, task_axis: Any) -> TaskSharding | None:
    """Return the sharding of tasks over a mesh of any kind or a sequence of devices.

    None without a mesh. Raises ValueError or TypeError for invalid arguments of `fit`.
    """
    if mesh is None:
        if task_axis is not None:
            raise ValueError(f"task_axis={task_axis!r} needs a mesh; give mesh=jax.make_mesh(...)")
        return None
    mesh = as_mesh(mesh)
    # By default all axes of the mesh share the tasks.
    names = mesh.axis_names if task_axis is None else task_axis
    axes = (names,) if isinstance(names, str) else tuple(names)
    if not axes or not set(axes) <= set(mesh.axis_names):
        raise ValueError(f"task_axis must be among the axes {mesh.axis_names}, got {task_axis!r}")
    return TaskSharding(mesh, axes)
