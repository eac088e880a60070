"""Converts the arrays of a checkpoint to the precision of the run that reads it."""

from itertools import zip_longest
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.caller import warn_caller


def kind(leaf) -> list:
    """Return the dtype and shape of a leaf in the form of JSON."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    return [str(dtype), list(np.shape(leaf))]


KEYS = {"fry": "threefry2x32", "rbg": "rbg", "urbg": "unsafe_rbg"}  # generators, as in dtypes


def template(kind: list) -> Any:
    """Return an array of a `kind` that takes no memory, or keys."""
    name, shape = kind
    if name.startswith("key<"):
        return jnp.broadcast_to(jax.random.key(0, impl=KEYS[name[4:-1]]), shape)
    return np.broadcast_to(np.zeros((), name), shape)


def written_templates(checkpoint: str, like: list, written: list | None) -> list:
    """Return templates of the leaves as they were written, whose dtypes may differ from the run's.

    checkpoint: its name in messages. like: the leaves of the run. written: the `kind` of each leaf;
    None if the checkpoint does not record it.

    Warns of dtypes that differ. Raises ValueError for leaves of other shapes, or that cannot be
    converted.
    """
    if written is None:
        return like
    # zip_longest pairs a missing leaf with None, which is reported as "no array".
    now = [kind(leaf) for leaf in like]
    changed = [(a, b) for a, b in zip_longest(written, now) if a != b]
    if wrong := [pair for pair in changed if not _can_convert(*pair)]:
        then, asked = (f"{one[0]}{one[1]}" if one else "no array" for one in wrong[0])
        raise ValueError(
            f"{checkpoint} holds other arrays than this run has: {then} then, {asked} now, "
            f"{len(wrong)} of {len(now)} in all; nothing was changed; give another directory, or "
            "parameters of the same shapes"
        )
    if changed:
        changes = " and ".join(sorted({f"{a[0]} to {b[0]}" for a, b in changed}))
        warn_caller(f"arrays of {checkpoint} are converted: {changes}")
    return [
        leaf if own == one else np.zeros(one[1], one[0])
        for leaf, one, own in zip(like, written, now, strict=True)
    ]


def _can_convert(then: list | None, now: list | None) -> bool:
    """True if the shapes agree and both dtypes are floating, both complex or both integer."""
    if then is None or now is None or then[1] != now[1]:
        return False
    try:
        both = np.dtype(then[0]), np.dtype(now[0])
    except TypeError:  # typed random keys, which NumPy does not know
        return False
    # A conversion from float to integer, or the like, would be of another model.
    return any(
        all(jnp.issubdtype(dtype, numbers) for dtype in both)
        for numbers in (jnp.floating, jnp.complexfloating, jnp.integer)
    )


def convert_like(leaf, like):
    """Return a leaf that was read, in the dtype and on the devices of the one it replaces."""
    if kind(leaf)[0] == kind(like)[0]:
        return leaf
    # On the host, since the device may not have the dtype that was written.
    values = np.asarray(leaf).astype(like.dtype)
    return jax.device_put(values, like.sharding) if isinstance(like, jax.Array) else values
