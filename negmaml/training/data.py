"""Where the tasks of each step come from: a function of a key, fixed tasks, or batches in turn.

Batches are what a loader gives: NumPy or torch arrays in a pair, a dict or any pytree. The next one
is fetched and sent to the device while the step before it is computed.
"""

import inspect
import re
import warnings
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from negmaml._core.checks import check_count, short_repr
from negmaml._core.pytree import as_pytree
from negmaml.meta.batching import Tasks
from negmaml.training.sharding import Spread

GROUP, GROUP_BYTES = 16, 2**25  # batches that are sent at once, at most


def task_source(name: str, tasks) -> tuple[Any, Iterable | None]:
    """(function of a key as a pytree, None) or (None, iterable of batches)."""
    if callable(tasks):
        _check_takes_a_key(name, tasks)
        return as_pytree(tasks), None
    if isinstance(tasks, Tasks):
        return Partial(_fixed, tasks), None
    if isinstance(tasks, Iterable) and not isinstance(tasks, str | bytes | dict | jax.Array):
        if isinstance(tasks, Sized) and not len(tasks):
            raise ValueError(f"{name} must hold at least one batch, got {short_repr(tasks)}")
        return None, tasks
    raise TypeError(
        f"{name} must be a function key -> tasks, an iterable of batches such as a DataLoader, or "
        f"one fixed batch Tasks(support, query), got {type(tasks).__name__}"
    )


def _check_takes_a_key(name: str, sample) -> None:
    try:
        inspect.signature(sample).bind("key")
    except TypeError as mismatch:
        raise TypeError(
            f"{name} must be a function of a key alone, got {short_repr(sample)} ({mismatch})"
        ) from None
    except ValueError:  # built in, without a signature
        return


def _fixed(tasks, key):
    return tasks


def number_of_steps(steps: int | None, epochs: int | None, batches) -> int:
    """`steps` checked, or those of so many passes over the batches."""
    if (steps is None) == (epochs is None):
        raise ValueError(f"give either steps or epochs, got steps={steps!r}, epochs={epochs!r}")
    if steps is not None:
        return check_count("steps", steps)
    if not isinstance(batches, Sized):
        raise ValueError(
            f"epochs={epochs!r} needs an iterable of batches with a length as sample_tasks, got "
            f"{type(batches).__name__}; give steps"
        )
    return check_count("epochs", epochs) * check_count("len(sample_tasks)", len(batches))


def check_sampler(name: str, sample: Partial, key) -> None:
    """Raise if a function of a key gives other tasks when asked again; warn if it ignores the key.

    A function that JAX traces runs once: what it takes from an iterator or a global generator then
    would be the tasks of every step. Traced twice, it shows.
    """
    if not isinstance(sample, Partial) or sample.func is _fixed:
        return  # a distribution of tasks, which is a pytree of its own
    first, second = (jax.make_jaxpr(lambda key: sample(key))(key) for _ in range(2))
    if not _same(first, second):
        raise ValueError(
            f"{name} gives other tasks when it is called again with the same key, so it draws from "
            "an iterator or from a random state of its own. It is traced once, and one draw would "
            f"serve every step. Draw with jax.random and the key, or pass the iterable itself as "
            f"{name}"
        )
    (variable,) = first.jaxpr.invars
    used = {id(atom) for equation in first.jaxpr.eqns for atom in equation.invars}
    used |= {id(atom) for atom in first.jaxpr.outvars}
    if first.jaxpr.outvars and id(variable) not in used:
        warnings.warn(
            f"{name} does not use its key, so every step has the same tasks; if that is meant, "
            f"pass the tasks themselves as {name}, else draw them with jax.random and the key",
            stacklevel=6,
        )


def _same(first, second) -> bool:
    """Whether two traces of a function are one, constants included."""
    texts = [re.sub("0x[0-9a-f]+", "", str(closed)) for closed in (first, second)]
    pairs = list(zip(first.consts, second.consts, strict=False))
    return texts[0] == texts[1] and all(_equal(a, b) for a, b in pairs)


