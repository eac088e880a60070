"""Batches of tasks, and means over them a block at a time."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from negmaml._core.display import Table, displayed, tree_text


@displayed
class Tasks(NamedTuple):
    """A batch of tasks: pytrees whose leaves lead with the task axis.

    A pair (support, query) and a dict with these two entries are taken for it everywhere.
    """

    support: Any
    query: Any

    def _summary(self) -> Table:
        counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(tuple(self))}
        (count,) = counts if len(counts) == 1 else [()]
        title = f"Tasks, {count[0]} of them" if count else "Tasks"
        return Table(title, [(name, tree_text(part)) for name, part in self._asdict().items()])


def as_tasks(tasks) -> Tasks:
    """Tasks of a pair or of a dict with support and query; TypeError for anything else."""
    if isinstance(tasks, Mapping) and set(tasks) == {"support", "query"}:
        return Tasks(tasks["support"], tasks["query"])
    if isinstance(tasks, tuple | list) and len(tasks) == 2:
        return Tasks(*tasks)
    held = f" with {sorted(map(str, tasks))}" if isinstance(tasks, Mapping) else ""
    raise TypeError(
        "tasks must be Tasks(support, query), a pair of them or a dict with 'support' and 'query', "
        f"got {type(tasks).__name__}{held}"
    )


def leading_axis(name: str, tree) -> int:
    """The common length of the leading axes, at least one; ValueError if there is none."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]
    counts = {shape[0] if shape else 0 for shape in shapes}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(
            f"every leaf of {name} must lead with the same axis, of at least one entry; "
            f"got shapes {shapes}"
        )
    return counts.pop()


def mean_over_tasks(block: Callable, tasks: Tasks, batch_size: int | None):
    """The mean over tasks, computed `batch_size` tasks at a time.

    block(tasks, weight) -> (sums over tasks, aux). The weight, one over the number of all tasks, is
    a factor of each loss before it is differentiated. A backward rule that is not linear, such as
    one that clips, then meets the cotangents of the gradient of the mean.
    """
    count = leading_axis("tasks.support and tasks.query", tuple(tasks))
    size = count if batch_size is None else min(batch_size, count)
    whole = count // size * size
    if size == count:
        return block(tasks, 1 / count)
    block = partial(block, weight=1 / count)
    blocks = jax.tree.map(lambda x: x[:whole].reshape(-1, size, *x.shape[1:]), tasks)
    shapes = jax.eval_shape(block, jax.tree.map(lambda x: x[0], blocks))[0]

    def add(total, tasks):
        sums, aux = block(tasks)
        return jax.tree.map(jnp.add, total, sums), aux

    sums, aux = lax.scan(add, jax.tree.map(jnp.zeros_like, shapes), blocks)
    aux = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), aux)
    if whole < count:
        sums, rest = add(sums, jax.tree.map(lambda x: x[whole:], tasks))
        aux = jax.tree.map(lambda *parts: jnp.concatenate(parts), aux, rest)
    return sums, aux
