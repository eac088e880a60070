"""The command line, `negmaml COMMAND`."""

from negmaml.cli.main import run

__all__ = ["run"]
