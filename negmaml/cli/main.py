"""The command line: each command is imported when it is asked for."""

import importlib
import sys
from collections.abc import Callable, Sequence

import tyro

import negmaml
from negmaml._core.display import printable
from negmaml._core.extras import MissingExtraError
from negmaml.cli.output import print_table, provenance

# In which module a command is; all are imported for the list of them, or one that is not there.
COMMANDS = {
    "reproduce": "paper",
    "phases": "paper",
    "payoff": "paper",
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


def run(arguments: Sequence[str]) -> int:
    """Run one command and return 0, 1 if the methods of `verify` disagree, or 2 for bad input."""
    try:
        return _called(list(arguments))
    except (ValueError, TypeError, OSError, MissingExtraError) as error:
        print(f"negmaml: {printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        notes = getattr(stop, "__notes__", ["nothing half-written was left behind"])
        print(f"negmaml: interrupted; {printable('; '.join(notes))}", file=sys.stderr)
        return 130


def _called(arguments: list[str]) -> int:
    config = (tyro.conf.OmitArgPrefixes,)
    if arguments and arguments[0] in COMMANDS:
        name, *given = arguments
        return tyro.cli(_command(name), prog=f"negmaml {name}", args=given, config=config)
    return tyro.extras.subcommand_cli_from_dict(
        {name: _command(name) for name in COMMANDS},
        prog="negmaml",
        args=arguments,
        description=negmaml.__doc__,
        config=config,
    )


def _command(name: str) -> Callable[..., int]:
    return getattr(importlib.import_module(f"negmaml.cli.{COMMANDS[name]}"), name)


def info() -> int:
    """Print versions, devices, dtype and precision."""
    print_table(("what", "value"), provenance().items())
    return 0
