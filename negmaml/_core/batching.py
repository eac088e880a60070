"""`vmap`s of a function, nested to any depth, as one call with all inputs."""

from collections.abc import Callable
from functools import lru_cache, wraps

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from negmaml._core.platform import traced_platform
from negmaml._core.settings import own_settings


def batched_custom_vmap(run: Callable) -> Callable:
    """Decorator for a function of pytrees of arrays whose `vmap` is computed by `run`.

    run(each, stacks, one): the results for all of `stacks`, a tuple of arrays with one leading
        axis, as jax.vmap(each)(stacks) has them. `each` takes a tuple without that axis; inputs
        that no `vmap` maps are part of it. one: shapes and dtypes of the function's arguments.

    The function then has no derivative under `vmap`. Use it for constants, such as those of the
    solution in a `lax.custom_linear_solve`, or within a `jax.custom_jvp`.
    """

    def decorate(function: Callable) -> Callable:
        one = custom_vmap(function)

        # The same jitted function in every call: eager calls compile once.
        @lru_cache(maxsize=256)
        def many(structure, mapped: tuple[bool, ...], platform: str | None):
            del platform  # a trace is for one platform: see `negmaml._core.platform.lowered_for`

            @jax.jit
            @own_settings
            def all_of(*leaves):
                def each(stack):
                    own = iter(stack)
                    full = [next(own) if is_mapped else x for x, is_mapped in pairs]
                    return function(*structure.unflatten(full))

                # Inputs that are not mapped are closed over instead of being copied.
                pairs = list(zip(leaves, mapped, strict=True))
                one = structure.unflatten(
                    jax.ShapeDtypeStruct(x.shape[1:] if is_mapped else x.shape, x.dtype)
                    for x, is_mapped in pairs
                )
                return run(each, tuple(x for x, is_mapped in pairs if is_mapped), one)

            nested = custom_vmap(all_of)

            # A vmap around this vmap: merge both axes into one leading axis and call again.
            @nested.def_vmap
            def flat(size, outer, *leaves):
                example = mapped.index(True)
                count = leaves[example].shape[1 if outer[example] else 0]

                def merged(x, inner, outer):
                    if not (inner or outer):
                        return x
                    own = x.shape[inner + outer :]
                    x = x.reshape(size if outer else 1, count if inner else 1, *own)
                    return jnp.broadcast_to(x, (size, count, *own)).reshape(-1, *own)

                either = tuple(a or b for a, b in zip(mapped, outer, strict=True))
                found = many(structure, either, traced_platform())(
                    *map(merged, leaves, mapped, outer)
                )
                return _mapped(jax.tree.map(lambda x: x.reshape(size, count, *x.shape[1:]), found))

            return nested

        @one.def_vmap
        def batch(size, batched, *arguments):
            leaves, structure = jax.tree.flatten(arguments)
            mapped = tuple(jax.tree.leaves(batched))
            return _mapped(many(structure, mapped, traced_platform())(*leaves))

        return wraps(function)(lambda *arguments: one(*arguments))

    return decorate


def _mapped(found):
    """The results and flags that a rule of `custom_vmap` returns: all outputs are mapped."""
    return found, jax.tree.map(lambda _: True, found)


def in_blocks(each: Callable, stacks, size: int):
    """jax.vmap(each)(stacks), at most `size` at once, in full blocks so that it compiles once."""
    count = len(jax.tree.leaves(stacks)[0])
    # A single block needs no loop.
    if count <= size:
        return jax.vmap(each)(stacks)
    blocks = -(-count // size)

    # The last block is filled up with copies of the last entry.
    def divided(x):
        filled = jnp.pad(x, [(0, blocks * size - count)] + [(0, 0)] * (x.ndim - 1), mode="edge")
        return filled.reshape(blocks, size, *x.shape[1:])

    found = jax.lax.map(jax.vmap(each), jax.tree.map(divided, stacks))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], found)
