"""Tasks from groups of rows of the user's arrays."""

from typing import Any

import jax

from negmaml._core.checks import check_count
from negmaml._core.display import Table, add_table_repr
from negmaml._core.keys import check_key
from negmaml._core.pytree import pytree, static
from negmaml._core.settings import own_settings
from negmaml._core.types import PRNGKeyArray, PyTree
from negmaml.meta.batching import Tasks
from negmaml.tasks.rows import (
    check_rows,
    check_sizes,
    group_fields,
    highest,
    priorities,
    rows_of_group,
    set_fields,
    sort_rows,
    summary,
    take_rows,
)


@add_table_repr
@pytree
class Grouped:
    r"""Tasks from groups of rows, such as schools, patients or users, of any sizes.

    A call with a key returns `Tasks` of `m` different groups. Each has n_t support and n_v query
    rows, all different. The leaves have shapes (m, n_t, ...) and (m, n_v, ...).

    Arguments:
        data: pytree of arrays with one entry a row, such as (x, y).
        groups: the group of each row, shape (rows,), integers or strings.
        m, n_t, n_v: number of tasks, of support rows and of query rows in a draw.

    Attributes:
        data: the rows, sorted by group.
        starts, counts: the first row and the number of rows of each group.
        longest: the largest number of rows of a group.

    Raises ValueError when leaves disagree in length, when there are fewer than m groups, and for
    groups with fewer than n_t + n_v rows, by name. The data may be traced by JAX; traced groups
    raise TypeError.

    >>> x, groups = jax.numpy.arange(7.0), [0, 0, 0, 1, 1, 1, 1]
    >>> Grouped(x, groups, m=2, n_t=2, n_v=1)(jax.random.key(0)).support.shape
    (2, 2)
    """

    data: Any
    starts: Any
    counts: Any
    m: int = static()
    n_t: int = static()
    n_v: int = static()
    longest: int = static()

    @own_settings
    def __init__(self, data: PyTree, groups: Any, *, m: int, n_t: int, n_v: int) -> None:
        m, n_t, n_v = (check_count(n, v) for n, v in (("m", m), ("n_t", n_t), ("n_v", n_v)))
        groups = check_rows("data", "groups", data, groups)
        order, values, counts = sort_rows("groups", groups, None)
        check_sizes("groups", values, counts, n_t + n_v, "n_t + n_v")
        if m > len(counts):
            raise ValueError(f"m must be at most the number of groups, {len(counts)}, got {m}")
        set_fields(self, data=take_rows(data, order), m=m, n_t=n_t, n_v=n_v, **group_fields(counts))

    def _summary(self) -> Table:
        sizes = f"m={self.m}, n_t={self.n_t}, n_v={self.n_v}"
        return summary("Grouped", self, "groups", sizes)

    @own_settings
    def __call__(self, key: PRNGKeyArray) -> Tasks:
        key = check_key("key", key)
        # Independent keys: the rows of a group must not depend on which groups were drawn.
        for_groups, for_rows = jax.random.split(key)
        chosen = highest(priorities(for_groups, len(self.counts)), self.m)
        keys = jax.random.split(for_rows, self.m)
        number = self.n_t + self.n_v
        rows = jax.vmap(lambda key, group: rows_of_group(self, key, group, number))(keys, chosen)
        # The rows are in random order, so the first ones are a random support.
        support, query = rows[:, : self.n_t], rows[:, self.n_t :]
        return Tasks(*(jax.tree.map(lambda x, r=r: x[r], self.data) for r in (support, query)))
