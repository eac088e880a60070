"""Progress of a sweep or a merge: a bar or lines on stderr, or the caller's function."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from negmaml._core.progress import shown_progress

ProgressCallback = Callable[[int, int], Any]


@contextmanager
def progress_reporter(
    progress: bool | ProgressCallback, work: str = "sweep"
) -> Iterator[ProgressCallback]:
    """The function that is called with the cells done and those in all."""
    if not isinstance(progress, bool):
        if not callable(progress):
            raise TypeError(f"progress must be True, False or a function, got {progress!r}")
        yield progress
    elif not progress:
        yield lambda *_: None
    else:
        with shown_progress(work, "cells") as report:
            yield report
