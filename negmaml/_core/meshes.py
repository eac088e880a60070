"""Meshes of devices of any kind, and work that is split over their devices."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from negmaml._core.calls import explain_calls
from negmaml._core.jit import is_concrete
from negmaml._core.platform import is_tracing

F = TypeVar("F", bound=Callable[..., Any])
AXIS = "task"  # the axis of a mesh that is made from a list of devices


def as_mesh(mesh: Any) -> Mesh | None:
    """Return a mesh or a list of devices as a mesh of axes of kind Auto; None for None.

    Raises TypeError for anything else.
    """
    if mesh is None:
        return None
    # A list of devices is a mesh with one axis.
    if isinstance(mesh, Sequence) and mesh and all(isinstance(d, jax.Device) for d in mesh):
        mesh = Mesh(np.array(mesh), (AXIS,))
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f"mesh must be a jax.sharding.Mesh or a list of devices such as jax.devices(), "
            f"got {mesh!r}"
        )
    return _auto(mesh)


def _auto(mesh: Mesh) -> Mesh:
    # The kind of an axis matters to the user's program outside, not to `shard_map` within it.
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)


def share(function: Callable, shared, items, mesh: Mesh, axes: Sequence[str] | None = None):
    """Return function(shared, items) for all items, each device computing a part of them.

    function: maps items, of any number, to results that lead with the same axis. axes: of the mesh
    that share the items; all by default. There is no communication. Trace it within the mesh.
    """
    axes = tuple(mesh.axis_names if axes is None else axes)
    count = len(jax.tree.leaves(items)[0])
    # Every device gets the same number of items: copies of the first one fill up the last device.
    missing = -count % math.prod(mesh.shape[axis] for axis in axes)
    full = jax.tree.map(lambda x: jnp.concatenate([x, x[:1].repeat(missing, 0)]), items)
    # With checks of varying axes the transpose of a shared array sums over devices. That would
    # also sum the gradients within a task.
    run = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(axes)),
        out_specs=PartitionSpec(axes),
        axis_names=set(axes),
        check_vma=False,
    )
    return jax.tree.map(lambda x: x[:count], run(shared, full))


def within(mesh: Mesh | None, *trees) -> contextlib.AbstractContextManager:
    """Return the context to compute in: the mesh, or none without one or inside a trace."""
    if mesh is None or not is_concrete((jnp.zeros(()), trees)):
        return contextlib.nullcontext()
    return jax.set_mesh(mesh)


@contextlib.contextmanager
def only(device) -> Iterator[Any]:
    """Compute on one device, also within the context of a mesh; yields the device."""
    with jax.set_mesh(Mesh(np.array(device), ())), jax.default_device(device):
        yield device


def gathered(tree, mesh: Mesh):
    """Return the arrays as a whole on every device: the one collective after `share`."""
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: lax.with_sharding_constraint(x, whole), tree)


def place(tree, mesh: Mesh):
    """Return the arrays on the mesh: as the user sharded them there, else on all devices."""
    return jax.tree.map(lambda leaf: _place_leaf(leaf, mesh), tree)


def _place_leaf(leaf, mesh: Mesh):
    if isinstance(leaf, jax.core.Tracer):
        return leaf
    # The mesh here has axes of kind Auto; the user's sharding keeps only the names of its axes.
    own = getattr(leaf, "sharding", None)
    if isinstance(own, NamedSharding) and np.array_equal(own.mesh.devices, mesh.devices):
        return jax.device_put(leaf, NamedSharding(mesh, own.spec))
    if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
        # The words of a typed key are an array that can be placed.
        data = _place_leaf(jax.random.key_data(leaf), mesh)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    whole = NamedSharding(mesh, PartitionSpec())
    if whole.is_fully_addressable:
        return jax.device_put(leaf, whole)
    host = np.asarray(leaf)  # several processes: each of them has the whole array
    return jax.make_array_from_callback(host.shape, whole, lambda i: host[i])


def any_mesh(function: F) -> F:
    """Decorator: arrays on axes of kind Explicit, or such a mesh in the context, work as with Auto.

    Arrays are seen as sharded by the same names on axes of kind Auto, which moves nothing, and
    results by the given kind again. Within a trace the arguments stay as they are.
    """
    function = explain_calls(function)

    @wraps(function)
    def call(*arguments, **keywords):
        meshes = [x.sharding.mesh for x in jax.tree.leaves((arguments, keywords)) if _explicit(x)]
        context = jax.sharding.get_abstract_mesh()
        if not meshes and AxisType.Explicit not in context.axis_types:
            return function(*arguments, **keywords)
        if is_tracing():
            return function(*arguments, **keywords)
        mesh = meshes[0] if meshes else jax.sharding.get_mesh()
        arguments, keywords = _on_kind(_explicit, _auto(mesh), (arguments, keywords))
        with jax.set_mesh(_auto(mesh)):
            found = function(*arguments, **keywords)
        return _on_kind(lambda x: _mesh_of(x) == _auto(mesh), mesh, found)

    return call  # type: ignore[return-value]


def _mesh_of(leaf):
    sharding = getattr(leaf, "sharding", None) if isinstance(leaf, jax.Array) else None
    return sharding.mesh if isinstance(sharding, NamedSharding) else None


def _explicit(leaf) -> bool:
    if isinstance(leaf, jax.core.Tracer):
        return False
    mesh = _mesh_of(leaf)
    return mesh is not None and AxisType.Explicit in mesh.axis_types


def _on_kind(chosen: Callable, mesh: Mesh, tree):
    """Return the tree with the chosen arrays on the same devices of a mesh of another kind."""

    def convert(leaf):
        if not chosen(leaf):
            return leaf
        return jax.device_put(leaf, NamedSharding(mesh, leaf.sharding.spec))

    return jax.tree.map(convert, tree)
