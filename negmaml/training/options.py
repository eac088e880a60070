"""Options of `fit`, checked: the evaluation, and the work on the host."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from negmaml._core.checks import (
    check_callable,
    check_choice,
    check_count,
    check_flag,
    check_optional,
    check_takes,
    short_repr,
)
from negmaml._core.paths import expanded
from negmaml._core.pytree import as_pytree
from negmaml.training.batches import task_source

CHECKPOINTS, BAR_UPDATES = 10, 100  # in a run, where the user gives no period


class EvaluationOptions(NamedTuple):
    """How a run is evaluated; the fields are arguments of `fit`.

    function: `evaluate`. every: `evaluate_every`. tasks: `evaluation_tasks`. The others have the
    names that they have there.
    """

    function: Any
    every: int | None
    tasks: Any
    patience: int | None
    monitor: str | None
    monitor_mode: str

    def checked(self, sample) -> "EvaluationOptions":
        """Return the options with functions as pytrees; raise where they do not go together.

        sample: the function that draws the tasks of the steps, None if these are given as batches.
        """
        function, every, tasks, patience, monitor, monitor_mode = self
        check_choice("monitor_mode", monitor_mode, ("min", "max"))
        if (function is None) != (every is None):
            raise ValueError(
                "evaluate and evaluate_every go together: the function, and the number of steps "
                f"between two calls; got evaluate={function!r}, evaluate_every={every!r}"
            )
        if function is None:
            for name, value in (("patience", patience), ("evaluation_tasks", tasks)):
                if value is not None:
                    raise ValueError(
                        f"{name} needs evaluate and evaluate_every, got {short_repr(value)} "
                        "without them"
                    )
        if patience is None and (monitor, monitor_mode) != (None, "min"):
            raise ValueError(
                f"monitor and monitor_mode need patience, got {short_repr(monitor)} and "
                f"{monitor_mode!r} without it"
            )
        if not (monitor is None or isinstance(monitor, str)):
            raise TypeError(
                "monitor must be the name of an entry of the result of evaluate, such as "
                f"'accuracy' or 'query/accuracy', got {short_repr(monitor)}"
            )
        if function is None:
            return self
        # An iterable has no task for an evaluation that a step does not also see.
        if tasks is None and sample is None:
            raise ValueError(
                "evaluation_tasks must be given when sample_tasks is an iterable: a function "
                "key -> tasks, or Tasks"
            )
        # Tasks of its own replace the sampler of the steps.
        if tasks is not None:
            sample, batches = task_source("evaluation_tasks", tasks)
            if batches is not None:
                raise TypeError(
                    "evaluation_tasks must be a function key -> tasks or Tasks, got "
                    f"{type(tasks).__name__}"
                )
        patience = check_optional(check_count, "patience", patience)
        every = check_count("evaluate_every", every)
        return self._replace(
            function=function_of_tasks("evaluate", function), every=every, tasks=sample,
            patience=patience,
        )  # fmt: skip


class HostOptions(NamedTuple):
    """The work of the host during a run, and its periods; the fields are arguments of `fit`.

    directory: `checkpoint`.
    """

    directory: Any
    checkpoint_every: int | None
    resume: str
    callback: Callable | None
    callback_every: int | None
    progress: bool

    @property
    def idle(self) -> bool:
        """True if no checkpoint, callback or progress bar is requested."""
        return self.directory is None and self.callback is None and not self.progress

    def checked(self) -> "HostOptions":
        """Return the options with the directory as a path; raise for invalid ones."""
        # A period of something that was not asked for is most likely a forgotten argument.
        for name, needed in (("checkpoint_every", "directory"), ("callback_every", "callback")):
            every = check_optional(check_count, name, getattr(self, name))
            if every is not None and getattr(self, needed) is None:
                argument = name.removesuffix("_every")
                raise ValueError(f"{name} needs {argument}=, got {every} without it")
        if self.directory is not None and not _is_path(self.directory):
            raise TypeError(
                f"checkpoint must be the path of a directory, got {short_repr(self.directory)}"
            )
        check_choice("resume", self.resume, ("strict", "any"))
        if self.callback is not None:
            check_takes("callback", self.callback, "of (step, metrics, params)", 3)
        directory = self.directory
        if directory is not None:  # a later change of the working directory must not move it
            directory = Path(os.path.realpath(expanded("checkpoint", directory)))
        return self._replace(directory=directory, progress=check_flag("progress", self.progress))

    def periods(self, steps: int) -> dict[str, int]:
        """Return the number of steps between two checkpoints, callbacks and moves of the bar."""
        periods = {}
        if self.directory is not None:
            # Rounded up, so that there are at most that many.
            periods["checkpoint"] = self.checkpoint_every or -(-steps // CHECKPOINTS)
        if self.callback is not None:
            periods["callback"] = self.callback_every or 1
        if self.progress:
            periods["bar"] = -(-steps // BAR_UPDATES)
        return periods


def function_of_tasks(name: str, function):
    """Return a function of (params, tasks) as a pytree; raise if it cannot be called."""
    return as_pytree(check_callable(name, function, "of (params, tasks)"))


def _is_path(value) -> bool:
    # Paths of bytes and of blanks are valid for the system, and mistakes here.
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else ""
    return isinstance(text, str) and bool(text.strip())
