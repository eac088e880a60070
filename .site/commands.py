"""The reference of the command line: the help of each command."""

import contextlib
import io
import os
from unittest import mock

from negmaml.cli import main, run

WIDTH = "92"


def page() -> str:
    """The page in Markdown."""
    sections = [
        f"# Command line\n\n```text\n{_help('--help')}\n```\n\nGuide: [commands](../guides/cli.md)."
    ]
    for name, (_, summary) in main.COMMANDS.items():
        text = f"{summary[0].upper()}{summary[1:]}."
        sections.append(
            f"(command-{name})=\n## {name}\n\n{text}\n\n```text\n{_help(name, '--help')}\n```"
        )
    return "\n\n".join(sections) + "\n"


def _help(*arguments: str) -> str:
    """The help of the command line as it prints it, at a width that fits a page."""
    printed = io.StringIO()
    with (
        mock.patch.dict(os.environ, COLUMNS=WIDTH, NO_COLOR="1"),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        run(list(arguments))
    return "\n".join(line.rstrip() for line in printed.getvalue().strip().splitlines())