def _equal(a, b) -> bool:
    if a is b or isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
        return True
    if jnp.issubdtype(jnp.result_type(a), jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    return np.shape(a) == np.shape(b) and bool(np.array_equal(a, b, equal_nan=True))


class Batches:
    """The batches of an iterable in turn, over and over, in groups of the same shapes.

    A group is a pytree with an axis for the steps in front, on the device, and how many they are.
    """

    def __init__(self, batches: Iterable, spread: Spread | None):
        self.batches, self.spread = batches, spread
        self.count = 0
        self.source: Iterator = iter(batches)
        self.held: Any = None  # a batch that was read and belongs to the next group
        self.before: Any = None  # the place of the loader before that one
        self.ahead: Any = None

    def shapes(self):
        """Those of the next batch."""
        if self.held is None:
            self.before, self.held = self.place(), self._next()
        parts = jax.process_count() if self.spread else 1
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((parts * x.shape[0], *x.shape[1:]), x.dtype)
            if parts > 1 else jax.ShapeDtypeStruct(x.shape, x.dtype), self.held,
        )  # fmt: skip

    def fitting(self, most: int) -> int:
        """How many steps a group should have."""
        self.shapes()
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(self.held))
        return max(1, min(most, GROUP, GROUP_BYTES // max(size, 1)))

    def take(self, number: int, length: int):
        """(group of `length` rows, how many are batches), at most `number` of them."""
        group = self.ahead or self._sent(number, length)
        self.ahead = None
        return group

    def prefetch(self, number: int, length: int) -> None:
        """Have the next group on its way while the device is busy."""
        self.ahead = self._sent(number, length)

    def place(self):
        """What the loader says of its place behind the groups so far, if it can."""
        if self.held is not None:
            return self.before
        if hasattr(self.batches, "state_dict"):
            return self.batches.state_dict()
        if hasattr(self.source, "get_state"):  # of the iterator, as in grain
            state = self.source.get_state()
            return {"bytes": state.decode()} if isinstance(state, bytes) else {"state": state}
        return None

    def go_to(self, place, done: int) -> None:
        """Put the loader where it was after `done` batches; else read it up to there."""
        if place is not None and hasattr(self.batches, "load_state_dict"):
            self.batches.load_state_dict(place)
            self.source, self.held = iter(self.batches), None
            return
        if place is not None and hasattr(self.source, "set_state"):
            held = place.get("bytes")
            self.source.set_state(place["state"] if held is None else held.encode())
            self.held = None
            return
        if done:
            warnings.warn(
                "sample_tasks cannot be put where it was (it has no state_dict and "
                "load_state_dict, and its iterator no get_state and set_state): it "
                f"is read from its start and {done} batches are passed over, "
                "and the run goes on as if never cut only if it gives the same batches again",
                stacklevel=6,
            )
        for _ in range(done):
            self._pull()

    def _pull(self):
        """The next batch, on the host."""
        batch, self.held = (self.held if self.held is not None else self._next()), None
        return batch

    def _next(self):
        try:
            batch = next(self.source)
        except StopIteration:
            if iter(self.batches) is self.source or self.count == 0:
                raise ValueError(
                    f"sample_tasks ran out after {self.count} batches; pass what can be iterated "
                    "again (a list, a DataLoader; not an iterator or generator), or fewer steps"
                ) from None
            self.source = iter(self.batches)
            batch = next(self.source)
        self.count += 1
        return jax.tree.map(_array, batch)

    def _sent(self, number: int, length: int):
        """A group, its last row repeated to the length; cut where the shapes change."""
        rows = [self._pull()]
        while len(rows) < number:
            before, batch = self.place(), self._pull()
            if _shapes(batch) != _shapes(rows[0]):
                self.held, self.before = batch, before
                break
            rows.append(batch)
        full = rows + [rows[-1]] * (length - len(rows))
        return jax.tree.map(lambda *x: self._put(x), *full), len(rows)

    def _put(self, rows):
        """On the device; over the devices, where each process has brought its own part."""
        some = [row for row in rows if isinstance(row, jax.Array)]
        stack = jnp.stack(rows) if some else np.stack(rows)
        if self.spread is None:
            return jax.device_put(stack)
        spec = jax.sharding.PartitionSpec(None, self.spread.axes)
        sharding = jax.sharding.NamedSharding(self.spread.mesh, spec)
        return jax.make_array_from_process_local_data(sharding, stack)


def _shapes(batch):
    return jax.tree.structure(batch), [x.shape for x in jax.tree.leaves(batch)]


def _array(leaf):
    """NumPy of what is no JAX array: torch tensors, scalars, lists of numbers."""
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
