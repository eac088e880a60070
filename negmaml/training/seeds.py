"""Maps a function over many seeds, on all devices of the machine."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh

from negmaml._core.checks import check_callable, check_count, check_optional
from negmaml._core.jit import is_concrete
from negmaml._core.keys import mixed_draws, with_counter_based_keys
from negmaml._core.meshes import any_mesh, as_mesh, place, share, within
from negmaml._core.pytree import as_pytree
from negmaml._core.settings import own_transfers
from negmaml._core.types import Devices, PyTree
from negmaml.meta.batching import leading_axis

MEMORY_SHARE = 0.5  # of the free memory of a device, for the items that it computes at once


@own_transfers
@any_mesh
def map_over_devices(
    function: Callable[..., Any],
    items: PyTree,
    *,
    batch_size: int | None = None,
    mesh: Devices | None = None,
) -> Any:
    """Return `function` of every item, computed on all local devices: jax.lax.map over devices.

    Arguments:
        function: a pure function of one item, such as key -> fit(key, ...). It is compiled once
            if the same object (or a `jax.tree_util.Partial` of it) is passed again.
        items: pytree whose leaves lead with the item axis, of any length.
        batch_size: items that a device computes at once by vmap. By default one on a CPU, and on an
            accelerator as many as fit into half of its free memory.
        mesh: a `jax.sharding.Mesh` or a list of devices that share the items; all local devices by
            default.

    Returns the results stacked. Each is that of a separate call, up to rounding. Typed keys among
    the items are converted to keys of a generator that is safe under vmap.

    On a CPU a small model runs best on a single core: passing its many small operations to other
    threads costs more than it saves. Make each core a device, before any other computation, and let
    each device train its own seeds:

        jax.config.update("jax_num_cpu_devices", os.cpu_count())

    Raises ValueError when the leaves disagree in their leading axis or it is empty. Also with a
    `batch_size` for a function that makes keys of rbg from raw keys or seeds, since that generator
    is not safe under vmap.

    >>> import jax.numpy as jnp
    >>> map_over_devices(lambda x: x**2, jnp.arange(3.0)).tolist()
    [0.0, 1.0, 4.0]
    """
    check_callable("function", function, "of one item")
    batch_size = check_optional(check_count, "batch_size", batch_size)
    count = leading_axis("items", items)
    # No more devices than items.
    chosen = as_mesh(jax.local_devices()[:count] if mesh is None else mesh)
    assert chosen is not None  # a mesh was given
    # A `Partial` of the function is an argument of one compiled program for all functions.
    function, items = as_pytree(function), with_counter_based_keys(items)
    known = is_concrete((function, items))
    if mesh is not None and known:
        function, items = place((function, items), chosen)
    with within(chosen, function, items):
        if batch_size is not None:
            _check_generators(function, items, batch_size, chosen)
        elif known:
            batch_size = _fitting(function, items, chosen)
        return _map_sharded(function, items, batch_size=batch_size, mesh=chosen)


def _fitting(function: Callable[..., Any], items, mesh: Mesh) -> int | None:
    """Return the number of items that fit into the memory of a device; None if not more than one.

    A CPU computes one at a time: its caches gain nothing from more.
    """
    free = _free_bytes(mesh.devices.flat[0])
    if free is None:
        return None
    one_by_one = _map_sharded.lower(function, items, batch_size=None, mesh=mesh).compile()
    analysis: Any = one_by_one.memory_analysis()
    of_one = analysis.temp_size_in_bytes
    here = -(-leading_axis("items", items) // mesh.size)
    fitting = min(here, int(MEMORY_SHARE * free // max(of_one, 1)))
    # A generator that is not safe under vmap draws for one item at a time.
    if fitting < 2 or _unsafe_draws(function, items, fitting, mesh):
        return None
    return fitting


def _free_bytes(device) -> int | None:
    """Return the free memory of an accelerator; None for a CPU, or if it is unknown."""
    found = device.memory_stats() if device.platform != "cpu" else None
    return found["bytes_limit"] - found["bytes_in_use"] if found else None


def _unsafe_draws(function: Callable[..., Any], items, batch_size: int, mesh: Mesh) -> list[str]:
    """Return the generators by which an item of a batch would depend on the others."""
    found = [
        mixed_draws(_map_sharded.trace(function, items, batch_size=size, mesh=mesh).jaxpr)
        for size in (batch_size, None)
    ]
    # Draws that are mixed in the function itself, whatever the batch, are the user's choice.
    return [] if found[0] == found[1] else found[0]


def _check_generators(function: Callable[..., Any], items, batch_size: int, mesh: Mesh) -> None:
    """Raise if the random numbers of an item would depend on the other items of its batch."""
    if found := _unsafe_draws(function, items, batch_size, mesh):
        raise ValueError(
            f"batch_size must be None for a function that draws by {found[0]} from raw keys or "
            f"seeds, got {batch_size}: under vmap that generator draws for every item from the key "
            "of the first; make the keys by jax.random.key(seed, impl='threefry2x32')"
        )


@partial(jax.jit, static_argnames=("batch_size", "mesh"))
def _map_sharded(function: Callable[..., Any], items, *, batch_size: int | None, mesh: Mesh):
    return share(partial(lax.map, batch_size=batch_size), function, items, mesh)
