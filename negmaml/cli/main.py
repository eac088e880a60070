"""The command line: dispatch to commands, each imported only when it is called."""

import importlib
import inspect
import os
import re
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial, wraps
from io import BytesIO, TextIOWrapper

import tyro

from negmaml._core.checks import did_you_mean
from negmaml._core.display import printable
from negmaml._core.extras import MissingExtraError
from negmaml._core.version import __version__
from negmaml.cli.output import TALKS, Output, print_renamed, print_table, provenance, say

# The module of each command, imported only when it is called, and its line of `negmaml --help`.
COMMANDS = {
    "predict": ("problem", "predict the test loss of one-step MAML and the best rates"),
    "advise": ("advise", "choose a method and its rates for a file of grouped rows"),
    "sweep": ("sweeps", "run or resume the sweep of a spec file"),
    "status": ("sweeps", "show the progress and the workers of a sweep"),
    "merge": ("sweeps", "merge stores of the same sweep into one"),
    "curves": ("sweeps", "plot means over seeds along an axis of a store"),
    "heatmap": ("sweeps", "plot means over seeds over two axes of a store"),
    "reproduce": ("paper", "reproduce the figures of the paper"),
    "phases": ("paper", "draw phase diagrams of the best training rate"),
    "gain-map": ("paper", "map where negative training rates help"),
    "verify": ("problem", "compute a test loss by six methods and compare them"),
    "info": ("main", "print versions, devices, dtype and precision"),
}
EXAMPLES = {
    "predict": "--p 60 --m 3 --n-t 30 --n-v 2 --n-r 20 --train-rate -0.4",
    "advise": "schools.csv --group school --target achievement --out advice",
    "sweep": "phase_map --store runs/map.zarr --override seeds=20",
    "status": "runs/map.zarr --check",
    "merge": "a.zarr b.zarr --store both.zarr",
    "curves": "runs/map.zarr --x train_rate --hue m --select sigma=1.0",
    "heatmap": "runs/map.zarr --x n_t/p --y n_v*m/p --argmin train_rate",
    "reproduce": "--figure overparameterized --out reproduction",
    "phases": "--out phases --runs 400",
    "gain-map": "--out gain_map --json",
    "verify": "--p 20 --m 2 --n-t 10 --n-v 2 --n-r 5 --train-rate -0.3 --runs 200",
    "info": "--json",
}
WIDTH = 80  # of help texts at most
CHOICE_OF_TYPES = re.compile(
    r"no type matching (?:\{None\}\|)?(\S+)\s+could be instantiated\s+from\s+\[(.*?)\]\.?\s+"
    r"Got errors:\n(?: *- .*(?:\n|$))+"
)
RENAMED_COMMANDS = {"payoff": "gain-map"}
SPECTRUM = {f"--{name}": f"--spectrum.{name}" for name in ("exponent", "level", "share", "spikes")}
RENAMED_FLAGS = {
    "predict": SPECTRUM,
    "verify": SPECTRUM,
    "sweep": {
        "--set": "--override", "--part": "--worker", "--accept-changes": "--allow-code-change",
        "--accept_changes": "--allow-code-change",
    },
    "heatmap": {"--best": "--argmin"},
    "curves": {"--by": "--hue"},
}  # fmt: skip


class Terminated(KeyboardInterrupt):
    """The process got SIGTERM, as a batch job at the end of its time."""


