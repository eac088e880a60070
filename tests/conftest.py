"""Settings for every test, and the two dtypes."""

import jax
import pytest
from hypothesis import settings

settings.register_profile("negmaml", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("negmaml")


@pytest.fixture
def x64():
    """Run a test in float64."""
    with jax.enable_x64(True):
        yield
