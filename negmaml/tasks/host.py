"""Episodes whose images stay on the host: their rows are drawn, and only those are sent."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from negmaml._core.checks import short_repr
from negmaml._core.display import Table, add_table_repr
from negmaml._core.jit import is_concrete
from negmaml._core.keys import check_key
from negmaml._core.meshes import only
from negmaml._core.settings import own_settings
from negmaml._core.types import PRNGKeyArray
from negmaml.meta.batching import Tasks
from negmaml.tasks.episodes import COUNTS, Episodes
from negmaml.tasks.rows import summary

AHEAD = 2  # batches that are read while the device computes


@add_table_repr
class HostEpisodes:
    r"""`Episodes` of images that stay on the host, such as a `np.memmap` larger than the device.

    Arguments:
        images: NumPy array, `np.memmap` or pytree of them, with one entry an image. It is neither
            copied nor sorted.
        labels, and all others: as in `Episodes`.

    A call with a key returns the tasks that `Episodes` returns for it. Only their images are read
    and sent to the device, where they are scaled, turned and augmented. `batches(key)` is an
    iterable for `fit`, which resumes at a checkpoint. For `evaluate` draw tasks once, with an `m`
    of all episodes. Raises as `Episodes` does, and TypeError within jit.

    >>> images, labels = np.zeros((12, 4, 4), np.uint8), np.repeat(["a", "b", "c"], 4)
    >>> host = HostEpisodes(images, labels, ways=2, shots=1, queries=3, m=5)
    >>> batch = next(iter(host.batches(jax.random.key(0))))
    >>> batch.query[0].shape, batch.query[0].dtype
    ((5, 6, 4, 4), dtype('float32'))
    """

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
        # These episodes have no data: they draw rows, and finish images that were read.
        self.episodes: Episodes = object.__new__(Episodes)
        self.order: np.ndarray = self.episodes.plan(images, labels, classes, options)
        self.data: Any = images

    def replace(self, **changes: Any) -> "HostEpisodes":
        """Return the distribution with other sizes or options, as `Episodes.replace` does."""
        new = object.__new__(HostEpisodes)
        new.episodes, new.order, new.data = self.episodes.replace(**changes), self.order, self.data
        return new

    def batches(self, key: PRNGKeyArray) -> "EpisodeBatches":
        """Return an endless iterable of draws for `fit`; batch i is that of fold_in(key, i)."""
        return EpisodeBatches(self, check_key("key", key))

    @property
    def counts(self) -> np.ndarray:
        """The number of images of each class."""
        return self.episodes.counts

    def _summary(self) -> Table:
        sizes = ", ".join(f"{name}={getattr(self.episodes, name)}" for name in COUNTS)
        return summary("HostEpisodes", self, "classes", sizes)

    def __call__(self, key: PRNGKeyArray) -> Tasks:
        if not is_concrete(key):
            raise TypeError(
                f"key must be known, got {short_repr(key)} under jit, grad or vmap: HostEpisodes "
                "reads images on the host. Pass HostEpisodes.batches(key) to fit, and the tasks of "
                "one draw to evaluate"
            )
        key = check_key("key", key)
        drawn = self.draw(key)
        return self.finish(key, drawn, self.read(drawn))

    @own_settings
    def draw(self, key: PRNGKeyArray) -> Tasks:
        """Return the rows of all episodes of a draw, on the host."""
        # Drawn on the CPU: an accelerator may be busy for long with the steps before.
        with only(_cpu()) as device:
            arguments = jax.device_put((self.episodes, key), device)
            return jax.tree.map(np.asarray, _draw(*arguments))

    def read(self, drawn: Tasks) -> Tasks:
        """Return the images of these rows."""
        return Tasks(*(
            jax.tree.map(lambda x, r=part.rows: np.asarray(x[self.order[r]]), self.data)
            for part in drawn
        ))  # fmt: skip

    @own_settings
    def finish(self, key: PRNGKeyArray, drawn: Tasks, images: Tasks) -> Tasks:
        """Return the tasks of these rows and images."""
        with only(jax.local_devices()[0]) as device:
            return _finish(*jax.device_put((self.episodes, key, drawn, images), device))


class EpisodeBatches:
    """The draws of `HostEpisodes` in the order of their numbers, from 0 on, without an end."""

    def __init__(self, source: HostEpisodes, key: PRNGKeyArray) -> None:
        self.source: HostEpisodes = source
        self.key: PRNGKeyArray = key

    @property
    def stream_identity(self) -> tuple[Any, ...]:
        """The numbers that decide the draws: `fit` resumes a checkpoint only of equal ones."""
        source = self.source
        episodes = source.episodes
        return (self.key, source.order, episodes.starts, episodes.counts, episodes.balanced,
                episodes.orientations, episodes.scale)  # fmt: skip

    def __iter__(self) -> "EpisodeIterator":
        return EpisodeIterator(self.source, self.key)


class EpisodeIterator(Iterator[Tasks]):
    """Reads images in a thread while earlier batches are in use.

    Every batch has a number, so the position is one number, and reading ahead changes nothing.
    """

    def __init__(self, source: HostEpisodes, key: PRNGKeyArray) -> None:
        self.source: HostEpisodes = source
        self.key: PRNGKeyArray = key
        self.number: int = 0
        self.pending: deque[Any] = deque()
        self.reader: ThreadPoolExecutor = ThreadPoolExecutor(1, "episodes")

    def __next__(self) -> Tasks:
        while len(self.pending) <= AHEAD:
            key = jax.random.fold_in(self.key, self.number + len(self.pending))
            drawn = self.source.draw(key)
            # Only NumPy runs in the thread: settings of JAX belong to the thread that made them.
            self.pending.append((key, drawn, self.reader.submit(self.source.read, drawn)))
        key, drawn, images = self.pending.popleft()
        self.number += 1
        return self.source.finish(key, drawn, images.result())

    def get_state(self) -> dict[str, int]:
        """Return the position: the number of the next batch."""
        return {"batch": self.number}

    def set_state(self, state: dict[str, int]) -> None:
        """Continue with the batch of this number."""
        self.pending.clear()
        self.number = int(state["batch"])


@jax.jit
def _draw(episodes: Episodes, key) -> Tasks:
    return jax.vmap(episodes.draw)(jax.random.split(key, episodes.m))


@jax.jit
def _finish(episodes: Episodes, key, drawn: Tasks, images: Tasks) -> Tasks:
    return jax.vmap(episodes.finish)(jax.random.split(key, episodes.m), drawn, images)


def _cpu():
    """Return the CPU as a device of JAX, or the default device where JAX has no CPU."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]
