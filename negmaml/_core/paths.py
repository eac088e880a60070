"""Paths as users write them."""

import os
from pathlib import Path


def expanded(name: str, path: str | os.PathLike[str]) -> Path:
    """A path with `~` and `~user` replaced by the folder of that user.

    name: of the argument, for the ValueError if there is no such user.

    >>> expanded("out", "~/runs") == Path.home() / "runs"
    True
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        first = Path(path).parts[0]
        raise ValueError(
            f"{name} must be a path, got {os.fspath(path)!r}, and there is no user {first[1:]!r}; "
            f"write ./{first} for a folder of that name"
        ) from error
