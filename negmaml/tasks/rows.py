"""Rows of arrays in groups of any sizes: sorting them, and draws without replacement.

A draw takes rows of a group without replacement. It draws one random priority for each row of the
largest group, and gives the lowest priority to rows beyond the size of the group. One compiled
program then serves groups of any sizes.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from negmaml._core.checks import short_repr
from negmaml._core.display import Table, tree_text
from negmaml._core.jit import is_concrete
from negmaml.meta.batching import leading_axis


def check_rows(name: str, groups_name: str, data, groups) -> np.ndarray:
    """Return the group of each row; raise unless there is one for each row of numbers.

    The data may be traced. The groups may not, since their number and sizes determine shapes.
    """
    _check_numbers(name, data)
    if not is_concrete(groups):
        raise TypeError(
            f"{groups_name} must be known, got {short_repr(groups)} under jit, grad or vmap: the "
            "sizes of groups determine shapes; build the distribution outside and pass it, it is a "
            "pytree"
        )
    rows = leading_axis("data", data)
    groups = check_labels(groups_name, groups)
    if groups.shape != (rows,):
        raise ValueError(
            f"{groups_name} must have one entry a row, shape ({rows},), got {groups.shape}"
        )
    return groups


def check_labels(name: str, labels) -> np.ndarray:
    """Return labels, which may be text, as an array; raise ValueError where one is missing."""
    labels = np.asarray(labels)
    # NaN, which differs from itself, and None mark rows without a group in tables.
    missing = [label is None or label != label for label in labels.ravel().tolist()]
    if any(missing):
        raise ValueError(
            f"{name} must have a value in every row, got {labels.ravel()[missing.index(True)]!r} "
            f"in row {missing.index(True)}; leave such rows out"
        )
    return labels


def sort_rows(name: str, groups: np.ndarray, chosen: Any) -> tuple[Any, Any, Any]:
    """Return (the rows in the order of their groups, values of the groups, their sizes).

    name: the argument with the groups. chosen: the values of the groups to take, all by default.
    """
    # Labels may be text: their positions among the sorted values number the groups.
    values, counts = np.unique(groups, return_counts=True)
    order = np.argsort(groups, kind="stable")
    if chosen is None:
        return order, values, counts
    wanted = np.unique(np.asarray(chosen))
    unknown = [] if wanted.size == 0 else wanted[~np.isin(wanted, values)].tolist()
    if wanted.size == 0 or unknown:
        raise ValueError(
            f"classes must hold values of {name}, such as {short_repr(values[:3].tolist())}, got "
            f"{short_repr(unknown or chosen)}"
        )
    kept = np.isin(values, wanted)
    return order[np.repeat(kept, counts)], values[kept], counts[kept]


def check_sizes(name: str, values, counts, needed: int, expression: str) -> None:
    """Raise ValueError for groups with fewer rows than needed, by name."""
    small = [f"{v} ({c})" for v, c in zip(values, counts, strict=True) if c < needed]
    if small:
        raise ValueError(
            f"{len(small)} of {len(values)} values in {name} have fewer than {expression} = "
            f"{needed} rows: {', '.join(small[:5])}; leave their rows out or ask for fewer"
        )


def take_rows(data, order: np.ndarray):
    """Return the rows in this order, on the device."""
    # Data that are not traced are sorted on the host, without a second copy on the device.
    data = jax.tree.map(lambda x: (np.asarray(x) if is_concrete(x) else x)[order], data)
    return jax.tree.map(jnp.asarray, data)


def group_fields(counts: np.ndarray) -> dict[str, Any]:
    """Return the fields of a distribution that describe its groups."""
    # A group is the rows starts to starts + counts of the sorted data.
    starts = jnp.asarray(np.cumsum(counts) - counts)
    return {"starts": starts, "counts": jnp.asarray(counts), "longest": int(counts.max())}


def set_fields(distribution, **fields) -> None:
    """Set the fields of a frozen distribution."""
    for name, value in fields.items():
        object.__setattr__(distribution, name, value)


def summary(name: str, distribution, kind: str, sizes: str) -> Table:
    """Return the printed form of a distribution: its draws, its data and its groups."""
    rows = [("draws", sizes), ("data", tree_text(distribution.data))]
    # Inside jit the sizes are traced, and only shapes can be printed.
    counts = distribution.counts
    if not isinstance(counts, jax.core.Tracer):
        least, most = int(np.min(counts)), int(np.max(counts))
        rows.append((kind, f"{len(counts)} of {least} to {most} rows"))
    return Table(f"{name}, a distribution of tasks", rows)


def priorities(key, longest: int, count=None):
    """Return a random priority for each of `longest` rows, below zero from `count` on."""
    priority = jax.random.uniform(key, (longest,))
    # `count` may differ from group to group under vmap, shapes may not: rows beyond it are never
    # among the highest priorities, since a group has at least as many rows as are drawn.
    if count is not None:
        priority = jnp.where(jnp.arange(longest) < count, priority, -1.0)
    return priority


def highest(priority, number: int):
    """Return the positions of the `number` highest priorities."""
    # Positions of the largest of independent numbers are a random subset in random order.
    return lax.top_k(priority, number)[1]


def rows_of_group(distribution, key, group, number: int):
    """Return `number` different rows of a group."""
    # The draw is of positions within the group, whose rows are contiguous.
    priority = priorities(key, distribution.longest, distribution.counts[group])
    return distribution.starts[group] + highest(priority, number)


def _check_numbers(name: str, data) -> None:
    """Raise TypeError unless `data` holds arrays of rows with numbers."""
    leaves = jax.tree.leaves(data, is_leaf=lambda x: x is None)
    if not leaves or any(np.ndim(leaf) == 0 for leaf in leaves):
        raise TypeError(
            f"{name} must be an array or a pytree of arrays with one entry a row, got "
            f"{short_repr(data)}"
        )
    for leaf in leaves:
        # Kind V has the extended floats of JAX, such as bfloat16.
        if not isinstance(leaf, jax.Array) and np.asarray(leaf).dtype.kind not in "biufcV":
            raise TypeError(
                f"{name} must hold numbers, got {short_repr(np.ravel(leaf)[0])}; encode text as "
                "numbers, for example np.unique(text, return_inverse=True)[1]"
            )
