"""Progress of a sweep or a merge: a bar, or the caller's function."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from negmaml._core.extras import require

ProgressCallback = Callable[[int, int], Any]


@contextmanager
def progress_reporter(
    progress: bool | ProgressCallback, work: str = "sweeping"
) -> Iterator[ProgressCallback]:
    """The function that is called with the cells done and those in all; for True it moves a bar."""
    if not isinstance(progress, bool):
        if not callable(progress):
            raise TypeError(f"progress must be True, False or a function, got {progress!r}")
        yield progress
    elif not progress:
        yield lambda *_: None
    else:
        rich = require("rich.progress", "cli")
        columns = (rich.TextColumn("{task.description:<16}"), rich.BarColumn(),
                   rich.MofNCompleteColumn(), rich.TimeRemainingColumn())  # fmt: skip
        # Blocks take seconds, so the speed is estimated over a minute; rich takes half of that.
        with rich.Progress(*columns, transient=True, speed_estimate_period=60) as bar:
            # The bar moves without a total until the first report, since compiling comes first.
            task = bar.add_task("starting", total=None)

            def advance(done: int, cells: int) -> None:
                rate = bar.tasks[0].speed
                text = f"{rate:,.0f} cells/s" if rate else work
                bar.update(task, completed=done, total=cells, description=text)

            yield advance
