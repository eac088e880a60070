"""Flags per block give the counts and masks of flags per cell."""

import numpy as np
import pytest

import negmaml as nm
from tests.internals import description_of, flags, open_store, selection

SHAPE, BLOCK = (3, 11), 4


def function(key, x):
    return {"y": x}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store whose cells have random levels, and these levels."""
    path = tmp_path_factory.mktemp("made") / "x.zarr"
    nm.sweep(function, {"x": [1.0, 2.0, 3.0]}, 11, store=path, block=BLOCK)
    store, random = open_store(str(path)), np.random.default_rng(0)
    layout = description_of(str(path)).layouts["completed"]
    levels = random.integers(0, 3, SHAPE).astype(np.uint8)
    levels[0, :4], levels[1, :4] = 2, 0
    for at in np.ndindex(*layout.chunks):
        store.write_flags(at, levels[layout.region(at)])
    (path / layout.key((2, 1))).unlink()
    levels[layout.region((2, 1))] = 0
    return flags.flags_of(store.storage, layout), levels


@pytest.mark.parametrize("positions", [
    (range(3), range(11)), (range(2, -1, -2), range(1, 9, 3)), (np.array([1]), np.array([10, 3])),
])  # fmt: skip
def test_flags_per_block_agree_with_flags_per_cell(positions, made):
    held, levels = made
    chosen = selection.Selection(SHAPE, positions)
    mask = np.zeros(SHAPE, bool)
    mask[np.ix_(*positions)] = True
    assert chosen.size == mask.sum()
    for level in range(4):
        assert held.count(level, chosen) == (mask & (levels >= level)).sum()
        at_level = mask & (levels == level)
        seen = np.zeros(SHAPE, int)
        for region, count in held.regions_at(level, chosen):
            wanted = held.wanted(region, level, chosen)
            np.testing.assert_array_equal(wanted, at_level[region])
            assert count == wanted.sum() > 0
            seen[region] += wanted
        np.testing.assert_array_equal(seen, at_level)
    most = np.full(held.layout.chunks, 1, np.uint8)
    assert held.count(2, chosen, most) == 0
    assert held.count(1, chosen, most) == (mask & (levels >= 1)).sum()
