"""The tasks of each step: from a function of a key, fixed tasks, or batches of an iterable.

A batch is a pair, a dict or any pytree of NumPy, torch or JAX arrays. The next batches are fetched
and sent to the device while it computes a step.
"""

from collections.abc import Iterable, Iterator, Sized
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from negmaml._core.caller import warn_caller
from negmaml._core.checks import check_count, check_takes, short_repr
from negmaml._core.fingerprint import digest_of
from negmaml._core.keys import is_typed_key
from negmaml._core.meshes import only
from negmaml._core.pytree import as_pytree
from negmaml.meta.batching import Tasks
from negmaml.training.sharding import TaskSharding

MAX_GROUP, MAX_GROUP_BYTES = 16, 2**25  # batches that are sent to the device at once


def task_source(name: str, tasks) -> tuple[Any, Iterable | None]:
    """Return (function of a key as a pytree, None) or (None, iterable of batches).

    name: the argument that `tasks` was given for, for errors.
    """
    if callable(tasks):
        check_takes(name, tasks, "of a key and nothing else", 1)
        return as_pytree(tasks), None
    # `Tasks` are a tuple, which would otherwise be read as an iterable of two batches.
    if isinstance(tasks, Tasks):
        return Partial(_fixed_tasks, tasks), None
    if isinstance(tasks, Iterable) and not isinstance(tasks, str | bytes | dict | jax.Array):
        if isinstance(tasks, Sized) and not len(tasks):
            raise ValueError(f"{name} must hold at least one batch, got {short_repr(tasks)}")
        return None, tasks
    raise TypeError(
        f"{name} must be a function key -> tasks, an iterable of batches such as a DataLoader, or "
        f"one fixed batch Tasks(support, query), got {type(tasks).__name__}"
    )


def _fixed_tasks(tasks, key):
    return tasks


def number_of_steps(steps: int | None, epochs: int | None, batches) -> int:
    """Return the checked `steps`, or the number of batches in `epochs` passes over them."""
    if (steps is None) == (epochs is None):
        raise ValueError(f"give either steps or epochs, got steps={steps!r}, epochs={epochs!r}")
    # An epoch needs the length of the iterable, a number of steps does not.
    if steps is not None:
        return check_count("steps", steps)
    if not isinstance(batches, Sized):
        given = "a function or one Tasks" if batches is None else type(batches).__name__
        raise ValueError(
            f"epochs={epochs!r} needs an iterable of batches with a length as sample_tasks, got "
            f"{given}; give steps"
        )
    return check_count("epochs", epochs) * check_count("len(sample_tasks)", len(batches))


def check_sampler(name: str, sample: Partial, key) -> None:
    """Raise if a function of a key is not pure; warn if it does not use the key.

    JAX traces the function once. Tasks that it takes from an iterator or a global generator would
    then be the tasks of every step. Two traces of such a function differ.
    """
    if not isinstance(sample, Partial) or sample.func is _fixed_tasks:
        return  # a distribution of `negmaml.tasks` or a similar pytree
    first, second = (jax.make_jaxpr(lambda key: sample(key))(key) for _ in range(2))
    if digest_of(first, strict=False) != digest_of(second, strict=False):
        raise ValueError(
            f"{name} returns other tasks when it is called again with the same key, so it draws "
            "from an iterator or from a random state of its own. It is traced once, and every step "
            "would get the tasks of one draw. Draw with jax.random and the key, or pass the "
            f"iterable itself as {name}"
        )
    # A key that no equation uses, and that is not returned, changes nothing.
    (variable,) = first.jaxpr.invars
    used = {id(atom) for equation in first.jaxpr.eqns for atom in equation.invars}
    used |= {id(atom) for atom in first.jaxpr.outvars}
    if first.jaxpr.outvars and id(variable) not in used:
        warn_caller(
            f"{name} does not use its key, so every step has the same tasks; if that is meant, "
            f"pass the tasks themselves as {name}, else draw them with jax.random and the key",
        )


