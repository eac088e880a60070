"""The command line: dispatch to commands, each imported only when it is called."""

import importlib
import sys
from collections.abc import Callable, Sequence

import tyro

import negmaml
from negmaml._core.checks import did_you_mean
from negmaml._core.display import printable
from negmaml._core.extras import MissingExtraError
from negmaml._core.version import __version__
from negmaml.cli.output import print_renamed, print_table, provenance

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


def run(arguments: Sequence[str]) -> int:
    """Run one command and return 0, 1 if the methods of `verify` disagree, or 2 for bad input."""
    try:
        return _called(list(arguments))
    # These are about the user's input, and their message suffices; a bug keeps its traceback.
    except (ValueError, TypeError, OSError, MissingExtraError) as error:
        print(f"negmaml: {printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        # A sweep adds how to resume.
        notes = getattr(stop, "__notes__", ["nothing half-written was left behind"])
        print(f"negmaml: interrupted; {printable('; '.join(notes))}", file=sys.stderr)
        # 128 + SIGINT, the status by which shells know an interrupt.
        return 130


def _called(arguments: list[str]) -> int:
    name, *given = _with_new_names(arguments) or [""]
    # Importing only this command saves seconds.
    if name in COMMANDS:
        return tyro.cli(_command(name), prog=f"negmaml {name}", args=given)
    if name == "--version":
        print(f"negmaml {__version__}")
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


def _help() -> str:
    rows = "\n".join(f"  {name:11}{summary}" for name, (_, summary) in COMMANDS.items())
    return f"""usage: negmaml COMMAND ...

{negmaml.__doc__}

{rows}

  negmaml COMMAND --help   the arguments of a command
  negmaml --version        the version
  negmaml --tyro-print-completion bash   completions for a shell: bash, zsh or tcsh

A command returns 0, 1 if a check failed, 2 for wrong input, and 130 if it was interrupted."""


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


def info() -> int:
    """Print versions, devices, dtype and precision."""
    print_table(("what", "value"), provenance().items())
    return 0
