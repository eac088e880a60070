"""A function mapped over all devices returns the results of one device."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm
from tests.internals import as_pytree, seeds


def walk(key):
    return {"end": jnp.cumsum(jax.random.normal(key, (5,)))}


@pytest.mark.parametrize("count", (1, 4, 7))
@pytest.mark.parametrize("batch_size", (None, 3))
def test_items_are_mapped(count, batch_size):
    keys = jax.random.split(jax.random.key(0), count)
    mapped = nm.map_over_devices(walk, keys, batch_size=batch_size)
    np.testing.assert_allclose(mapped["end"], jax.vmap(walk)(keys)["end"], rtol=1e-6)


SCRIPT = """
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 3)
import negmaml as nm
from tests.training.test_seeds import walk
assert jax.device_count() == 3
for count in (2, 3, 8):
    keys = jax.random.split(jax.random.key(0), count)
    ends = nm.map_over_devices(walk, keys)["end"]
    np.testing.assert_allclose(ends, jax.vmap(walk)(keys)["end"], rtol=1e-6)
    print(count, "over", len(ends.sharding.device_set))
"""


@pytest.mark.slow
def test_several_devices_share_the_items():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "3 over 3" in done.stdout


def test_the_same_function_compiles_once():
    traces = []

    def noted(x):
        traces.append(1)
        return 2 * x

    nm.map_over_devices(noted, jnp.arange(4.0))
    before = len(traces)
    nm.map_over_devices(noted, jnp.arange(4.0) + 1)
    assert len(traces) == before


def test_no_items_raise():
    with pytest.raises(ValueError, match="every leaf of items must lead with the same axis"):
        nm.map_over_devices(walk, jnp.zeros((0, 2)))


def test_a_batch_fits_into_half_of_the_free_memory(monkeypatch):
    def double(x):
        return 2 * x

    items, alone = jnp.arange(40.0).reshape(20, 2), seeds.as_mesh(jax.devices()[:1])
    # On a CPU, and where only one fits, one item at a time.
    assert seeds._fitting(as_pytree(double), items, alone) is None
    for free, expected in ((1, None), (2**30, 20)):
        monkeypatch.setattr(seeds, "_free_bytes", lambda device, free=free: free)
        assert seeds._fitting(as_pytree(double), items, alone) == expected
    np.testing.assert_array_equal(nm.map_over_devices(double, items), 2 * items)
