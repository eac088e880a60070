"""Training in stretches, with the host in between: a bar, callbacks, checkpoints, batches."""

import contextlib
import dataclasses
import os
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.checks import (
    check_callable,
    check_choice,
    check_count,
    check_flag,
    check_optional,
    short_repr,
)
from negmaml._core.display import shape_text
from negmaml._core.extras import require
from negmaml._core.paths import expanded
from negmaml._core.settings import unusual_settings
from negmaml.training import checkpoint
from negmaml.training.data import Batches
from negmaml.training.state import Run, State, advance, whole

PARTS, BAR_PARTS = 10, 100  # stretches of a run with checkpoints, and with a bar
IN_FLIGHT = 2  # groups of batches that may be under way
TOGETHER = 512  # stretches of a history that are put into one array


class Watch(NamedTuple):
    """What the host does meanwhile, and after how many steps each; as in `fit`."""

    directory: Any
    checkpoint_every: int | None
    resume: str
    callback: Callable | None
    callback_every: int | None
    progress: bool

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return self.directory is None and self.callback is None and not self.progress

    def checked(self) -> "Watch":
        """The same; raises for what is wrong."""
        for name, of in (("checkpoint_every", "directory"), ("callback_every", "callback")):
            if (every := check_optional(check_count, name, getattr(self, name))) is None:
                continue
            if getattr(self, of) is None:
                what = name.removesuffix("_every")
                raise ValueError(f"{name} needs {what}=, got {every} without it")
        if self.directory is not None and not _is_path(self.directory):
            raise TypeError(
                f"checkpoint must be the path of a directory, got {short_repr(self.directory)}"
            )
        check_choice("resume", self.resume, ("strict", "any"))
        if self.callback is not None:
            check_callable("callback", self.callback, "of (step, metrics, params)")
        directory = self.directory
        if directory is not None:
            directory = Path(os.path.realpath(expanded("checkpoint", directory)))
        return self._replace(directory=directory, progress=check_flag("progress", self.progress))

    def periods(self, steps: int) -> dict[str, int]:
        """Steps between two of each thing there is to do."""
        periods = {}
        if self.directory is not None:
            periods["checkpoint"] = self.checkpoint_every or -(-steps // PARTS)
        if self.callback is not None:
            periods["callback"] = self.callback_every or 1
        if self.progress:
            periods["bar"] = -(-steps // BAR_PARTS)
        return periods


class Stretch(NamedTuple):
    """Steps offset to offset + steps of a run, and the batches they take, where it is given any."""

    offset: Any
    steps: int
    batches: Batches | None


def in_stretches(run: Run, state: State, stretch: Stretch, watch: Watch):
    """What `advance` gives for all steps."""
    offset, steps, batches = stretch
    periods = watch.periods(steps)
    length = min([steps, *periods.values()])
    length = batches.fitting(length) if batches else length

    def next_steps(done: int) -> int:
        return min([length, *(p - done % p for p in periods.values()), steps - done])

    with contextlib.ExitStack() as stack:
        batch = batches.shapes() if batches else None
        run, store, done, state, history = _found(run, state, stretch, watch, stack, length, batch)
        show = stack.enter_context(_bar(steps)) if watch.progress else None
        ledger, flags = (
            _Ledger(history, run.evaluate_every, watch.callback is not None),
            deque([state]),
        )
        traced: set = set()
        while done < steps and _going(flags[0]):
            taken, here, group = next_steps(done), offset + done, None
            if batches:
                group, taken = batches.take(taken, length)
            if store and (form := _form(group)) not in traced:  # now, or again for other shapes
                if traced and watch.resume == "strict":
                    checkpoint.check_unchanged(run, state, batch)
                traced.add(form)
            state, part = advance(run, state, here, here + taken, group, length=length)
            ledger.add(part, taken, length, here)
            done += taken
            due = {name for name, period in periods.items() if done % period == 0 or done == steps}
            place = batches.place() if batches and "checkpoint" in due else None
            if batches and done < steps:
                batches.prefetch(next_steps(done), length)
            told = "callback" in due and (offset + done, ledger.metrics(), whole(run, state.now))
            if told and _stops(watch.callback(*told)):  # type: ignore[misc]
                state = state._replace(stopped=jnp.asarray(True))
            if store and "checkpoint" in due:
                store.save(done, state, ledger.history(), place)
            if show and "bar" in due:
                show(done, part[0][taken - 1], _going(state))
            flags.append(state)
            while len(flags) > (1 if due or not batches else IN_FLIGHT):
                flags.popleft()
    return state, jax.tree.map(partial(_padded, steps), ledger.history())


def _found(run: Run, state: State, stretch: Stretch, watch: Watch, stack, length: int, batch):
    """(run, store of checkpoints if any, steps done, state, history) where the run stands."""
    if watch.directory is None:
        return run, None, 0, state, None
    offset, steps, batches = stretch
    group = jax.tree.map(lambda x: jax.ShapeDtypeStruct((length, *x.shape), x.dtype), batch)
    go_on = watch.resume == "any"
    identity = checkpoint.identity_of(run, state, batch, trace=not go_on)
    run = dataclasses.replace(run, program=checkpoint.program_of(identity))
    store = stack.enter_context(checkpoint.opened(watch.directory, identity, go_on))
    forward = partial(advance, length=length)
    shapes = jax.eval_shape(forward, run, state, offset, steps, group)[1]
    done, state, history, place = store.latest(state, shapes)
    if done > steps:
        raise ValueError(f"checkpoint holds {done} steps already, more than steps={steps}")
    if batches:
        batches.go_to(place, done)
    return run, store, done, state, history


def _form(group) -> tuple[str, str]:
    """The shapes of batches and the settings that a stretch is traced for."""
    return str(jax.tree.map(lambda x: (x.shape, x.dtype), group)), str(unusual_settings())


def _stops(answer) -> bool:
    """Whether a callback asked to stop: True of Python, NumPy, JAX or torch."""
    if not (isinstance(answer, bool) or str(getattr(answer, "dtype", "")).endswith("bool")):
        return False
    if np.size(answer) != 1:
        raise ValueError(
            "callback must return one truth value, or anything that is not one, got "
            f"{shape_text(answer)}; use .any() or .all()"
        )
    return bool(answer)


def _going(state: State) -> bool:
    """Whether there is another step to take; waits for the state."""
    return bool(state.finite) and not bool(state.stopped)


class _Ledger:
    """The history of a run, in the stretches it came in, and what a callback is told of it."""

    def __init__(self, history, every: int | None, told: bool):
        self.parts = [] if history is None else [history]
        self.every, self.told = every, told  # steps of an evaluation; whether `metrics` is asked
        self.unseen: list = []
        self.latest: Any = None  # evaluation

    def add(self, part, taken: int, length: int, first: int) -> None:
        """The first rows of a stretch that started at step `first`."""
        if taken < length:
            part = jax.tree.map(lambda x: x[:taken], part)
        self.parts.append(part)
        if len(self.parts) > TOGETHER:
            self.history()
        if self.told:
            self.unseen.append(part)
        if self.every is not None:
            due = [row for row in range(taken) if (first + row + 1) % self.every == 0]
            if due:
                self.latest = jax.tree.map(lambda x: x[due[-1]], part[2])

    def history(self):
        """All of it, on the host."""
        self.parts = [_joined(self.parts)]
        return self.parts[0]

    def metrics(self) -> dict[str, Any]:
        """Of the steps since this was last asked."""
        loss, aux, _, _ = _joined(self.unseen)
        self.unseen = []
        metrics: dict[str, Any] = {"loss": float(np.mean(loss))}
        if aux is not None:
            metrics["aux"] = jax.tree.map(lambda x: x[-1], aux)
        if self.latest is not None:
            metrics["evaluation"] = jax.tree.map(np.asarray, self.latest)
        return metrics


def _joined(parts: list):
    """Stretches of a history one after another, on the host."""
    return jax.tree.map(lambda *xs: np.concatenate([np.asarray(x) for x in xs]), *parts)


def _padded(steps: int, part):
    """A history with blanks for the steps that were not taken."""
    blank = np.nan if jnp.issubdtype(part.dtype, jnp.inexact) else 0
    rest = np.full((steps - len(part), *part.shape[1:]), blank, part.dtype)
    return jnp.asarray(np.concatenate([part, rest]))


def _is_path(value) -> bool:
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else ""
    return isinstance(text, str) and bool(text.strip())


@contextlib.contextmanager
def _bar(steps: int):
    """A function (steps done, loss, whether it goes on) that moves a bar."""
    rich = require("rich.progress", "cli")
    first = rich.Progress.get_default_columns()[:2]
    with rich.Progress(*first, rich.MofNCompleteColumn(), rich.TimeRemainingColumn()) as bar:
        task = bar.add_task("meta-training", total=steps)

        def show(done: int, loss, going: bool):
            ended = "" if going else ", stopped"
            text = f"meta-training, loss {float(loss):.4g}{ended}"
            bar.update(task, completed=done, description=text)

        yield show
