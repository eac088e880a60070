"""Settings for every test, and the two dtypes."""

import gc
import os
import shutil
from importlib.metadata import entry_points
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


# Without optimisation, by the older code generator, and in one thread, for which nothing is split.
# The last two XLA may not know.
BASE_FLAGS = "--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"
MORE_FLAGS = "--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"


def quick_flags() -> str:
    """Flags with which XLA compiles for the CPU in a third of the time.

    Tests run most programs once, so compilation costs more than what the optimiser saves. Values
    agree to rounding. XLA aborts at an unknown flag, so its library is searched for the names.
    """
    flags = list(BASE_FLAGS)
    library = Path(jaxlib.__file__).with_name("libjax_common.so")
    if library.exists():
        with library.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            flags += [
                flag
                for flag in MORE_FLAGS
                # A flag that was removed may still be a reserved field, without the zeros.
                if content.find(b"\0%b\0" % flag.strip("-").split("=")[0].encode()) >= 0
            ]
    return " ".join(flags)


def pytest_configure(config):
    """A program is compiled once: by all workers, the processes that tests start, and later runs.

    JAX names what it keeps by a hash of the program, the flags, the versions and the machine.
    Workers and processes inherit the variable; `pytest --cache-clear` begins anew.
    """
    # Traced programs are millions of objects that stay: looking for garbage among them is rare.
    gc.set_threshold(50_000, 20, 100)
    # XLA reads them with its first program. `XLA_FLAGS= pytest` keeps the defaults, and so do
    # accelerators, whose plugins would obey some of them.
    if "XLA_FLAGS" not in os.environ and not entry_points(group="jax_plugins"):
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


@pytest.fixture(scope="session", autouse=True)
def light_profile():
    """The package's options for light programs; tests compile them without optimisation, too."""
    from tests.internals import jit_profiles

    light, jit_profiles["light"] = jit_profiles["light"], jit_profiles["trivial"]
    return light


@pytest.fixture
def shipped_options(light_profile, monkeypatch):
    """Compile with the package's options, in tests about them and about published numbers."""
    from tests.internals import compiler_options, jit_profiles, jit_registered

    def forget():
        compiler_options.cache_clear()
        for program in jit_registered:
            program.programs.clear()

    monkeypatch.setitem(jit_profiles, "light", light_profile)
    forget()
    yield
    forget()


@pytest.fixture
def x64():
    """Run a test in float64, in all threads: callbacks on the host have their own."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
