"""Training in segments, with checkpoints, callbacks, a progress bar or batches between them."""

import contextlib
import dataclasses
import time
from collections import deque
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.display import shape_text
from negmaml._core.progress import shown_progress
from negmaml._core.settings import unusual_settings
from negmaml.training import checkpoint
from negmaml.training.batches import Batches
from negmaml.training.loading import layout
from negmaml.training.options import HostOptions
from negmaml.training.state import (
    TrainSetup,
    TrainState,
    advance_in_place,
    good_point,
    recombine,
    stride_of,
)

IN_FLIGHT = 2  # groups of batches that the device may still be computing
MAX_PARTS = 512  # parts of a history, before they are joined to one


class Segment(NamedTuple):
    """The steps offset to offset + steps of a run.

    batches: the batches of the steps, or None where tasks are sampled.
    """

    offset: Any
    steps: int
    batches: Batches | None


def run_segments(setup: TrainSetup, state: TrainState, segment: Segment, options: HostOptions):
    """Return (state, history) after all steps, with the work of the host between segments."""
    offset, steps, batches = segment
    periods = options.periods(steps)
    # All segments are computed by one program of this length; some use its first steps only.
    length = min([steps, *periods.values()])
    length = batches.group_size(length) if batches else length
    stride = stride_of(length, steps, *periods.values())
    forward = partial(advance_in_place, length=length, stride=stride)

    def num_next(done: int) -> int:
        return min([length, *(p - done % p for p in periods.values()), steps - done])

    with contextlib.ExitStack() as stack:
        batch = batches.shapes() if batches else None
        began = time.monotonic()
        setup, store, done, state, rows, earlier = _resume(
            setup, state, segment, options, stack, (forward, batch)
        )
        began -= earlier
        move_bar = stack.enter_context(_bar(steps)) if options.progress else None
        history = History(rows, offset, setup.evaluate_every, periods.get("callback"))
        # The host waits for an earlier flag than the last to see if the run has stopped, so that
        # the device always has a group to compute.
        running = deque([state.running])
        traced: set = set()
        while done < steps and bool(running[0]):
            taken, start, group = num_next(done), offset + done, None
            if batches:
                group, taken = batches.take(taken, length)
            if store and (form := _traced_form(group)) not in traced:
                # A function that changed since the start would be traced into this segment.
                if traced and options.resume == "strict":
                    checkpoint.check_unchanged(setup, state, batch)
                traced.add(form)
            state, part = forward(setup, state, start, start + taken, group)
            history.add(part, taken, length, start)
            done += taken
            due = {name for name, period in periods.items() if done % period == 0 or done == steps}
            # The place comes before the prefetch, which reads further.
            place = batches.place() if batches and "checkpoint" in due else None
            if batches and done < steps:
                batches.prefetch(num_next(done), length)
            if "callback" in due:
                assert options.callback is not None
                # The copy is not held here, so that it takes memory only where a callback keeps it.
                metrics = history.metrics() | {"wall_time": time.monotonic() - began}
                if _asks_to_stop(options.callback(offset + done, metrics, _copy(setup, state))):
                    state = state._replace(stopped=jnp.asarray(True))
            if store and "checkpoint" in due:
                store.save(done, state, history.on_host(), place, time.monotonic() - began)
            if move_bar and "bar" in due:
                move_bar(done, part[0][taken - 1], bool(state.running))
            running.append(state.running)
            while len(running) > (1 if due or not batches else IN_FLIGHT):
                running.popleft()
    return state, (*jax.tree.map(partial(_pad, steps), history.on_host()), None)


def _copy(setup: TrainSetup, state: TrainState):
    """Return a copy of the good model, which the next segment does not overwrite."""
    good = good_point(setup, state)._replace(optimizer_state=None)
    return recombine(setup, jax.tree.map(jnp.copy, good))


def _resume(setup: TrainSetup, state: TrainState, segment, options: HostOptions, stack, group):
    """Return the start of a run, from its latest checkpoint if there is one.

    It is (setup, checkpoints if any, steps done, state, history, seconds of the run so far).
    group: the function that advances by a group of steps, and the shapes of a batch.
    """
    if options.directory is None:
        return setup, None, 0, state, None, 0.0
    offset, steps, batches = segment
    forward, batch = group
    length = forward.keywords["length"]
    # Only shapes: nothing is computed before the checkpoint is read.
    group = jax.tree.map(lambda x: jax.ShapeDtypeStruct((length, *x.shape), x.dtype), batch)
    resume_any = options.resume == "any"
    identity = checkpoint.identity_of(setup, state, batch, trace=not resume_any)
    if (stream := getattr(batches and batches.batches, "stream_identity", None)) is not None:
        identity["sample_tasks"] = checkpoint.array_digest(stream)
    setup = dataclasses.replace(setup, program=checkpoint.program_of(identity))
    store = stack.enter_context(
        checkpoint.open_store(options.directory, identity, layout(setup, state), resume_any)
    )
    *shapes, _ = jax.eval_shape(forward, setup, state, offset, steps, group)[1]
    done, state, history, meta = store.latest(state, tuple(shapes))
    if done > steps:
        raise ValueError(f"checkpoint holds {done} steps already, more than steps={steps}")
    if batches:
        batches.restore(meta.get("place"), done)
    return setup, store, done, state, history, meta.get("wall_time", 0.0)


