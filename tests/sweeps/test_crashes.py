"""A sweep is stopped at each of its storage operations in turn, and nothing is lost or wrong.

An operation writes or removes a file. The process is stopped before it and in the middle of it: on
a disk a part of the file then exists under another name. Nothing is written afterwards, as after a
kill. A reader at this instant finds the same files.
"""

import shutil
from pathlib import Path
from types import SimpleNamespace

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import negmaml as nm
from tests.crash import Disk, Operations
from tests.internals import ValidatedSweep, lease, prepare, progressions, session, storage

GRID = {"size": [2, 3], "scale": [-1.0, 0.0], "kind": "plain", "rates": [0.5, 2.0]}
BASE = (GRID, 2)
EXTENSIONS = {
    "values": (GRID | {"size": [1, 2, 3], "scale": [-1.0, 0.25, 0.0]}, 2),
    "seeds": (GRID, [7, 1, 0]),
    "whole axis": (GRID | {"rates": [0.5, -1.0, 2.0]}, 2),
    "all": (GRID | {"size": [2, 3, 4], "rates": [-1.0, 0.5, 2.0]}, 3),
}
OPTIONS = {
    "vectorized": ["rates"],
    "static": ["size", "kind"],
    "block": 4,
    "extend": True,
    "output_dims": {"largest": ()},
}


def function(key, size, scale, kind, rates):
    """Random numbers, and an output without whole axes."""
    draws = jax.random.normal(key, (size,))
    return {"loss": scale + rates * jnp.sum(draws), "largest": jnp.max(draws)}


class Quick:
    """In place of what computes: numbers that tell cells apart, without compiling."""

    block = (1, 2, 2)

    def __init__(self, sweep):
        self.grid, self.compiler = sweep.grid, SimpleNamespace(check=None)

    def expect(self, regions):
        pass

    def compute(self, blocks):
        for block in blocks:
            yield block, {} if block is None else self.values(*block)

    def values(self, region, wanted):
        index = [at + part.start for at, part in zip(np.nonzero(wanted), region, strict=True)]
        at = dict(zip(self.grid.dims, index, strict=True))
        own = progressions.take(self.grid.seeds, at["seed"]).astype(np.uint64)
        scale = np.zeros(len(own), np.float32)
        for axis in self.grid.tables:
            here = at[axis.dim] if axis.dim else np.zeros(len(own), int)
            own += axis.addresses[here]
            scale += axis.numbers["scale"][here] if "scale" in axis.numbers else 0
        own = (own % np.uint64(2**20)).astype(np.float32)
        rates = self.grid.vectorized_values()["rates"].astype(np.float32)
        loss = scale[:, None] + own[:, None] * rates
        return {"loss": loss, "largest": own, "finite": own % 3 > 0}


class Memory:
    """Objects at a URL, which are whole or not there."""

    within = False

    def __init__(self, folder):
        self.root = f"{folder}/"
        self.url = f"memory:/{folder}/x.zarr"

    @property
    def objects(self):
        return fsspec.filesystem("memory").store

    def keep(self):
        return {k: v.getvalue() for k, v in self.objects.items() if k.startswith(self.root)}

    def restore(self, kept):
        for name in [name for name in self.objects if name.startswith(self.root)]:
            del self.objects[name]
        for name, content in (kept or {}).items():
            fsspec.filesystem("memory").pipe_file(name, content)

    def names(self):
        return [name.rsplit("/", 1)[-1] for name in self.objects if name.startswith(self.root)]


