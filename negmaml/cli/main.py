"""The command line: dispatch to commands, each imported only when it is called."""

import importlib
import sys
from collections.abc import Callable, Sequence

import tyro

import negmaml
from negmaml._core.display import printable
from negmaml._core.extras import MissingExtraError
from negmaml.cli.output import print_renamed, print_table, provenance

# The module and the function of each command. All are imported only for `--help`, or for an
# unknown command.
COMMANDS = {
    "reproduce": "paper",
    "phases": "paper",
    "gain-map": "paper",
    "predict": "problem",
    "advise": "advise",
    "sweep": "sweeps",
    "status": "sweeps",
    "merge": "sweeps",
    "heatmap": "sweeps",
    "curves": "sweeps",
    "verify": "problem",
    "info": "main",
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
    arguments = _with_new_names(arguments)
    # Importing only this command saves seconds.
    if arguments and arguments[0] in COMMANDS:
        name, *given = arguments
        return tyro.cli(_command(name), prog=f"negmaml {name}", args=given)
    return tyro.extras.subcommand_cli_from_dict(
        {name: _command(name) for name in COMMANDS},
        prog="negmaml",
        args=arguments,
        description=negmaml.__doc__,
    )


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
    module = importlib.import_module(f"negmaml.cli.{COMMANDS[name]}")
    # Names of functions cannot have the hyphens of commands.
    return getattr(module, name.replace("-", "_"))


def info() -> int:
    """Print versions, devices, dtype and precision."""
    print_table(("what", "value"), provenance().items())
    return 0
