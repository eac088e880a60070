"""Batches of tasks, and means over them a block at a time."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from negmaml._core.display import Table, add_table_repr, tree_text
from negmaml._core.keys import with_counter_based_keys


@add_table_repr
class Tasks(NamedTuple):
    """A batch of tasks: pytrees whose leaves lead with the task axis.

    Attributes:
        support: the data that each task adapts on.
        query: the data that the adapted parameters are judged on.

    A pair (support, query) or a dict with these keys works wherever tasks are accepted. A pair of
    bare arrays of different kinds raises TypeError, since it is most likely the rows (x, y) of one
    set.

    >>> import negmaml as nm
    >>> x, y = jnp.zeros((25, 10, 1)), jnp.zeros((25, 10))  # 25 tasks of 10 rows
    >>> tasks = nm.Tasks(support=(x[:, :4], y[:, :4]), query=(x[:, 4:], y[:, 4:]))
    >>> tasks.support[0].shape, tasks.query[1].shape
    ((25, 4, 1), (25, 6))
    """

    support: Any
    query: Any

    def _summary(self) -> Table:
        # Printing takes leaves of any kind, which `jnp.shape` does not.
        counts = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(tuple(self))}
        (count,) = counts if len(counts) == 1 else [()]
        title = f"Tasks, {count[0]} of them" if count else "Tasks"
        return Table(title, [(name, tree_text(part)) for name, part in self._asdict().items()])


def as_tasks(tasks) -> Tasks:
    """Return `Tasks` from a pair or a dict with support and query; raise TypeError otherwise."""
    if isinstance(tasks, Mapping) and set(tasks) == {"support", "query"}:
        tasks = Tasks(tasks["support"], tasks["query"])
    # `Tasks` themselves are a tuple of two, but need no check: the user named both parts.
    if isinstance(tasks, tuple | list) and len(tasks) == 2:
        pair = Tasks(*with_counter_based_keys(tuple(tasks)))
        return pair if isinstance(tasks, Tasks) else _check_pair(pair)
    held = f" with {sorted(map(str, tasks))}" if isinstance(tasks, Mapping) else ""
    # The type of an array under a trace says nothing to its author.
    got = tree_text(tasks) if hasattr(tasks, "dtype") else type(tasks).__name__
    raise TypeError(
        "tasks must be Tasks(support, query), a pair of them or a dict with 'support' and 'query', "
        f"got {got}{held}"
    )


def _check_pair(tasks: Tasks) -> Tasks:
    """Raise for bare arrays of unlike kinds: support and query may differ only in their rows."""
    if not _bare(tasks):
        return tasks
    # Support and query may have different numbers of rows, axis 1; all else must agree.
    kinds = [(jnp.ndim(x), jnp.shape(x)[2:], jnp.result_type(x)) for x in tasks]
    if kinds[0] != kinds[1]:
        raise TypeError(
            f"tasks must be (support, query), got a pair of unlike arrays, {tree_text(tasks[0])} "
            f"and {tree_text(tasks[1])}. {_PAIRS}; if these arrays are meant, pass "
            "Tasks(support, query)"
        )
    return tasks


def _bare(tasks: Tasks) -> bool:
    return all(hasattr(part, "dtype") and hasattr(part, "shape") for part in tasks)


_PAIRS = (
    "A pair is read as (support, query), never as the rows (x, y) of one set: for these give "
    "((x_support, y_support), (x_query, y_query))"
)


def leading_axis(name: str, tree) -> int:
    """Return the common length of the leading axes; raise ValueError unless it is at least 1."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]
    # A scalar leaf counts as length 0, which is an error like an empty axis.
    counts = {shape[0] if shape else 0 for shape in shapes}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(
            f"every leaf of {name} must lead with the same axis, of at least one entry; "
            f"got shapes {shapes}"
        )
    return counts.pop()


def mean_over_tasks(block: Callable, tasks: tuple, batch_size: int | None, scale=None):
    """Return the mean over tasks and a stack of aux, computed `batch_size` tasks at a time.

    tasks: support, query and anything else that leads with the task axis. block(tasks, weight) ->
    (sums over tasks, aux). The weight is one over the number of all tasks and multiplies each loss
    before differentiation. A derivative rule that is not linear, such as one that clips, then gets
    the cotangents of the gradient of the mean. With a scale the weight and the sums are multiplied
    by it.
    """
    try:
        return mean_in_blocks(block, tasks, batch_size, scale)
    except (TypeError, ValueError) as error:
        # (x, y) of equal shapes passes the check above, and only the loss can fail on it.
        support, query, *_ = tasks
        if _bare(Tasks(support, query)):
            error.add_note(
                f"tasks has the arrays {tree_text(support)} as support and {tree_text(query)} as "
                f"query. {_PAIRS}"
            )
        raise


def mean_in_blocks(block: Callable, tasks, batch_size: int | None, scale=None):
    """Return `mean_over_tasks` of any pytree of arrays that lead with the same axis."""
    count = leading_axis("tasks.support and tasks.query", tasks)
    size = count if batch_size is None else min(batch_size, count)
    whole = count // size * size  # tasks in blocks of full size
    weight = 1 / count if scale is None else scale / count
    # One block needs no loop, and `jax.grad` of it no stored carry.
    if size == count:
        return block(tasks, weight)
    block = partial(block, weight=weight)
    blocks = jax.tree.map(lambda x: x[:whole].reshape(-1, size, *x.shape[1:]), tasks)
    shapes = jax.eval_shape(block, jax.tree.map(lambda x: x[0], blocks))[0]

    # A scan keeps the memory at one block; `lax.map` would stack the gradients of all blocks.
    def add(total, tasks):
        sums, aux = block(tasks)
        return jax.tree.map(jnp.add, total, sums), aux

    sums, aux = lax.scan(add, jax.tree.map(jnp.zeros_like, shapes), blocks)
    aux = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), aux)
    # A last block of another size is a second program, traced beside the scan.
    if whole < count:
        sums, rest = add(sums, jax.tree.map(lambda x: x[whole:], tasks))
        aux = jax.tree.map(lambda *parts: jnp.concatenate(parts), aux, rest)
    return sums, aux
