"""Training in stretches, with the host in between: a bar, callbacks, checkpoints, batches."""

import contextlib
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.checks import check_choice, check_count
from negmaml._core.extras import require
from negmaml.training import checkpoint
from negmaml.training.data import Batches, go_to, state_of
from negmaml.training.state import Run, State, advance, whole

PARTS, BAR_PARTS = 10, 100  # stretches of a run with checkpoints, and with a bar
IN_FLIGHT = 2  # steps on batches that may be under way


class Watch(NamedTuple):
    """What the host does meanwhile, and after how many steps each; as in `fit`."""

    directory: Any
    checkpoint_every: int | None
    checkpoint_of: str
    callback: Callable | None
    callback_every: int | None
    progress: bool

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return self.directory is None and self.callback is None and not self.progress

    def checked(self) -> "Watch":
        """The same; raises for what is wrong."""
        for name in ("checkpoint_every", "callback_every"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_choice("checkpoint_of", self.checkpoint_of, ("this", "any"))
        if self.callback is not None and not callable(self.callback):
            raise TypeError(
                f"callback must be a function of (step, metrics, params), got {self.callback!r}"
            )
        if not isinstance(self.progress, bool):
            raise TypeError(f"progress must be True or False, got {self.progress!r}")
        return self

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
    length = 1 if batches else min([steps, *periods.values()])
    forward = partial(advance, length=length)
    done, parts = 0, []
    with contextlib.ExitStack() as stack:
        store = None
        if watch.directory is not None:
            first = batches.peek() if batches else None
            go_on = watch.checkpoint_of == "any"
            identity = checkpoint.identity_of(run, state, first, trace=not go_on)
            directory = Path(watch.directory).absolute()
            store = stack.enter_context(checkpoint.opened(directory, identity, go_on))
            shapes = jax.eval_shape(forward, run, state, offset, steps, first)[1]
            done, state, history, place = store.latest(state, shapes)
            parts = [history]
            if batches:
                batches.skip(go_to(batches.batches, place, done), restart=place is not None)
        if done > steps:
            raise ValueError(f"checkpoint holds {done} steps already, more than steps={steps}")
        show = stack.enter_context(_bar(steps)) if watch.progress else None
        called, flags = done, deque([state.going])
        while done < steps:
            taken = min([length, *(p - done % p for p in periods.values()), steps - done])
            batch = batches.take() if batches else None
            state, part = forward(run, state, offset + done, offset + done + taken, batch)
            parts.append(jax.tree.map(lambda x, n=taken: x[:n], part))
            done += taken
            due = {name for name, period in periods.items() if done % period == 0 or done == steps}
            place = state_of(batches.batches) if batches and "checkpoint" in due else None
            if batches and done < steps:
                batches.prefetch()
            if store and "checkpoint" in due:
                parts = [_joined(parts)]
                store.save(done, state, parts[0], place)
            if show and "bar" in due:
                show(done, part[0][taken - 1], bool(state.going))
            if watch.callback and "callback" in due:
                recent = _joined(parts)
                stop = watch.callback(
                    int(offset + done), _metrics(recent, done - called), _params(run, state)
                )
                called, parts = done, [recent]
                if stop is True:
                    state = state._replace(stopped=jnp.asarray(True))
            flags.append(state.going)
            if len(flags) > IN_FLIGHT or not batches or due:
                while len(flags) > (IN_FLIGHT if batches and not due else 1):
                    flags.popleft()
                if not flags[0]:
                    break
    return state, jax.tree.map(partial(_padded, steps), _joined(parts))


def _joined(parts: list):
    """Stretches of a history one after another, on the host."""
    return jax.tree.map(lambda *xs: np.concatenate([np.asarray(x) for x in xs]), *parts)


def _padded(steps: int, part):
    """A history with blanks for the steps that were not taken."""
    blank = np.nan if np.issubdtype(part.dtype, np.inexact) else 0
    rest = np.full((steps - len(part), *part.shape[1:]), blank, part.dtype)
    return jnp.asarray(np.concatenate([part, rest]))


def _metrics(history, count: int) -> dict[str, Any]:
    """What a callback is told of the last `count` steps."""
    loss, aux, evaluation = history
    metrics: dict[str, Any] = {"loss": float(np.mean(loss[-count:]))}
    if aux is not None:
        metrics["aux"] = jax.tree.map(lambda x: x[-1], aux)
    if evaluation is not None:
        metrics["evaluation"] = jax.tree.map(_last_known, evaluation)
    return metrics


def _last_known(values):
    """The last row with a number that is one; NaN stands for steps without an evaluation."""
    known = (
        ~np.isnan(values.reshape(len(values), -1)).all(1) if values.dtype.kind == "f" else [True]
    )
    return values[np.flatnonzero(known)[-1]] if np.any(known) else values[-1]


def _params(run: Run, state: State):
    return whole(run, state.now)


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
