"""Maps a function over many seeds, on all devices of the machine."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from negmaml._core.checks import check_callable, check_count, check_optional
from negmaml._core.keys import mixed_draws, with_counter_based_keys
from negmaml._core.pytree import as_pytree
from negmaml._core.settings import own_transfers
from negmaml.meta.batching import leading_axis


@own_transfers
def map_over_devices(function: Callable, items, *, batch_size: int | None = None):
    """Return `function` of every item, computed on all local devices: jax.lax.map over devices.

    Arguments:
        function: a pure function of one item, such as key -> fit(key, ...). It is compiled once
            if the same object (or a `jax.tree_util.Partial` of it) is passed again.
        items: pytree whose leaves lead with the item axis, of any length.
        batch_size: items that a device computes at once by vmap, one by default. On a GPU choose
            as many as fit into its memory.

    Returns the results stacked. Each is that of a separate call, up to rounding. Typed keys among
    the items are converted to keys of a generator that is safe under vmap.

    On a CPU a small model runs best on a single core: passing its many small operations to other
    threads costs more than it saves. Make each core a device, before any other computation, and let
    each device train its own seeds:

        jax.config.update("jax_num_cpu_devices", os.cpu_count())

    Raises ValueError when the leaves disagree in their leading axis or it is empty. Also with a
    `batch_size` for a function that makes keys of rbg from raw keys or seeds, since that generator
    is not safe under vmap.

    >>> map_over_devices(lambda x: x**2, jnp.arange(3.0)).tolist()
    [0.0, 1.0, 4.0]
    """
    check_callable("function", function, "of one item")
    batch_size = check_optional(check_count, "batch_size", batch_size)
    leading_axis("items", items)
    # A `Partial` of the function is an argument of one compiled program for all functions.
    function, items = as_pytree(function), with_counter_based_keys(items)
    if batch_size is not None:
        _check_generators(function, items, batch_size)
    return _map_sharded(function, items, batch_size=batch_size)


def _check_generators(function: Callable, items, batch_size: int) -> None:
    """Raise if the random numbers of an item would depend on the other items of its batch."""
    batched = _map_sharded.trace(function, items, batch_size=batch_size)
    if not (found := mixed_draws(batched.jaxpr)):
        return
    # Draws that are mixed in the function itself, whatever the batch, are the user's choice.
    one_by_one = _map_sharded.trace(function, items, batch_size=None)
    if found != mixed_draws(one_by_one.jaxpr):
        raise ValueError(
            f"batch_size must be None for a function that draws by {found[0]} from raw keys or "
            f"seeds, got {batch_size}: under vmap that generator draws for every item from the key "
            "of the first; make the keys by jax.random.key(seed, impl='threefry2x32')"
        )


@partial(jax.jit, static_argnames="batch_size")
def _map_sharded(function: Callable, items, *, batch_size: int | None):
    count = leading_axis("items", items)
    # No more devices than items.
    devices = np.array(jax.local_devices()[:count])
    # Every device gets the same number of items: the first one fills up the last device.
    missing = -count % len(devices)
    full = jax.tree.map(lambda x: jnp.concatenate([x, x[:1].repeat(missing, 0)]), items)
    split, replicated = PartitionSpec("device"), PartitionSpec()
    run = jax.shard_map(
        lambda function, part: lax.map(function, part, batch_size=batch_size),
        mesh=Mesh(devices, ("device",)),
        in_specs=(replicated, split),
        out_specs=split,
        check_vma=False,
    )
    return jax.tree.map(lambda x: x[:count], run(function, full))
