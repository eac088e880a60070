"""A sweep in a process of its own, to be killed: python -m tests.sweeps.script STORE.

With WORKER=2/3 in the environment it is one of several that share the store.
"""

import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

import negmaml as nm
from tests.internals import lease

GRID = {"size": [2, 3], "scale": [-1.0, 0.0, 0.5, 2.0]}
SEEDS = 6


def function(key, size, scale):
    """Quick, and different in every cell."""
    draws = jax.random.normal(key, (size,))
    return {"total": scale + jnp.sum(draws), "ratio": jnp.sum(draws) / scale}


def chunk_count(store, name):
    """The number of complete chunks of an array, without files that are being written."""
    return sum(
        1
        for path in (Path(store) / name / "c").rglob("*")
        if path.name.isdigit() and path.is_file()
    )


def slow(done, cells):
    """Leaves time for a kill between blocks."""
    time.sleep(0.05)


if __name__ == "__main__":
    function.__module__ = "tests.sweeps.script"  # the same function as the tests import
    lease.HEARTBEAT_S = float(os.environ.get("BEAT", lease.HEARTBEAT_S))
    worker = tuple(map(int, os.environ["WORKER"].split("/"))) if "WORKER" in os.environ else None
    nm.sweep(function, GRID, SEEDS, store=sys.argv[1], block=3, progress=slow, worker=worker)
    print("finished")
