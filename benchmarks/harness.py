"""Shared parts of the benchmark scripts: arguments, environment, timing, tables and JSON.

A script ends in

    if __name__ == "__main__":
        harness.run(main, __doc__, harness.option("--runs", type=int, default=60))

where `main(options, report)` adds tables to the report while it measures. This module needs only
the standard library, so that scripts can run in an environment with torch and without JAX.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PACKAGES = ("negmaml", "jax", "numpy", "torch")


def option(*names: str, **settings: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """An argument of a script, as for `ArgumentParser.add_argument`."""
    return names, settings


def choice_of(names: Iterable[str]) -> Callable[[str], list[str]]:
    """Type of an argument: names among the given ones, separated by commas."""
    allowed = list(names)

    def read(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := sorted(set(chosen) - set(allowed)):
            raise argparse.ArgumentTypeError(f"unknown {unknown}; choose from {','.join(allowed)}")
        return chosen

    return read


def run(main: Callable, doc: str, *options: tuple[tuple[str, ...], dict[str, Any]]) -> None:
    """Parse the arguments, call main(options, report), and save the tables if asked to."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for names, settings in options:
        parser.add_argument(*names, **settings)
    parser.add_argument("--json", type=Path, help="file to save the tables to")
    given = parser.parse_args()
    report = Report()
    status = main(given, report)
    if given.json:
        given.json.write_text(json.dumps(report.contents, indent=1, default=str))
    sys.exit(status)


def environment() -> dict[str, str]:
    """Versions of Python and of installed packages, and the number of cores."""
    found = {"python": platform.python_version(), "cores": str(len(os.sched_getaffinity(0)))}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


class Report:
    """Prints tables in Markdown row by row, after a line on the environment, and records them.

    contents: the environment and all tables, as they are saved to JSON.
    """

    def __init__(self) -> None:
        self.contents: dict[str, Any] = {}

    def _start(self) -> None:
        # Not in __init__: a worker process prints only its result.
        if not self.contents:
            self.contents = {"environment": environment(), "tables": [], "notes": []}
            print(", ".join(f"{k} {v}" for k, v in self.contents["environment"].items()))

    def table(self, *head: str, texts: int = 1) -> None:
        """Begin a table; the first `texts` columns are texts, the others numbers."""
        self._start()
        self.contents["tables"].append({"head": head, "rows": []})
        print(f"\n| {' | '.join(head)} |\n|{'---|' * texts}{'---:|' * (len(head) - texts)}")

    def row(self, *cells: Any) -> None:
        """Add a row to the last table."""
        self.contents["tables"][-1]["rows"].append(cells)
        print(f"| {' | '.join(map(str, cells))} |", flush=True)

    def note(self, text: str) -> None:
        """Print a line outside tables."""
        self._start()
        self.contents["notes"].append(text)
        print(text, flush=True)


def progress(text: str) -> None:
    """Print what runs now, away from the tables."""
    print(text, file=sys.stderr, flush=True)


def timed(function: Callable, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call, until its JAX arrays are computed."""
    start = clock()
    result = function()
    if "jax" in sys.modules:  # only then can the result have arrays of JAX
        sys.modules["jax"].block_until_ready(result)
    return clock() - start


def best_seconds(
    *functions: Callable, repeats: int, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """The least seconds of each function, after a first call that compiles.

    Functions are called in turn, so that other work on the machine affects all of them.
    """
    seconds = [[timed(function, clock) for function in functions] for _ in range(repeats + 1)]
    return [min(times) for times in zip(*seconds[1:], strict=True)]


def call_times(function: Callable, seconds: float) -> list[float]:
    """Milliseconds of each call that fits in `seconds`, at least three, after two others.

    The first of those two compiles, the second still finds cold caches.
    """
    times, end = [], float("inf")
    while len(times) < 5 or time.perf_counter() < end:
        if len(times) == 2:
            end = time.perf_counter() + seconds
        times.append(1e3 * timed(function))
    return times[2:]


def cpu_seconds() -> float:
    """User and system seconds of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def peak_mib() -> float:
    """Peak memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_process(
    script: str,
    *arguments: Any,
    python: str = sys.executable,
    environment: Mapping[str, str] = os.environ,
    timeout: float | None = None,
) -> dict[str, Any]:
    """Run a script of this folder in a fresh process, and return the JSON of its last line.

    A process that fails or takes too long gives {"skipped": reason}.
    """
    command = [python, str(HERE / script), *map(str, arguments)]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return {"skipped": f"took more than {timeout} s"}
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"skipped": f"failed with status {done.returncode}: {reason}"}
    return json.loads(done.stdout.splitlines()[-1])
