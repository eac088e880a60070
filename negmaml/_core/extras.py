"""Packages that come with an extra, imported where they are used."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any


class MissingExtraError(ImportError):
    """A package that comes with an extra is not installed."""


def require(package: str, extra: str) -> Any:
    """The module `package`, or an error that names the extra to install."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise _missing(package, extra) from error


def available(package: str, extra: str) -> None:
    """Raise, as `require` does, unless the module can be imported later."""
    # Only looks for the module: importing it may take seconds.
    if importlib.util.find_spec(package) is None:
        raise _missing(package, extra)


def _missing(package: str, extra: str) -> MissingExtraError:
    return MissingExtraError(
        f"{package} is needed here and not installed; pip install 'negmaml[{extra}]'"
    )


def name_missing_extra(extra: str, packages: Sequence[str]) -> None:
    """Let this program end with the name of the extra if one of its packages is missing."""
    before = sys.excepthook

    def end(kind, error, trace) -> None:
        package = (getattr(error, "name", None) or "").partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and package in packages:
            print(_missing(package, extra), file=sys.stderr)
        else:
            before(kind, error, trace)

    sys.excepthook = end
