"""Where a command writes."""

import tempfile
from pathlib import Path

from negmaml._core.extras import require


def check_writable(folder: Path, extra: str = "figures") -> None:
    """Fail before the work, not after it."""
    for package in ("matplotlib", "xarray", "scipy"):
        require(package, extra)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"--out must be a folder that can be written, got {str(folder)!r} "
            f"({error.strerror}); choose another with --out"
        ) from error