@contextmanager
def terminated_as_interrupt() -> Iterator[None]:
    """Raise `Terminated` for SIGTERM, so that a command ends as it does when it is interrupted."""

    def stop(*_) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code: 0, or one of the guide in `cli/README.md`."""
    try:
        return _called(list(arguments))
    except BrokenPipeError:  # of stdout, as by `| head`: for the caller that owns the stream
        raise
    # These are about the user's input, and their message suffices; a bug keeps its traceback.
    except (ValueError, TypeError, OSError, MissingExtraError) as error:
        # The number of a system error helps nobody.
        text = re.sub(r"^\[Errno \d+\] ", "", str(error))
        # A note of several lines is that of JAX on its tracebacks.
        notes = [note for note in getattr(error, "__notes__", ()) if "\n" not in note]
        text = "; ".join([text.rstrip("."), *notes]) if notes else text
        print(f"negmaml: {printable(text)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        # A sweep adds how to resume.
        notes = getattr(stop, "__notes__", ["nothing half-written was left behind"])
        kind = "terminated" if isinstance(stop, Terminated) else "interrupted"
        print(f"negmaml: {kind}; {printable('; '.join(notes))}", file=sys.stderr)
        # 128 + the signal, the status by which shells know it.
        return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


def _called(arguments: list[str]) -> int:
    name, *given = _with_new_names(arguments) or [""]
    # Importing only this command saves seconds.
    if name in COMMANDS:
        return _parsed(name, _command(name), given)()
    if name == "--version":
        say(f"negmaml {__version__}")
        return 0
    if name in ("", "-h", "--help"):
        print(_help())
        return 0 if name else 2
    if name.startswith("--tyro-"):  # completions of shells
        commands = {name: _command(name) for name in COMMANDS}
        return tyro.extras.subcommand_cli_from_dict(commands, prog="negmaml", args=arguments)
    raise ValueError(
        f"no command {name!r}{did_you_mean(name, COMMANDS)} (negmaml --help lists the commands)"
    )


def _parsed(name: str, command: Callable[..., int], given: list[str]) -> Callable[[], int]:
    """The command with its arguments; prints the help or the error of the parser without boxes."""

    @wraps(command)
    def bound(*arguments, **options):
        return partial(command, *arguments, **options)

    # The parser keeps line breaks of the source within the text of an argument. It reads the text
    # of the wrapped function, if there is one.
    signature = inspect.signature(command)
    del bound.__wrapped__
    bound.__signature__ = signature  # type: ignore[attr-defined]
    bound.__doc__ = re.sub(r"\n {8,}", " ", inspect.cleandoc(command.__doc__ or ""))
    text = TextIOWrapper(BytesIO(), encoding="utf-8")
    try:
        with redirect_stdout(text), redirect_stderr(text), _narrow():
            return tyro.cli(bound, prog=f"negmaml {name}", args=given)
    except SystemExit as stop:
        text.seek(0)
        shown = _unboxed(text.read(), titles=not stop.code)
        if stop.code:
            print(f"negmaml {name}: {printable(shown)}", file=sys.stderr)
            return partial(int, 2)
        say(f"{shown}\n\nexample:\n  negmaml {name} {EXAMPLES[name]}")
        return partial(int, 0)


@contextmanager
def _narrow() -> Iterator[None]:
    """Let the parser write help in one column of at most `WIDTH` characters."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(min(WIDTH, shutil.get_terminal_size().columns))
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _unboxed(text: str, titles: bool) -> str:
    """The text of the parser without the lines of its boxes: they fill logs and confuse readers."""
    lines = []
    for line in text.splitlines():
        if line.startswith("╭"):
            lines += ["", line.strip("╭─╮ ") + ":"] if titles else []
        elif line.startswith("│"):
            inner = line[1:-1].rstrip()
            lines += [] if set(inner) <= {"─", " "} and inner else [f"  {inner[1:]}".rstrip()]
        elif not line.startswith("╰"):
            lines += textwrap.wrap(line, WIDTH - 2) if len(line) > WIDTH else [line.rstrip()]
    # An option that may be missing is a choice of two types for the parser.
    lines = CHOICE_OF_TYPES.sub(r"got \2, which is no \1\n", "\n".join(lines)).split("\n")
    # An option without a default shows its type only, in the same width.
    found = re.sub(r"\{None\}\|(\S+)( ?)", lambda m: m[1] + 8 * m[2], "\n".join(lines))
    found = re.sub(r"\s\(default:\s*(None)?\)", "", found)
    return re.sub(r"\n{3,}", "\n\n", found if titles else re.sub("(?m)^  ", "", found)).strip()


def _help() -> str:
    rows = "\n".join(f"  {name:11}{summary}" for name, (_, summary) in COMMANDS.items())
    return f"""usage: negmaml COMMAND ...

Meta-learning with inner learning rates of either sign, and the theory of them.

{rows}

  negmaml COMMAND --help   the arguments of a command
  negmaml --version        the version
  negmaml --tyro-print-completion bash   completions: bash, zsh or tcsh

Every command takes --json and --quiet. Exit codes: 0 done, 1 a check failed,
2 wrong input, 130 interrupted, 143 terminated."""


def _with_new_names(arguments: list[str]) -> list[str]:
    """The arguments with renamed commands and flags under their new names, with a warning each."""
    if not arguments:
        return arguments
    name, *given = arguments
    # Old names work for one release.
    if name in RENAMED_COMMANDS:
        print_renamed(name, RENAMED_COMMANDS[name])
        name = RENAMED_COMMANDS[name]
    renamed = RENAMED_FLAGS.get(name, {})
    for i, argument in enumerate(given):
        flag, equals, value = argument.partition("=")
        if flag in renamed:
            print_renamed(flag, renamed[flag])
            given[i] = renamed[flag] + equals + value
    return [name, *given]


def _command(name: str) -> Callable[..., int]:
    module = importlib.import_module(f"negmaml.cli.{COMMANDS[name][0]}")
    # Names of functions cannot have the hyphens of commands.
    return getattr(module, name.replace("-", "_"))


def info(output: Output = TALKS) -> int:
    """Print versions, devices, dtype and precision.

    Args:
        output: the form of the output.
    """
    if not output.record(provenance()):
        print_table(("what", "value"), provenance().items(), "this installation")
    return 0
