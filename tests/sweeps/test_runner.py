"""Batches: the keys of their cells, irregular blocks, and the order of starting and fetching."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm
from tests.helpers import mostly_slow
from tests.internals import runner


def described(key, size, x, kind, rates):
    """The key of the cell, and all that it was given."""
    words = jax.random.key_data(key)
    return {"key": words, "given": jnp.array([size, x, len(kind)], float), "times": rates}


GRID = {
    "size": [2, 3, 5],
    "x": [-1.0, 0.0, 0.5, 2.0],
    "kind": ["a", "bb"],
    "rates": [0.1, 0.2, 0.4],
}


def address(**point):
    texts = [f"{name}={value!r}".encode() for name, value in point.items()]
    words = [hashlib.blake2b(text, digest_size=8).digest() for text in texts]
    return sum(int.from_bytes(word, "little") for word in words) % 2**64


@pytest.mark.parametrize("seeds", [[7, 0, 2**32 - 1], range(3, 9, 2)])
@pytest.mark.parametrize("block", mostly_slow([None, 1, 5], 2))
def test_the_key_of_a_cell_is_that_of_its_address(seeds, block):
    found = nm.sweep(described, GRID, seeds, root_seed=3, vectorized=["rates"], block=block)
    carries = 0
    for size in GRID["size"]:
        for x in GRID["x"]:
            for kind in GRID["kind"]:
                at = address(size=size, x=x, kind=kind)
                carries += sum(address(**{n: v}) % 2**32 for n, v in
                               (("size", size), ("x", x), ("kind", kind))) >= 2**32  # fmt: skip
                for seed in seeds:
                    key = jax.random.key(3)
                    for word in (at >> 32, at % 2**32, seed):
                        key = jax.random.fold_in(key, np.uint32(word))
                    cell = found.sel(size=size, x=x, kind=kind, seed=seed)
                    np.testing.assert_array_equal(cell["key"], jax.random.key_data(key))
                    np.testing.assert_array_equal(cell["given"], [size, x, len(kind)])
    assert carries > 2  # the sum of the low words must carry into the high one


@pytest.fixture
def work():
    return nm.sweeps.prepare(described, GRID, 6, vectorized=["rates"])


def test_any_cells_of_a_block_are_those_of_the_whole(work):
    shape = work.grid.shape
    made = work.runner(shape, 3000, None)  # several batches of each group
    whole = tuple(slice(0, n) for n in shape)
    [(_, everything)] = made.compute([(whole, np.ones(shape, bool))])
    region = slice(1, 3), slice(1, 4), slice(0, 2), slice(2, 6)
    wanted = np.random.default_rng(0).random((2, 3, 2, 4)) < 0.4
    [(block, some)] = made.compute([(region, wanted)])
    assert block[0] == region
    assert made.compiler.ready[0].batch < wanted.sum()
    for name, values in some.items():
        expected = everything[name].reshape(*shape, *values.shape[1:])[region][wanted]
        np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("ahead", [1, 2])
def test_the_next_batch_is_started_before_one_is_fetched(work, ahead, monkeypatch):
    order, fetch = [], runner._Batch.fetch
    made = work.runner((1, 2, 2, 6), None, None)
    made.in_flight = ahead
    region = slice(0, 1), slice(0, 2), slice(0, 2), slice(0, 6)
    blocks = [(region, np.ones((1, 2, 2, 6), bool))] * 3
    program = made.compiler.program(0)
    monkeypatch.setattr(type(program), "__call__", lambda self, *given: (
        order.append("start"), self.executable(*given, *self.constants))[1])  # fmt: skip
    monkeypatch.setattr(runner._Batch, "fetch", lambda self: (order.append("fetch"), fetch(self)))
    returned = [block for block, _ in made.compute([*blocks[:2], None, blocks[2]])]
    assert [block is None for block in returned] == [False, False, True, False]
    assert order.count("start") == order.count("fetch") == 6  # two kinds make two groups
    if ahead == 1:
        assert order == ["start", "fetch"] * 6
    else:  # none is left in flight at the barrier
        assert order == [
            "start",
            *["start", "fetch"] * 3,
            "fetch",
            "start",
            *["start", "fetch"],
            "fetch",
        ]