class Batches:
    """The batches of an iterable, over and over, in groups of the same shapes.

    A group is a pytree with a leading axis for the steps, on the device, and its number of batches.
    """

    def __init__(self, batches: Iterable, sharding: TaskSharding | None):
        self.batches, self.sharding = batches, sharding
        self.count = 0
        self.source: Iterator = iter(batches)
        self.held: Any = None  # a batch that was read and belongs to the next group
        self.place_before_held: Any = None
        self.prefetched: Any = None  # the next group, on its way to the device

    def shapes(self):
        """Return the shapes of the next batch, over all processes."""
        # The first batch is read to know its shapes; it is held for the first group.
        if self.held is None:
            self.place_before_held, self.held = self.place(), self._next()
        parts = jax.process_count() if self.sharding else 1

        def whole(x):
            shape = (parts * x.shape[0], *x.shape[1:]) if parts > 1 else x.shape
            return jax.ShapeDtypeStruct(shape, x.dtype)

        return jax.tree.map(whole, self.held)

    def group_size(self, most: int) -> int:
        """Return the number of batches of a group, at most `most`."""
        self.shapes()
        # Large batches are sent one at a time, since a group is on the device as a whole.
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(self.held))
        return max(1, min(most, MAX_GROUP, MAX_GROUP_BYTES // max(size, 1)))

    def take(self, number: int, length: int):
        """Return (group of `length` rows, its number of batches), at most `number` batches."""
        group = self.prefetched or self._send(number, length)
        self.prefetched = None
        return group

    def prefetch(self, number: int, length: int) -> None:
        """Send the next group to the device while it is busy."""
        self.prefetched = self._send(number, length)

    def place(self):
        """Return the position of the loader after the groups so far; None if it cannot tell it."""
        if self.held is not None:
            return self.place_before_held
        if hasattr(self.batches, "state_dict"):  # a loader of torch or of its form
            return self.batches.state_dict()
        if hasattr(self.source, "get_state"):  # an iterator, as in grain
            state = self.source.get_state()
            return {"bytes": state.decode()} if isinstance(state, bytes) else {"state": state}
        return None

    def restore(self, place, done: int) -> None:
        """Set the loader to its position after `done` batches, or read it up to there."""
        if place is not None and hasattr(self.batches, "load_state_dict"):
            self.batches.load_state_dict(place)
            self.source, self.held = iter(self.batches), None
            return
        if place is not None and hasattr(self.source, "set_state"):
            text = place.get("bytes")
            self.source.set_state(place["state"] if text is None else text.encode())
            self.held = None
            return
        if done:
            warn_caller(
                "the position of sample_tasks cannot be restored (it has no state_dict and "
                "load_state_dict, and its iterator no get_state and set_state): it is read from "
                f"its start and {done} batches are skipped. The result is that of an uninterrupted "
                "run only if it returns the same batches again",
            )
        # Without a position, the same batches have to be read again.
        for _ in range(done):
            self._pull()

    def _pull(self):
        """Return the next batch, on the host."""
        batch, self.held = (self.held if self.held is not None else self._next()), None
        return batch

    def _next(self):
        """Read a batch from the iterable, from its start again when it ends."""
        try:
            batch = next(self.source)
        except StopIteration:
            # An iterator returns itself: it cannot start again.
            if iter(self.batches) is self.source or self.count == 0:
                raise ValueError(
                    f"sample_tasks ran out after {self.count} batches; pass an iterable that can "
                    "start again (a list, a DataLoader; not an iterator or generator), or fewer "
                    "steps"
                ) from None
            self.source = iter(self.batches)
            batch = next(self.source)
        self.count += 1
        return jax.tree.map(_as_array, batch)

    def _send(self, number: int, length: int):
        """Return a group, its last batch repeated up to the length; it ends where shapes change."""
        rows = [self._pull()]
        while len(rows) < number:
            before, batch = self.place(), self._pull()
            if _shapes(batch) != _shapes(rows[0]):
                self.held, self.place_before_held = batch, before
                break
            rows.append(batch)
        # All groups have the same length, so that one program serves the last, shorter one.
        full = rows + [rows[-1]] * (length - len(rows))
        return jax.tree.map(lambda *x: self._to_device(x), *full), len(rows)

    def _to_device(self, rows):
        """Return a stack on the device or the mesh, to which each process brings its own part."""
        if self.sharding is not None and isinstance(rows[0], jax.Array):
            # Within the mesh, an array on one of its devices cannot be an argument of a program.
            with only(next(iter(rows[0].devices()))):
                if is_typed_key(rows[0]):
                    kind = jax.random.key_impl(rows[0])
                    data = [np.asarray(jax.random.key_data(row)) for row in rows]
                else:
                    kind, data = None, [np.asarray(row) for row in rows]
            stack = self._to_device(data)
            return stack if kind is None else jax.random.wrap_key_data(stack, impl=kind)
        # Arrays on the device are stacked there; NumPy arrays are stacked before one transfer.
        some = [row for row in rows if isinstance(row, jax.Array)]
        stack = jnp.stack(rows) if some else np.stack(rows)
        if self.sharding is None:
            return jax.device_put(stack)
        spec = jax.sharding.PartitionSpec(None, self.sharding.axes)
        placement = jax.sharding.NamedSharding(self.sharding.mesh, spec)
        return jax.make_array_from_process_local_data(placement, stack)


def _shapes(batch):
    return jax.tree.structure(batch), [x.shape for x in jax.tree.leaves(batch)]


def _as_array(leaf):
    """Return NumPy of a leaf that is no JAX array: torch tensors, scalars, lists of numbers."""
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
