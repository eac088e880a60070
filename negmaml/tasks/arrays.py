"""Tasks from the user's arrays: groups of rows, and episodes of labelled images.

Rows are sorted by group once, on the host. A draw takes rows of a group without replacement. It
draws one random priority for each row of the largest group, and gives the lowest priority to rows
beyond the size of the group. One compiled program then serves groups of any sizes.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from negmaml._core.checks import check_count, short_repr
from negmaml._core.display import Table, add_table_repr, tree_text
from negmaml._core.jit import is_concrete
from negmaml._core.keys import check_key
from negmaml._core.pytree import pytree, static
from negmaml._core.settings import own_settings
from negmaml.meta.batching import Tasks, leading_axis


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

    Raises ValueError when leaves disagree in length, when there are fewer than m groups, and for
    groups with fewer than n_t + n_v rows, by name. The data may be traced by JAX; traced groups
    raise TypeError.

    >>> x, groups = jnp.arange(7.0), [0, 0, 0, 1, 1, 1, 1]
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
    def __init__(self, data, groups, *, m: int, n_t: int, n_v: int):
        m, n_t, n_v = (check_count(n, v) for n, v in (("m", m), ("n_t", n_t), ("n_v", n_v)))
        _set(self, *_sort(data, groups, "groups", n_t + n_v, "n_t + n_v"), m=m, n_t=n_t, n_v=n_v)
        if m > len(self.counts):
            raise ValueError(f"m must be at most the number of groups, {len(self.counts)}, got {m}")

    def _summary(self) -> Table:
        sizes = f"m={self.m}, n_t={self.n_t}, n_v={self.n_v}"
        return _summary("Grouped", self, "groups", sizes)

    @own_settings
    def __call__(self, key) -> Tasks:
        key = check_key("key", key)
        # Independent keys: the rows of a group must not depend on which groups were drawn.
        for_groups, for_rows = jax.random.split(key)
        chosen = _without_replacement(for_groups, len(self.counts), self.m)
        keys = jax.random.split(for_rows, self.m)
        rows = jax.vmap(lambda key, group: _rows(self, key, group, self.n_t + self.n_v))(
            keys, chosen
        )
        # The rows are in random order, so the first ones are a random support.
        support, query = rows[:, : self.n_t], rows[:, self.n_t :]
        return Tasks(*(jax.tree.map(lambda x, r=r: x[r], self.data) for r in (support, query)))


@add_table_repr
@pytree
class Episodes:
    r"""N-way K-shot episodes: classify images of `ways` classes from `shots` examples of each.

    A call with a key returns `Tasks` of `m` episodes: support (images, labels) of leading shape
    (m, ways * shots), query of (m, ways * queries). Each episode draws its own classes, all
    different, labels them 0 ... ways - 1, and draws different images of each.

    Arguments:
        images: array or pytree with one entry an image.
        labels: the class of each image, shape (rows,).
        ways: number of classes in an episode.
        shots, queries: number of support and of query images of each class.
        m: number of episodes in a draw.

    Train and test on different classes: Episodes(images[labels < 6], labels[labels < 6], ...) and
    the rest. Raises ValueError when there are fewer than `ways` classes, and for classes with fewer
    than shots + queries images, by name. Traced labels raise TypeError. Source: Vinyals et al.,
    NeurIPS 2016.
    """

    data: Any
    starts: Any
    counts: Any
    m: int = static()
    ways: int = static()
    shots: int = static()
    queries: int = static()
    longest: int = static()

    @own_settings
    def __init__(self, images, labels, *, ways: int, shots: int, queries: int, m: int):
        sizes = {"ways": ways, "shots": shots, "queries": queries, "m": m}
        sizes = {name: check_count(name, value) for name, value in sizes.items()}
        needed = sizes["shots"] + sizes["queries"]
        data, counts = _sort(images, labels, "labels", needed, "shots + queries")
        _set(self, data, counts, **sizes)
        if ways > len(self.counts):
            raise ValueError(
                f"ways must be at most the number of classes, {len(self.counts)}, got {ways}"
            )

    def _summary(self) -> Table:
        names = ("ways", "shots", "queries", "m")
        sizes = ", ".join(f"{name}={getattr(self, name)}" for name in names)
        return _summary("Episodes", self, "classes", sizes)

    @own_settings
    def __call__(self, key) -> Tasks:
        key = check_key("key", key)
        return jax.vmap(self._episode)(jax.random.split(key, self.m))

    def _episode(self, key) -> Tasks:
        for_classes, for_rows = jax.random.split(key)
        classes = _without_replacement(for_classes, len(self.counts), self.ways)
        keys = jax.random.split(for_rows, self.ways)
        number = self.shots + self.queries
        rows = jax.vmap(lambda key, group: _rows(self, key, group, number))(keys, classes)
        # Labels are positions among the classes of the episode: a class has no fixed label.
        names = jnp.broadcast_to(jnp.arange(self.ways)[:, None], rows.shape)

        def part(start: int, stop: int):
            taken = rows[:, start:stop].ravel()
            images = jax.tree.map(lambda x: x[taken], self.data)
            return images, names[:, start:stop].ravel()

        return Tasks(part(0, self.shots), part(self.shots, number))


def _set(distribution, data, counts: np.ndarray, **sizes) -> None:
    """Set the fields of a frozen distribution, from the sorted data and the sizes of its groups."""
    # A group is the rows starts to starts + counts of the sorted data.
    starts = jnp.asarray(np.cumsum(counts) - counts)
    longest = int(counts.max())
    fields = {"data": data, "starts": starts, "counts": jnp.asarray(counts), "longest": longest}
    for name, value in (fields | sizes).items():
        object.__setattr__(distribution, name, value)


def _summary(name: str, distribution, kind: str, sizes: str) -> Table:
    """Return the printed form of a distribution: its draws, its data and its groups."""
    rows = [("draws", sizes), ("data", tree_text(distribution.data))]
    # Inside jit the sizes are traced, and only shapes can be printed.
    counts = distribution.counts
    if not isinstance(counts, jax.core.Tracer):
        least, most = int(np.min(counts)), int(np.max(counts))
        rows.append((kind, f"{len(counts)} of {least} to {most} rows"))
    return Table(f"{name}, a distribution of tasks", rows)


def _sort(data, groups, name: str, needed: int, expression: str):
    """Return the data with the rows of each group together, and the size of each group.

    The data may be traced. The groups may not, since their number and sizes determine shapes.
    """
    _check_numbers("images" if name == "labels" else "data", data)
    if not is_concrete(groups):
        raise TypeError(
            f"{name} must be known, got {short_repr(groups)} under jit, grad or vmap: the sizes of "
            "groups determine shapes; build the distribution outside and pass it, it is a pytree"
        )
    rows, groups = leading_axis("data", data), np.asarray(groups)
    if groups.shape != (rows,):
        raise ValueError(f"{name} must have one entry a row, shape ({rows},), got {groups.shape}")
    # NaN, which differs from itself, and None mark rows without a group in tables.
    missing = [label is None or label != label for label in groups.tolist()]
    if any(missing):
        raise ValueError(
            f"{name} must have a value in every row, got {groups[missing.index(True)]!r} in row "
            f"{missing.index(True)}; leave such rows out"
        )
    # Labels may be text: their positions among the sorted values number the groups.
    values, counts = np.unique(groups, return_counts=True)
    small = [f"{v} ({c})" for v, c in zip(values, counts, strict=True) if c < needed]
    if small:
        raise ValueError(
            f"{len(small)} of {len(values)} values in {name} have fewer than {expression} = "
            f"{needed} rows: {', '.join(small[:5])}; leave their rows out or ask for fewer"
        )
    order = np.argsort(groups, kind="stable")
    # Data that are not traced are sorted on the host, without a second copy on the device.
    data = jax.tree.map(lambda x: (np.asarray(x) if is_concrete(x) else x)[order], data)
    return jax.tree.map(jnp.asarray, data), counts


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


def _rows(distribution, key, group, number: int):
    """Return `number` different rows of a group."""
    # The draw is of positions within the group, whose rows are contiguous.
    within = _without_replacement(key, distribution.longest, number, distribution.counts[group])
    return distribution.starts[group] + within


def _without_replacement(key, longest: int, number: int, count=None):
    """Return `number` different integers below `count`, which is at most `longest`."""
    priority = jax.random.uniform(key, (longest,))
    # `count` may differ from group to group under vmap, shapes may not: rows beyond it are never
    # among the highest priorities, since a group has at least `number` rows.
    if count is not None:
        priority = jnp.where(jnp.arange(longest) < count, priority, -1.0)
    # Positions of the largest of independent numbers are a random subset in random order.
    return lax.top_k(priority, number)[1]
