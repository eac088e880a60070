"""Few-shot episodes of labelled images, and disjoint splits of their classes."""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.calls import explain_calls
from negmaml._core.checks import (
    check_count,
    check_flag,
    check_takes,
    short_repr,
)
from negmaml._core.display import Table, add_table_repr
from negmaml._core.keys import as_typed, check_key
from negmaml._core.pytree import as_pytree, pytree, static
from negmaml._core.settings import own_settings
from negmaml._core.types import PRNGKeyArray
from negmaml.meta.batching import Tasks
from negmaml.tasks.rows import (
    check_labels,
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

COUNTS = ("ways", "shots", "queries", "m")
# Addresses of what an episode draws besides its classes and rows, which have 0 and 1.
OF_TASK, OF_IMAGES, OF_DATA, OF_QUERY = 2, 3, 4, 5


class EpisodeRows(NamedTuple):
    """The draw of one episode: rows of the sorted data, their labels and orientations."""

    rows: Any
    labels: Any
    turns: Any


@add_table_repr
@pytree
class Episodes:
    r"""N-way K-shot episodes: classify images of `ways` classes from `shots` examples of each.

    A call with a key returns `Tasks` of `m` episodes: support (images, labels) of leading shape
    (m, ways * shots), query of (m, ways * queries). Each episode draws its own classes, all
    different, labels them 0 ... ways - 1, and draws different images of each.

    Arguments:
        images: array or pytree with one entry an image.
        labels: the class of each image, shape (rows,), integers or strings.
        ways: number of classes in an episode.
        shots, queries: number of support and of query images of each class.
        m: number of episodes in a draw.
        classes: the classes to draw from, all by default; see `split_classes`. Images of other
            classes are not copied to the device.
        balanced: whether every class has `queries` images in the query. Otherwise ways * queries
            are drawn from all images of the classes that are not in the support.
        orientations: 4 makes each quarter turn of a class a class of its own, 8 also those of its
            mirror image. Images must be square, of shape (rows, side, side, ...).
        augment: function (key, image) -> image, with another key for each image.
        augment_task: function (key, image) -> image, with one key for all images of an episode. It
            comes before `augment`.
        scale: whether images of uint8 are returned as float32 from 0 to 1. They are kept as uint8.
        keys: whether support and query end in a random key for each task, (images, labels, key).

    Attributes:
        data: the images, sorted by class.
        starts, counts: the first row and the number of rows of each class.
        longest: the largest number of rows of a class.

    Every draw has an address: episode i of a key depends on the key and i only, and so do its
    augmentations. `replace` changes the sizes and options, for example for the test. `HostEpisodes`
    leaves the images on the host. Raises ValueError when there are fewer than `ways` classes, and
    for classes with fewer than shots + queries images, by name. Traced labels raise TypeError.
    Sources: Vinyals et al., NeurIPS 2016; Santoro et al., ICML 2016, for turned classes.

    >>> images, labels = np.zeros((12, 4, 4)), np.repeat(["a", "b", "c"], 4)
    >>> draw = Episodes(images, labels, ways=2, shots=1, queries=3, m=5)
    >>> [x.shape for x in draw(jax.random.key(0)).query]
    [(5, 6, 4, 4), (5, 6)]
    """

    data: Any
    starts: Any
    counts: Any
    augment: Any
    augment_task: Any
    m: int = static()
    ways: int = static()
    shots: int = static()
    queries: int = static()
    longest: int = static()
    balanced: bool = static()
    orientations: int = static()
    scale: bool = static()
    keys: bool = static()

    @own_settings
    def __init__(
        self,
        images: Any,
        labels: Any,
        *,
        ways: int,
        shots: int,
        queries: int,
        m: int,
        classes: Any = None,
        balanced: bool = True,
        orientations: int = 1,
        augment: Any = None,
        augment_task: Any = None,
        scale: bool = True,
        keys: bool = False,
    ) -> None:
        options = {"ways": ways, "shots": shots, "queries": queries, "m": m, "balanced": balanced,
                   "orientations": orientations, "augment": augment, "augment_task": augment_task,
                   "scale": scale, "keys": keys}  # fmt: skip
        order = self.plan(images, labels, classes, options)
        set_fields(self, data=take_rows(images, order))

    def plan(self, images: Any, labels: Any, classes: Any, options: dict[str, Any]) -> np.ndarray:
        """Set all fields but the data; return the images' rows in the order of their classes."""
        labels = check_rows("images", "labels", images, labels)
        fields = _check_options(images, options)
        order, values, counts = sort_rows("labels", labels, classes)
        set_fields(self, data=None, **fields, **group_fields(counts))
        _check_rows_suffice(self, values, counts)
        return order

    def replace(self, **changes: Any) -> "Episodes":
        """Return the distribution with other sizes or options, on the same images.

        It takes all keywords of the class except `classes`, such as ways=10, m=100, augment=None.
        """
        unknown = changes.keys() - set(OPTIONS)
        if unknown:
            raise TypeError(
                f"replace takes {', '.join(OPTIONS)}, got {', '.join(sorted(unknown))}; build "
                "another distribution for other images or classes"
            )
        new = object.__new__(type(self))
        options = {name: getattr(self, name) for name in OPTIONS}
        kept = {name: getattr(self, name) for name in ("data", "starts", "counts", "longest")}
        set_fields(new, **kept, **_check_options(self.data, options | changes))
        _check_rows_suffice(new, np.arange(len(self.counts)), np.asarray(self.counts))
        return new

    def _summary(self) -> Table:
        sizes = ", ".join(f"{name}={getattr(self, name)}" for name in COUNTS)
        return summary("Episodes", self, "classes", sizes)

    @own_settings
    def __call__(self, key: PRNGKeyArray) -> Tasks:
        key = check_key("key", key)
        return jax.vmap(self._episode)(jax.random.split(key, self.m))

    def _episode(self, key) -> Tasks:
        support, query = self.draw(key)
        images = [jax.tree.map(lambda x, r=part.rows: x[r], self.data) for part in (support, query)]
        return self.finish(key, Tasks(support, query), Tasks(*images))

    def draw(self, key: PRNGKeyArray) -> Tasks:
        """Return the `EpisodeRows` of support and query of one episode."""
        for_classes, for_rows = jax.random.split(key)
        kinds = len(self.counts) * self.orientations
        chosen = highest(priorities(for_classes, kinds), self.ways)
        groups, turns = chosen % len(self.counts), chosen // len(self.counts)
        keys = jax.random.split(for_rows, self.ways)
        support, query = (self._balanced if self.balanced else self._unbalanced)(keys, groups)

        # Labels are positions among the classes of the episode: a class has no fixed label.
        def part(rows, labels):
            return EpisodeRows(rows.ravel(), labels.ravel(), turns[labels.ravel()])

        return Tasks(part(*support), part(*query))

    def _balanced(self, keys, groups):
        """Return (rows, labels) of support and query, each of shape (ways, number)."""
        number = self.shots + self.queries
        rows = jax.vmap(lambda key, group: rows_of_group(self, key, group, number))(keys, groups)
        labels = jnp.broadcast_to(jnp.arange(self.ways)[:, None], rows.shape)
        cut = self.shots
        return (rows[:, :cut], labels[:, :cut]), (rows[:, cut:], labels[:, cut:])

    def _unbalanced(self, keys, groups):
        """Return (rows, labels), the query from all rows that are not in the support."""
        starts, counts = self.starts[groups], self.counts[groups]

        def of_classes(keys):
            return jax.vmap(lambda key, n: priorities(key, self.longest, n))(keys, counts)

        within = jax.vmap(lambda priority: highest(priority, self.shots))(of_classes(keys))
        labels = jnp.broadcast_to(jnp.arange(self.ways)[:, None], within.shape)
        # Fresh priorities: those of the rows left over are lower in small classes.
        fresh = of_classes(jax.vmap(lambda key: jax.random.fold_in(key, OF_QUERY))(keys))
        left = highest(fresh.at[labels, within].set(-1.0).ravel(), self.ways * self.queries)
        label, position = left // self.longest, left % self.longest
        return (starts[:, None] + within, labels), (starts[label] + position, label)

    def finish(self, key: PRNGKeyArray, drawn: Tasks, images: Tasks) -> Tasks:
        """Return one episode from its rows and their images: scaled, turned and augmented."""
        parts = []
        for number, (rows, some) in enumerate(zip(drawn, images, strict=True)):
            some = jax.tree.map(_scaled, some) if self.scale else some
            if self.orientations > 1:
                some = jax.tree.map(lambda x, t=rows.turns: jax.vmap(oriented)(x, t), some)
            if self.augment_task is not None:
                some = jax.vmap(self.augment_task, (None, 0))(_address(key, OF_TASK), some)
            if self.augment is not None:
                keys = jax.random.split(_address(key, OF_IMAGES, number), len(rows.rows))
                some = jax.vmap(self.augment)(keys, some)
            if not jax.tree.leaves(some):
                raise TypeError("augment and augment_task must return an image, got None")
            own = [as_typed(_address(key, OF_DATA, number))] if self.keys else []
            parts.append((some, rows.labels, *own))
        return Tasks(*parts)


OPTIONS = (*COUNTS, "balanced", "orientations", "augment", "augment_task", "scale", "keys")


def _check_options(images, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options, checked, with functions as pytrees."""
    checks = dict.fromkeys(COUNTS, check_count) | dict.fromkeys(
        ("balanced", "scale", "keys"), check_flag
    )
    checked = options | {name: check(name, options[name]) for name, check in checks.items()}
    for name in ("augment", "augment_task"):
        if options[name] is not None:
            checked[name] = as_pytree(check_takes(name, options[name], "(key, image) -> image", 2))
    if isinstance(options["orientations"], bool) or options["orientations"] not in (1, 4, 8):
        raise ValueError(
            f"orientations must be 1, 4 (quarter turns) or 8 (and mirror images), got "
            f"{short_repr(options['orientations'])}"
        )
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(images)]
    if options["orientations"] > 1 and any(len(s) < 3 or s[1] != s[2] for s in shapes):
        raise ValueError(
            f"orientations={options['orientations']} needs square images of shape (rows, side, "
            f"side, ...), got {', '.join(map(str, shapes))}; put channels last"
        )
    return checked


def _check_rows_suffice(episodes: Episodes, values, counts) -> None:
    """Raise ValueError unless every draw finds its classes and different images of each."""
    ways, shots, queries = episodes.ways, episodes.shots, episodes.queries
    if episodes.balanced:
        check_sizes("labels", values, counts, shots + queries, "shots + queries")
    else:
        check_sizes("labels", values, counts, shots, "shots")
    kinds = len(counts) * episodes.orientations
    if ways > kinds:
        turned = "" if episodes.orientations == 1 else " in all orientations"
        raise ValueError(f"ways must be at most the number of classes{turned}, {kinds}, got {ways}")
    # The draw may be of the smallest classes, in all their orientations.
    fewest = int(np.sort(np.repeat(counts, episodes.orientations))[:ways].sum())
    if fewest < ways * (shots + queries):
        raise ValueError(
            f"queries must leave ways * (shots + queries) at most {fewest}, the number of images "
            f"of the {ways} smallest classes, got {queries} with ways={ways} and shots={shots}"
        )


def _address(key, *numbers: int):
    """Return the key for what these numbers name, one after another."""
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key


def _scaled(images):
    """Return images of uint8 as float32 from 0 to 1, others unchanged."""
    return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images


def oriented(image, turn):
    """Return a square image after `turn` quarter turns, of its mirror image from 4 on."""
    image = jnp.where(turn >= 4, image[:, ::-1], image)
    image = jnp.where(turn % 4 >= 2, image[::-1, ::-1], image)
    return jnp.where(turn % 2 == 1, jnp.rot90(image), image)


@explain_calls
def split_classes(
    labels: Any, sizes: Sequence[float], *, key: PRNGKeyArray | None = None
) -> tuple[np.ndarray, ...]:
    """Return disjoint sets of the classes in `labels`, for training, validation and test.

    Arguments:
        labels: the class of each image, integers or strings.
        sizes: the number of classes in each set, such as (64, 16, 20), or their fractions, such as
            (0.6, 0.2, 0.2). Classes beyond their sum are in no set.
        key: random key that permutes the classes; they are in sorted order by default.

    Pass each result to `Episodes(..., classes=)`. Raises ValueError unless every set has a class
    and their sum is at most the number of classes.

    >>> train, test = split_classes(["cat", "dog", "cat", "bird"], (2, 1))
    >>> train.tolist(), test.tolist()
    (['bird', 'cat'], ['dog'])
    """
    classes = np.unique(check_labels("labels", labels))
    sizes = _check_set_sizes(sizes, len(classes))
    if key is not None:
        order = jax.random.permutation(check_key("key", key), len(classes))
        classes = classes[np.asarray(order)]
    ends = np.cumsum(sizes)
    return tuple(np.sort(part) for part in np.split(classes[: ends[-1]], ends[:-1]))


def _check_set_sizes(given, number: int) -> list[int]:
    """Return the number of classes in each set."""
    sizes: Any = list(given) if isinstance(given, Sequence | np.ndarray) else [None]
    whole = all(isinstance(s, Integral) and not isinstance(s, bool) for s in sizes)
    parts = whole or all(isinstance(s, Real) and 0 < float(s) <= 1 for s in sizes)
    if not sizes or not parts or isinstance(given, str):
        raise ValueError(
            "sizes must be numbers of classes such as (64, 16, 20), or fractions such as "
            f"(0.6, 0.2, 0.2), got {short_repr(given)}"
        )
    # Rounding the ends, not the sizes: fractions that sum to one take every class.
    counts: Any = sizes if whole else np.diff([0, *np.rint(np.cumsum(sizes) * number)]).astype(int)
    if min(counts) < 1 or sum(counts) > number:
        raise ValueError(
            f"sizes must give every set a class, and at most all {number} classes in labels, got "
            f"{short_repr(given)}"
        )
    return [int(count) for count in counts]