class StoreOperations(Operations):
    """The writes and removals of stores."""

    def __init__(self, monkeypatch):
        super().__init__()
        put, piped = zarr.storage._local._put, zarr.storage.FsspecStore.set
        local, remote = storage.LocalStorage, storage.RemoteStorage
        create, write = local.create, local.write

        def local_put(path, value, exclusive=False):
            if not str(path).startswith(self.prefix):
                return put(path, value, exclusive)
            path.parent.mkdir(parents=True, exist_ok=True)
            self.step(path.with_suffix(".0f.partial"), value.to_bytes())
            return put(path, value, exclusive)

        def local_write(this, key, data):
            path = this.folder / key
            if str(path).startswith(self.prefix):
                path.parent.mkdir(parents=True, exist_ok=True)
                self.step(path.with_name(f"{path.name}.0f.partial"), data)
            return write(this, key, data)

        def local_create(this, key, data):
            this.folder.mkdir(parents=True, exist_ok=True)
            self.step(this.folder / key, b"")  # there already, with nothing in it
            return create(this, key, data)

        async def remote_put(this, key, value, byte_range=None):
            self.step()
            return await piped(this, key, value)

        def stepped(right):
            def do(this, *arguments):
                self.step()
                return right(this, *arguments)

            return do

        monkeypatch.setattr(local, "create", local_create)
        monkeypatch.setattr(local, "write", local_write)
        monkeypatch.setattr(local, "remove", stepped(local.remove))
        for name in ("create", "write", "remove"):
            monkeypatch.setattr(remote, name, stepped(getattr(remote, name)))
        monkeypatch.setattr(zarr.storage._local, "_put", local_put)
        monkeypatch.setattr(zarr.storage.FsspecStore, "set", remote_put)


def the_same(result, expected):
    """Bit for bit."""
    xr.testing.assert_identical(result.load().drop_attrs(), expected.drop_attrs())
    for name in expected.variables:
        assert result[name].dtype == expected[name].dtype


def seen(url):
    """The dataset that `xarray.open_zarr` finds at a URL; None without a store."""
    try:
        return xr.open_zarr(url).load()
    except FileNotFoundError:
        return None


def check_reader(found, old, new):
    """It is of the old size or of the new one, and right wherever it says that a cell is done."""
    if found is None:
        assert old is None
        return
    assert any(
        whole is not None and all(found[c].equals(whole[c]) for c in whole.coords)
        for whole in (old, new)
    ), f"half a coordinate: {dict(found.sizes)}"
    there = new.sel({d: found[d] for d in found["finite"].dims})
    done = found["completed"] > (1 if found.sizes["rates"] > (old or new).sizes["rates"] else 0)
    for name in ("loss", "largest", "finite"):
        right = (
            there[name].sel(rates=found["rates"]) if "rates" in there[name].dims else there[name]
        )
        np.testing.assert_array_equal(found[name].where(done), right.where(done))


def crash_everywhere(place, operations, before, after, every=1, worker=None):
    """Stop `after`, on a store of `before` if any, everywhere; returns the points tried.

    worker: the pair of the stopped process, if it is one of several that share the store. Another
    worker and an exclusive sweep then resume its store, in turn.
    """

    def call(grid, seeds, extend=True, worker=worker):
        options = OPTIONS | {"extend": extend, "worker": worker}
        return nm.sweep(function, grid, seeds, store=place.url, **options)

    old = call(*before).load() if before else None
    old_stored = seen(place.url)
    kept = place.keep() if before else None
    new = operations.run(lambda: call(*after)).load()
    count, new_stored = operations.count, seen(place.url)
    points = 0
    assert count > 10
    for at in range(1, count + 2, every):
        for within in (False, True) if place.within else (False,):
            place.restore(kept)
            stopped = operations.run(lambda: call(*after), at, within)
            assert (stopped is None) == (at <= count)
            check_reader(seen(place.url), old_stored, new_stored)
            here = place.keep() if not isinstance(place, Disk) else None
            if before and not isinstance(place, Disk):
                the_same(call(*before, extend=False), old)
                place.restore(here)
            elif before:
                aside = Path(f"{place.folder}-now")
                shutil.copytree(place.folder, aside)
                other = Disk(aside)
                the_same(
                    nm.sweep(function, *before, store=other.url, **(OPTIONS | {"extend": False})),
                    old,
                )
                shutil.rmtree(aside)
            others = (None, (2, 2)) if worker else (None,)
            the_same(call(*after, worker=others[points % len(others)]), new)
            assert not [n for n in place.names() if n.startswith(("worker", "block"))]
            assert not [n for n in place.names() if n.endswith(".partial") or "creating" in n]
            points += 1
    return points