def _traced_form(group) -> tuple[str, str]:
    """Return the shapes of batches and the settings, for another of which a segment is traced."""
    # Tasks print only some of their leaves, so the leaves are listed.
    leaves, structure = jax.tree.flatten(group)
    return str([(x.shape, x.dtype) for x in leaves]) + str(structure), str(unusual_settings())


def _asks_to_stop(answer) -> bool:
    """True where a callback returned True, of Python, NumPy, JAX or torch."""
    # A callback may return any object; torch, for one, is not imported to know its type.
    if not (isinstance(answer, bool) or str(getattr(answer, "dtype", "")).endswith("bool")):
        return False
    if np.size(answer) != 1:
        raise ValueError(
            "callback must return one truth value, or an object of another type, got "
            f"{shape_text(answer)}; use .any() or .all()"
        )
    return bool(answer)


class History:
    """The history of a run as the parts that the segments returned, and metrics for a callback.

    offset: number of the first step. every: steps between two evaluations. callback_every: None if
    `metrics` is not asked for. Norms of gradients are for callbacks, and no part of the history.
    """

    def __init__(self, history, offset: int, every: int | None, callback_every: int | None):
        self.parts = [] if history is None else [history]
        self.every, self.callback_every = every, callback_every
        self.since_callback: list = []
        self.last_evaluation: Any = None
        self.last_norms: tuple = None, 0
        # A run that resumes between two callbacks reports on all steps since the first of them.
        done = 0 if history is None else len(history[0])
        if callback_every and done % callback_every:
            rows = slice(done - done % callback_every, None)
            self.since_callback.append(jax.tree.map(lambda x: x[rows], history))
        if every and done:
            self._note_evaluation(history, done, offset)

    def add(self, part, taken: int, length: int, start: int) -> None:
        """Append the `taken` first rows of a segment of `length` rows from step `start` on."""
        *part, norms = part
        part = tuple(part)
        self.last_norms = norms, taken
        # The rows beyond are blank, from steps that this segment did not take.
        if taken < length:
            part = jax.tree.map(lambda x: x[:taken], part)
        self.parts.append(part)
        # Many small arrays on the device would cost more than one copy to the host.
        if len(self.parts) > MAX_PARTS:
            self.on_host()
        if self.callback_every:
            self.since_callback.append(part)
        if self.every is not None:
            self._note_evaluation(part, taken, start)

    def _note_evaluation(self, part, taken: int, start: int) -> None:
        """Keep the last evaluation of `taken` steps from `start` on, if one was due."""
        assert self.every is not None
        last = taken - (start + taken) % self.every - 1
        if last >= 0:
            self.last_evaluation = jax.tree.map(lambda x: x[last], part[2])

    def on_host(self):
        """Return the whole history as NumPy arrays."""
        self.parts = [_join(self.parts)]
        return self.parts[0]

    def metrics(self) -> dict[str, Any]:
        """Return the mean loss since the last call, and the latest of everything else."""
        loss, aux, _, _ = _join(self.since_callback)
        self.since_callback = []
        norms, taken = self.last_norms
        metrics: dict[str, Any] = {"loss": float(np.mean(loss))}
        metrics["gradient_norm"] = float(np.asarray(norms)[taken - 1])
        if aux is not None:
            metrics["aux"] = jax.tree.map(lambda x: x[-1], aux)
        if self.last_evaluation is not None:
            metrics["evaluation"] = jax.tree.map(np.asarray, self.last_evaluation)
        return metrics


def _join(parts: list):
    """Return the parts of a history one after another, on the host."""
    return jax.tree.map(lambda *xs: np.concatenate([np.asarray(x) for x in xs]), *parts)


def _pad(steps: int, rows):
    """Return rows of a history with blanks for the steps that were not taken."""
    blank = np.nan if jnp.issubdtype(rows.dtype, jnp.inexact) else 0
    rest = np.full((steps - len(rows), *rows.shape[1:]), blank, rows.dtype)
    return jnp.asarray(np.concatenate([rows, rest]))


@contextlib.contextmanager
def _bar(steps: int):
    """Yield a function (steps done, loss, whether the run continues) that shows the progress."""
    with shown_progress("fit", "steps") as report:

        def move(done: int, loss, running: bool):
            report.stage(f"loss {float(loss):.4g}{'' if running else ', stopped'}")
            report(done, steps)

        yield move
