"""One function of many seeds, over all devices of the machine."""

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
    """`function` of every item, spread over all local devices: jax.lax.map that uses them all.

    Arguments:
        function: a pure function of one item, such as key -> fit(key, ...). It is compiled once
            if the same object (or a `jax.tree_util.Partial` of it) is passed again.
        items: pytree whose leaves lead with the item axis, of any length.
        batch_size: items a device computes at once by vmap, one when left out. On a GPU choose
            as many as fit.

    Returns the results stacked. Each is the result for that item by itself, up to rounding. Typed
    keys among the items reach the function as those of a generator that is safe under vmap.

    On a CPU a small model runs best on a single core: handing its many small operations to other
    threads costs more than they save. Make a device of each core, before anything else is
    computed, and let each train seeds of its own:

        jax.config.update("jax_num_cpu_devices", os.cpu_count())

    Raises ValueError when the leaves disagree in their leading axis or it is empty, and with a
    `batch_size` for a function that draws by a generator such as rbg, which is not safe under vmap,
    from raw keys or seeds.

    >>> map_over_devices(lambda x: x**2, jnp.arange(3.0)).tolist()
    [0.0, 1.0, 4.0]
    """
    check_callable("function", function, "of one item")
    batch_size = check_optional(check_count, "batch_size", batch_size)
    leading_axis("items", items)
    function, items = as_pytree(function), with_counter_based_keys(items)
    if batch_size is not None:
        _check_generators(function, items, batch_size)
    return _spread(function, items, batch_size=batch_size)


def _check_generators(function: Callable, items, batch_size: int) -> None:
    """Raise if what the function draws for an item would depend on the items beside it."""
    together = _spread.trace(function, items, batch_size=batch_size)
    if not (found := mixed_draws(together.jaxpr)):
        return
    apart = _spread.trace(function, items, batch_size=None)
    if found != mixed_draws(apart.jaxpr):
        raise ValueError(
            f"batch_size must be None for a function that draws by {found[0]} from raw keys or "
            f"seeds, got {batch_size}: under vmap that generator draws for every item from the key "
            "of the first; make the keys by jax.random.key(seed, impl='threefry2x32')"
        )


@partial(jax.jit, static_argnames="batch_size")
def _spread(function: Callable, items, *, batch_size: int | None):
    count = leading_axis("items", items)
    devices = np.array(jax.local_devices()[:count])
    short = -count % len(devices)
    full = jax.tree.map(lambda x: jnp.concatenate([x, x[:1].repeat(short, 0)]), items)
    each, everywhere = PartitionSpec("device"), PartitionSpec()
    run = jax.shard_map(
        lambda function, part: lax.map(function, part, batch_size=batch_size),
        mesh=Mesh(devices, ("device",)),
        in_specs=(everywhere, each),
        out_specs=each,
        check_vma=False,
    )
    return jax.tree.map(lambda x: x[:count], run(function, full))
