"""Paths in the notation of users, such as ~/runs."""

import os
from pathlib import Path

from negmaml._core.checks import short_repr


def expanded(name: str, path: str | os.PathLike[str]) -> Path:
    """A path with `~` and `~user` replaced by the folder of that user.

    name: of the argument, for the ValueError if there is no such user and the TypeError for an
    object that is not a path.

    >>> expanded("out", "~/runs") == Path.home() / "runs"
    True
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{name} must be a path, got {short_repr(path)}")
    given = os.fspath(path)
    found = os.path.expanduser(given)
    # expanduser returns the path unchanged if it does not know the user.
    if found == given and given.startswith("~"):
        user = Path(given).parts[0]
        raise ValueError(
            f"{name} must be a path, got {given!r}, and there is no user {user[1:]!r}; give the "
            f"whole path of a folder that is named {user}"
        )
    return Path(found)
