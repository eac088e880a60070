"""The tasks of a meta-batch spread over devices, the gradient averaged by one all-reduce.

Within `shard_map` each device adapts to tasks of its own. Its varying-axes checks are off: with
them the transpose of a replicated parameter sums over devices, in the inner gradients too, which
is another algorithm.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from negmaml.meta.batching import leading_axis
from negmaml.meta.gradients import reporting
from negmaml.training.carried import Carried

AXIS = "task"  # of a mesh that is made of devices


class Spread(NamedTuple):
    """A mesh, and the axes of it that the tasks are spread over."""

    mesh: Mesh
    axes: tuple[str, ...]

    @property
    def size(self) -> int:
        """How many parts the tasks are in."""
        return int(np.prod([self.mesh.shape[axis] for axis in self.axes]))

    @property
    def everywhere(self) -> NamedSharding:
        """The same on all devices."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def by_task(self) -> NamedSharding:
        """The leading axis spread."""
        return NamedSharding(self.mesh, PartitionSpec(self.axes))

    def over(self, value_and_grad: Callable) -> Callable:
        """`unconverged_share` of all tasks, each device computing its own."""

        def spread(params, tasks):
            count = leading_axis("tasks", tasks)
            if count % self.size:
                raise ValueError(
                    f"mesh has {self.size} devices for the tasks, which must divide the {count} "
                    "tasks of a meta-batch; choose another number of tasks or devices"
                )
            run = jax.shard_map(
                self._mean,
                mesh=self.mesh,
                in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec(self.axes)),
                out_specs=(PartitionSpec(), PartitionSpec(self.axes)),
                axis_names=set(self.axes),
                check_vma=False,
            )
            (loss, gradient, unconverged), aux = run(value_and_grad, Carried(params), tasks)
            return ((loss, aux), gradient), unconverged

        return spread

    def _mean(self, value_and_grad, params, tasks):
        """((loss, gradient, unconverged) of all tasks, aux of those here)."""
        result, unconverged = unconverged_share(value_and_grad)(params.tree, tasks)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(
                f"value_and_grad must return (value, gradient), got {type(result).__name__}; for "
                "the objective maml(loss, rule) pass maml_value_and_grad(loss, rule)"
            )
        value, gradient = result
        loss, aux = value if isinstance(value, tuple) else (value, None)
        return self._averaged((loss, gradient, unconverged)), aux

    def _averaged(self, tree):
        """The mean over devices of the floating leaves, each dtype in one message."""
        treedef: Any
        leaves, treedef = jax.tree.flatten(tree)
        real = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
        for dtype in {leaf.dtype for leaf, r in zip(leaves, real, strict=True) if r}:
            own = [i for i, leaf in enumerate(leaves) if leaf.dtype == dtype]
            flat = jnp.concatenate([leaves[i].ravel() for i in own])
            ends = np.cumsum([leaves[i].size for i in own])[:-1]
            for i, mean in zip(own, jnp.split(lax.pmean(flat, self.axes), ends), strict=True):
                leaves[i] = mean.reshape(leaves[i].shape)
        return treedef.unflatten(leaves)

    def context(self, key):
        """Within which to work: the mesh, or none while JAX traces.

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
        """Arrays where they have to be: as the user's own are on the mesh, or everywhere."""
        return jax.tree.map(self._put, tree)

    def _put(self, leaf):
        if isinstance(leaf, jax.core.Tracer):
            return leaf
        own = getattr(leaf, "sharding", None)
        if isinstance(own, NamedSharding) and np.array_equal(own.mesh.devices, self.mesh.devices):
            return jax.device_put(leaf, NamedSharding(self.mesh, own.spec))
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            data = self._put(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        if self.everywhere.is_fully_addressable:
            return jax.device_put(leaf, self.everywhere)
        host = np.asarray(leaf)  # the same in every process
        return jax.make_array_from_callback(host.shape, self.everywhere, lambda i: host[i])


def unconverged_share(value_and_grad: Callable) -> Callable:
    """(params, tasks) -> (its result, the share of tasks that did not converge or None)."""
    function = reporting(value_and_grad)

    def with_share(params, tasks):
        result, converged = function(params, tasks)
        return result, None if converged is True else jnp.mean(~converged, dtype=float)

    return with_share


def spread_over(mesh: Any, task_axis: Any) -> Spread | None:
    """How tasks are spread; `mesh` is a mesh of any kind, a sequence of devices, or None."""
    if mesh is None:
        if task_axis is not None:
            raise ValueError(f"task_axis={task_axis!r} needs a mesh; give mesh=jax.make_mesh(...)")
        return None
    if isinstance(mesh, Sequence) and mesh and all(isinstance(d, jax.Device) for d in mesh):
        mesh = Mesh(np.array(mesh), (AXIS,))
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f"mesh must be a jax.sharding.Mesh or a list of devices such as jax.devices(), "
            f"got {mesh!r}"
        )
    names = mesh.axis_names if task_axis is None else task_axis
    axes = (names,) if isinstance(names, str) else tuple(names)
    if not axes or not set(axes) <= set(mesh.axis_names):
        raise ValueError(f"task_axis must be among the axes {mesh.axis_names}, got {task_axis!r}")
    # Which kind an axis is of matters to what is written outside of the mesh, not to this.
    auto = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)
    return Spread(auto, axes)
