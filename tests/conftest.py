"""Settings for every test, and the two dtypes."""

import os
import shutil
from mmap import ACCESS_READ, mmap
from pathlib import Path

# JAX reads it when it starts. A program that compiles faster than this is not worth storing.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.02")

import jax
import jaxlib
import pytest
from hypothesis import settings

# A script, which the search for doctests would run in every worker.
collect_ignore = ["typing/user_script.py"]

settings.register_profile("negmaml", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("negmaml")

PROGRAMS = "JAX_COMPILATION_CACHE_DIR"
LARGEST = 2**30  # bytes of them; what the code of last week compiled to is never asked for again


def quick_flags() -> str:
    """Flags with which XLA compiles for the CPU in less than half the time.

    Tests run most programs once, so compilation costs more than what the optimiser saves. Values
    agree to rounding. Programs that the package compiles with options of its own keep these. XLA
    aborts at an unknown flag, so the code generator is chosen only if the library knows its flag.
    """
    flags = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
    library = Path(jaxlib.__file__).with_name("libjax_common.so")
    if library.exists():
        with library.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            if content.find(b"xla_cpu_use_fusion_emitters") >= 0:
                flags.append("--xla_cpu_use_fusion_emitters=false")
    return " ".join(flags)


def pytest_configure(config):
    """A program is compiled once: by all workers, the processes that tests start, and later runs.

    JAX names what it keeps by a hash of the program, the flags, the versions and the machine.
    Workers and processes inherit the variable; `pytest --cache-clear` begins anew.
    """
    # XLA reads them with its first program. `XLA_FLAGS= pytest` keeps the defaults.
    if "XLA_FLAGS" not in os.environ:
        os.environ["XLA_FLAGS"] = quick_flags()
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
