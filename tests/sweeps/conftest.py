"""Fixtures that the tests of sweeps share."""

import pytest

from tests.internals import Runner


@pytest.fixture
def computed(monkeypatch):
    """The numbers of cells of the blocks that are computed, in order."""
    counted, right = [], Runner.compute

    def compute(self, blocks):
        for block, values in right(self, blocks):
            counted.append(0 if block is None else int(block[1].sum()))
            yield block, values

    monkeypatch.setattr(Runner, "compute", compute)
    return counted
