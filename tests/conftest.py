"""Settings for every test, and the two dtypes."""

import os
import shutil

# JAX reads it when it starts. A program that compiles faster than this is not worth storing.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.02")

import jax
import pytest
from hypothesis import settings

# A script, which the search for doctests would run in every worker.
collect_ignore = ["typing/user_script.py"]

settings.register_profile("negmaml", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("negmaml")

PROGRAMS = "JAX_COMPILATION_CACHE_DIR"
LARGEST = 2**30  # bytes of them; what the code of last week compiled to is never asked for again


def pytest_configure(config):
    """A program is compiled once: by all workers, the processes that tests start, and later runs.

    JAX names what it keeps by a hash of the program, the flags, the versions and the machine.
    Workers and processes inherit the variable; `pytest --cache-clear` begins anew.
    """
    if PROGRAMS in os.environ:
        return
    folder = config.rootpath / ".pytest_cache" / "programs"
    folder.mkdir(parents=True, exist_ok=True)
    if (
        config.getoption("cacheclear", False)
        or sum(file.stat().st_size for file in folder.iterdir()) > LARGEST
    ):
        shutil.rmtree(folder, ignore_errors=True)
    os.environ[PROGRAMS] = str(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))


@pytest.fixture
def x64():
    """Run a test in float64."""
    with jax.enable_x64(True):
        yield
