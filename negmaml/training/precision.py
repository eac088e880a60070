"""Arrays of a checkpoint in the precision of the run that reads it."""

import warnings
from itertools import zip_longest

import jax
import jax.numpy as jnp
import numpy as np


def kind(leaf) -> list:
    """The dtype and shape of a leaf, as JSON has them."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    return [str(dtype), list(np.shape(leaf))]


def as_written(checkpoint: str, like: list, written: list | None) -> list:
    """Templates of leaves as they were written, whose dtypes may differ from those of the run.

    like: the leaves of the run. written: the `kind` of each leaf; None if the checkpoint has none.

    Warns of dtypes that differ. Raises ValueError for leaves of other shapes, or that cannot be
    converted.
    """
    if written is None:
        return like
    now = [kind(leaf) for leaf in like]
    apart = [(a, b) for a, b in zip_longest(written, now) if a != b]
    if wrong := [pair for pair in apart if not _converts(*pair)]:
        then, asked = (f"{one[0]}{one[1]}" if one else "no array" for one in wrong[0])
        raise ValueError(
            f"{checkpoint} holds other arrays than this run has: {then} then, {asked} now, "
            f"{len(wrong)} of {len(now)} in all; nothing was changed; give another directory, or "
            "parameters of the same shapes"
        )
    if apart:
        changes = " and ".join(sorted({f"{a[0]} to {b[0]}" for a, b in apart}))
        warnings.warn(f"arrays of {checkpoint} are converted: {changes}", stacklevel=6)
    return [
        leaf if own == one else np.zeros(one[1], one[0])
        for leaf, one, own in zip(like, written, now, strict=True)
    ]


def _converts(then: list | None, now: list | None) -> bool:
    """Whether an array becomes one of another dtype of its kind, as float32 does float64."""
    if then is None or now is None or then[1] != now[1]:
        return False
    try:
        both = np.dtype(then[0]), np.dtype(now[0])
    except TypeError:  # keys
        return False
    return any(
        all(jnp.issubdtype(dtype, numbers) for dtype in both)
        for numbers in (jnp.floating, jnp.complexfloating, jnp.integer)
    )


def as_now(leaf, like):
    """A leaf that was read, in the dtype and place of the one that it replaces."""
    if kind(leaf)[0] == kind(like)[0]:
        return leaf
    values = np.asarray(leaf).astype(like.dtype)
    return jax.device_put(values, like.sharding) if isinstance(like, jax.Array) else values
