"""Versions, devices and command, stored with every result."""

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.version import __version__


def versions() -> dict[str, str]:
    """Versions and devices, as text."""
    import jaxlib

    return {
        "negmaml": __version__,
        "python": sys.version.split()[0],
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "numpy": np.__version__,
        "devices": ", ".join(str(device) for device in jax.devices()),
    }


def provenance() -> dict[str, str]:
    """`versions`, and device, dtype, precision, revision and command."""
    precision = jax.config.jax_default_matmul_precision or "default"  # type: ignore[attr-defined]
    return versions() | {
        "device_kind": jax.devices()[0].device_kind,
        "dtype": str(jnp.result_type(float)),
        "matmul_precision": f"{precision}; highest in the statistics of the linear model",
        "git_revision": git_revision(),
        "command": " ".join(sys.argv),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def git_revision() -> str:
    """The commit of the working directory's repository, marked if changed; empty if none."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, timeout=5, cwd=Path.cwd()
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD")
        # Untracked files are ignored, since results are often written into the repository.
        changed = commit and git("status", "--porcelain", "--untracked-files=no")
    # Without git, or on a slow file system, the result is stored all the same.
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return f"{commit}, changed since" if changed else commit
