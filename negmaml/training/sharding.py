"""The tasks of a meta-batch on several devices, with one all-reduce of the gradient.

Within `shard_map` each device adapts to its own tasks. The checks of varying axes are off: with
them the transpose of a replicated parameter sums over devices. That would also sum the inner
gradients, which is another algorithm.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from negmaml._core.display import tree_text
from negmaml.meta.batching import leading_axis
from negmaml.meta.gradients import check_pair, of_variables

AXIS = "task"  # the axis of a mesh that is made from a list of devices


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

    @property
    def replicated(self) -> NamedSharding:
        """The placement of an array on all devices."""
        return NamedSharding(self.mesh, PartitionSpec())

    def shard_gradient(self, value_and_grad: Callable) -> Callable:
        """Return `with_unconverged_fraction` of all tasks, each device computing its own part."""

        def sharded(model, tasks):
            count = leading_axis("tasks", tasks)
            if count % self.size:
                raise ValueError(
                    f"mesh has {self.size} devices for the tasks, which must divide the {count} "
                    "tasks of a meta-batch; choose another number of tasks or devices"
                )
            run = jax.shard_map(
                self._mean_gradient,
                mesh=self.mesh,
                in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec(self.axes)),
                out_specs=(PartitionSpec(), PartitionSpec(self.axes)),
                axis_names=set(self.axes),
                check_vma=False,
            )
            (loss, gradient, unconverged), aux = run(value_and_grad, model, tasks)
            return ((loss, aux), gradient), unconverged

        return sharded

    def _mean_gradient(self, value_and_grad, model, tasks):
        """Return ((loss, gradient, unconverged) of all tasks, aux of the tasks of this device)."""
        # Random keys are those of the number of a task among all.
        first = lax.axis_index(self.axes) * leading_axis("tasks", tasks)
        result, unconverged = with_unconverged_fraction(value_and_grad)(model, tasks, first)
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

    def place(self, tree):
        """Return the arrays on the mesh: as the user sharded them there, else replicated."""
        return jax.tree.map(self._place_leaf, tree)

    def _place_leaf(self, leaf):
        if isinstance(leaf, jax.core.Tracer):
            return leaf
        # The mesh here has axes of kind Auto; the user's sharding keeps only the names of its axes.
        own = getattr(leaf, "sharding", None)
        if isinstance(own, NamedSharding) and np.array_equal(own.mesh.devices, self.mesh.devices):
            return jax.device_put(leaf, NamedSharding(self.mesh, own.spec))
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            # The words of a typed key are an array that can be placed.
            data = self._place_leaf(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        if self.replicated.is_fully_addressable:
            return jax.device_put(leaf, self.replicated)
        host = np.asarray(leaf)  # several processes: each of them has the whole array
        return jax.make_array_from_callback(host.shape, self.replicated, lambda i: host[i])


def with_unconverged_fraction(value_and_grad: Callable) -> Callable:
    """Return (variables, tasks) -> (result, fraction of tasks that did not converge, or None)."""
    function = of_variables(value_and_grad)

    def with_fraction(model, tasks, first=0):
        result, converged = function(model, tasks, first)
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
    # A list of devices is a mesh with one axis.
    if isinstance(mesh, Sequence) and mesh and all(isinstance(d, jax.Device) for d in mesh):
        mesh = Mesh(np.array(mesh), (AXIS,))
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f"mesh must be a jax.sharding.Mesh or a list of devices such as jax.devices(), "
            f"got {mesh!r}"
        )
    # By default all axes of the mesh share the tasks.
    names = mesh.axis_names if task_axis is None else task_axis
    axes = (names,) if isinstance(names, str) else tuple(names)
    if not axes or not set(axes) <= set(mesh.axis_names):
        raise ValueError(f"task_axis must be among the axes {mesh.axis_names}, got {task_axis!r}")
    # The kind of an axis matters to the user's program outside, not to `shard_map` within it.
    auto = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)
    return TaskSharding(auto, axes)
