"""Packages that come with an extra, imported where they are used."""

import importlib
import importlib.util
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
