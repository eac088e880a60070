"""The cache of compiled programs on disk, so that a command compiles only once on a machine."""

import os
import tempfile
from pathlib import Path

from negmaml._core.paths import expanded

VARIABLE = "NEGMAML_CACHE"
OFF = ("off", "0", "no", "false")


def keep_programs() -> Path | None:
    """Enable JAX's persistent compilation cache for this process; return its folder.

    The folder is `NEGMAML_CACHE`, or one in the user's cache directory. The cache stays off, and
    the result is None, if the variable is "off", if JAX already has a folder, or if the folder
    cannot be written. Entries are named by a hash of program, versions and machine, so processes
    can share the folder. An entry that cannot be read is compiled again.
    """
    import jax
    from platformdirs import user_cache_path

    wanted = os.environ.get(VARIABLE, "")
    # A folder that the user has set for JAX stays in use.
    if wanted.lower() in OFF or getattr(jax.config, "jax_compilation_cache_dir", None):
        return None
    try:
        folder = expanded(VARIABLE, wanted) if wanted else user_cache_path("negmaml") / "programs"
        folder.mkdir(parents=True, exist_ok=True)
        # mkdir succeeds for an existing folder that is read-only.
        with tempfile.TemporaryFile(dir=folder):
            pass
    # The cache only saves time, so a command works without it.
    except (OSError, ValueError):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # By default JAX keeps only programs that take a second to compile; reading is always faster.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder
