"""Settings for every test, and the two dtypes."""

import atexit
import os
import shutil
import tempfile
from importlib.metadata import version

# Most of the time of the suite is compilation, which this cuts by half; results differ by rounding.
# It has to be set before JAX starts. XLA stops at flags that it does not know, and later versions
# have the newer code generator alone.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if tuple(map(int, version("jaxlib").split(".")[:2])) <= (0, 10):
    FLAGS += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("XLA_FLAGS", FLAGS)

# The workers of a run, which inherit these variables, and the processes that tests start compile a
# program once between them. With a folder of your own in JAX_COMPILATION_CACHE_DIR a second run
# takes what the first compiled.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="negmaml-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.02")

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# A script, which the search for doctests would run in every worker.
collect_ignore = ["typing/user_script.py"]

settings.register_profile("negmaml", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("negmaml")


@pytest.fixture
def x64():
    """Run a test in float64."""
    with jax.enable_x64(True):
        yield
