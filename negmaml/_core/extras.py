"""Packages that come with an extra, imported where they are used."""

import importlib
from typing import Any


class MissingExtraError(ImportError):
    """A package that comes with an extra is not installed."""


def require(package: str, extra: str) -> Any:
    """The module `package`, or an error that names the extra to install."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{package} is needed here and not installed; pip install 'negmaml[{extra}]'"
        ) from error
