"""The command line, `negmaml COMMAND`."""

from negmaml._core.lazy import public_names
from negmaml.cli.main import run

__all__ = ["run"]

__dir__ = public_names(__name__)
