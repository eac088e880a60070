"""Progress of long work on stderr: a bar on a terminal, and plain lines in a log.

Lines come from a thread, after `FIRST_LINE` seconds and then every `EVERY` seconds, so that the log
of a batch job shows life while a program compiles. Work of a few seconds leaves no line.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

FIRST_LINE, EVERY = 5.0, 30.0  # seconds


class Progress:
    """Progress that is not shown."""

    def __call__(self, done: int, total: int) -> None:
        """Report the number of parts that are done, and of all."""

    def stage(self, text: str) -> None:
        """Name the current stage of the work."""


class ProgressLog(Progress):
    """Progress as lines of text: parts done, time elapsed, and an estimate of the rest."""

    def __init__(self, work: str, unit: str, clock: Callable[[], float] = time.monotonic):
        self.work, self.unit, self.clock, self.text = work, unit, clock, ""
        self.started = clock()
        # (time, parts done) at the first and at the latest report: a resumed run starts with some.
        self.first: tuple[float, int] | None = None
        self.latest: tuple[float, int] | None = None
        self.total = 0

    def __call__(self, done: int, total: int) -> None:
        self.latest, self.total = (self.clock(), done), total
        # After a step back, as of a second pass, the speed is measured anew.
        if self.first is None or done < self.first[1]:
            self.first = self.latest

    def stage(self, text: str) -> None:
        self.text = text

    def line(self) -> str:
        """The progress until now on one line."""
        passed = f"{duration(self.clock() - self.started)} elapsed"
        if self.first is None or self.latest is None or not self.total:
            return f"{self.work}: {self.text or 'starting'}, {passed}"
        if self.text:
            passed = f"{self.text}, {passed}"
        (begun, before), (now, done) = self.first, self.latest
        share = f"{done:,} of {self.total:,} {self.unit} ({done / self.total:.0%})"
        if done <= before or done >= self.total:
            return f"{self.work}: {share}, {passed}"
        left = (now - begun) / (done - before) * (self.total - done) - (self.clock() - now)
        return f"{self.work}: {share}, {passed}, about {duration(max(left, 0))} left"


@contextmanager
def shown_progress(work: str, unit: str = "parts") -> Iterator[Progress]:
    """Show the progress of some work on stderr while it runs."""
    with _bar(work) if _can_move() else _lines(work, unit) as progress:
        yield progress


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _can_move() -> bool:
    """True where a bar can be drawn: on a terminal or in a notebook, with rich installed."""
    terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    if not (terminal or "ipykernel" in sys.modules):
        return False
    try:
        import rich.progress  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


@contextmanager
def _lines(work: str, unit: str) -> Iterator[ProgressLog]:
    """Progress as lines; the last one is printed if there was any before."""
    progress, ended, stream = ProgressLog(work, unit), threading.Event(), sys.stderr
    printed = []

    def show() -> None:
        printed.append(True)
        print(progress.line(), file=stream, flush=True)

    def repeat() -> None:
        pause = FIRST_LINE
        while not ended.wait(pause):
            show()
            pause = EVERY

    # A daemon, so that it never keeps a process alive.
    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield progress
        if printed:
            show()
    finally:
        ended.set()
        thread.join()


class _Bar(Progress):
    """A bar of rich."""

    def __init__(self, bar: Any, work: str):
        # The bar moves without a total until the first report, since compiling comes first.
        self.bar, self.work, self.task = bar, work, bar.add_task(work, total=None)

    def __call__(self, done: int, total: int) -> None:
        self.bar.update(self.task, completed=done, total=total)

    def stage(self, text: str) -> None:
        self.bar.update(self.task, description=f"{self.work}: {text}")


@contextmanager
def _bar(work: str) -> Iterator[_Bar]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Columns

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    # Parts may take seconds, so the speed is estimated over a minute; rich takes half of that.
    # Output into a file or pipe must not pass the console of the bar.
    options: dict[str, Any] = dict(transient=True, speed_estimate_period=60,
                                   redirect_stdout=sys.stdout.isatty())  # fmt: skip
    with Columns(*columns, console=Console(stderr=True), **options) as bar:
        yield _Bar(bar, work)
