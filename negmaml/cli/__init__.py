"""The command line."""

from negmaml.cli.main import run

__all__ = ["run"]