@pytest.fixture
def operations(monkeypatch, tmp_path):
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.0005)
    counted = StoreOperations(monkeypatch)
    counted.prefix = str(tmp_path)
    return counted


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(session, "planned", lambda sweep, *_: (None, Quick(sweep)))
    monkeypatch.setattr(ValidatedSweep, "runner", lambda self, *_: Quick(self))


@pytest.fixture(params=["disk", "url"])
def place(request, tmp_path):
    return Disk(tmp_path / "d") if request.param == "disk" else Memory(tmp_path)


def scenario(extension):
    return (BASE, EXTENSIONS[extension]) if extension else (None, BASE)


@pytest.mark.parametrize("extension", [None, "all"])
def test_a_stop_loses_nothing(extension, place, operations, quick):
    every = 17 if extension else 11  # an extension has more operations
    assert crash_everywhere(place, operations, *scenario(extension), every=every) > 2


@pytest.mark.parametrize("extension", [None, "all"])
def test_a_stop_of_a_worker_loses_nothing(extension, place, operations, quick):
    every = 47 if extension else 23
    points = crash_everywhere(place, operations, *scenario(extension), every=every, worker=(1, 2))
    assert points > 1


def some(values):
    """Some of the values, in any order."""
    return st.lists(st.sampled_from(values), min_size=1, unique=True)


ASKED = st.lists(
    st.tuples(some([2, 3]), some([-1.0, 0.0, 0.5]), some([0.5, 2.0, -3.0]), some([0, 1, 5])),
    min_size=2,
    max_size=4,
)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ASKED)
def test_whatever_was_asked_before_a_sweep_returns_what_is_asked(quick, tmp_path, calls):
    place = Memory(tmp_path)
    place.restore(None)
    for size, scale, rates, seeds in calls:
        grid = {"size": size, "scale": scale, "kind": "plain", "rates": rates}
        found = nm.sweep(function, grid, seeds, store=place.url, **OPTIONS).load()
        work = prepare(function, grid, seeds, **{n: OPTIONS[n] for n in ("vectorized", "static")})
        every = [slice(0, n) for n in work.grid.shape]
        flat = Quick(work).values(every, np.ones(work.grid.shape, bool))
        for name, values in flat.items():
            right = values.reshape(*work.grid.shape, *values.shape[1:])
            np.testing.assert_array_equal(found[name], right)
        for name, values in (("scale", scale), ("rates", rates), ("seed", seeds), ("size", size)):
            np.testing.assert_array_equal(found[name], values)
    assert len(xr.open_zarr(place.url)["seed"]) == len({s for *_, seeds in calls for s in seeds})


@pytest.mark.slow
@pytest.mark.parametrize("extension", [None, *EXTENSIONS])
def test_a_stop_at_any_operation_loses_nothing(extension, place, operations, quick):
    points = crash_everywhere(place, operations, *scenario(extension))
    print(f"{extension or 'base'}, {type(place).__name__}: {points} points")


@pytest.mark.slow
@pytest.mark.parametrize("extension", [None, *EXTENSIONS])
def test_a_stop_of_a_worker_at_any_operation_loses_nothing(extension, place, operations, quick):
    points = crash_everywhere(place, operations, *scenario(extension), worker=(1, 2))
    print(f"{extension or 'base'}, {type(place).__name__}: {points} points of a worker")


@pytest.mark.slow
@pytest.mark.parametrize("extension", [None, "all"])
def test_results_are_bit_for_bit_those_of_an_undisturbed_sweep(extension, place, operations):
    """With what really computes, in programs of which cells share batches."""
    crash_everywhere(place, operations, *scenario(extension), every=4)
