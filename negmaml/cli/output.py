"""Where a command writes, and what it says of itself there."""

import tempfile
from pathlib import Path

from negmaml._core.extras import available


def check_writable(folder: Path, extra: str = "figures") -> None:
    """Fail before the work, not after it."""
    for package in ("matplotlib", "xarray", "scipy"):
        available(package, extra)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"--out must be a folder that can be written, got {str(folder)!r} "
            f"({error.strerror}); choose another with --out"
        ) from error


def provenance() -> dict[str, str]:
    """What a stored result says of its making."""
    import jax.numpy as jnp

    from negmaml._core.provenance import versions

    return versions() | {
        "dtype of simulations, and of theory in Python": str(jnp.result_type(float)),
        "dtype of theory in commands": "float64",
        "matmul precision of statistics": "highest",
    }
