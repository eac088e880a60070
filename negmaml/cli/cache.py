"""Compiled programs kept on disk: a command compiles once on a machine, not once a run."""

import os
import tempfile
from pathlib import Path

from negmaml._core.paths import expanded

VARIABLE = "NEGMAML_CACHE"
OFF = ("off", "0", "no", "false")


def keep_programs() -> Path | None:
    """Switch JAX's persistent compilation cache on for this process; returns its folder.

    The folder is that of `NEGMAML_CACHE`, or one of the user's cache directory. It stays off, None,
    if the variable says off, if JAX has been told of a folder of its own, or where it cannot be
    written. Entries are named by a hash of program, versions and machine, so processes can share
    the folder; an entry that cannot be read is compiled anew.
    """
    import jax
    from platformdirs import user_cache_path

    wanted = os.environ.get(VARIABLE, "")
    if wanted.lower() in OFF or getattr(jax.config, "jax_compilation_cache_dir", None):
        return None
    try:
        folder = expanded(VARIABLE, wanted) if wanted else user_cache_path("negmaml") / "programs"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # JAX keeps what takes a second; even the smallest program is sooner read than compiled.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder
