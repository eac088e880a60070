"""A store has one address, however it is spelled: one lock, one store, and no folder named `~`."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import negmaml as nm
from negmaml.sweeps import StoreError, merge, status
from tests.internals import Address, check_url, lease, load
from tests.sweeps.read_only import read_only

GRID = {"x": [1.0, 2.0]}


def function(key, x):
    return {"y": 2 * x}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The user's folder and the current one, with links to it and to the store in it."""
    folder = tmp_path / "home"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "linked").symlink_to(folder)
    (folder / "link.zarr").symlink_to(folder / "x.zarr")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder)
    return folder


SPELLINGS = ["x.zarr", "./x.zarr", "sub/../x.zarr", "~/x.zarr", "{home}/x.zarr/", "{home}//x.zarr",
             "../linked/x.zarr", "link.zarr", "~/link.zarr", "file://{home}/x.zarr", "file://~/x.zarr",
             "FILE://{home}/x.zarr", "local://{home}/x.zarr", "file://localhost{home}/x.zarr",
             "file:///{home}/x.zarr/"]  # fmt: skip
URLS = ["memory://a/x.zarr", "memory:///a/x.zarr", "Memory://a/x.zarr/", "memory:////a/x.zarr"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_path_is_one_address(spelling, home):
    expected = os.path.realpath(home / "x.zarr")
    spelled = spelling.format(home=home)
    assert check_url(spelled) == expected
    assert "://" in spelling or check_url(Path(spelled)) == expected
    assert repr(check_url(spelled)) == repr(spelled)  # what messages say


def test_every_spelling_of_a_url_is_one_address():
    assert {str(check_url(url)) for url in URLS} == {"memory:///a/x.zarr"}
    assert len({check_url(url) for url in ("memory://a/x.zarr", "memory://a//x.zarr")}) == 2
    address = pickle.loads(pickle.dumps(check_url("Memory://a")))  # as workers get it
    assert (type(address), str(address), repr(address)) == (Address, "memory:///a", "'Memory://a'")


def test_an_address_leads_to_the_file_system_of_its_url():
    """Where the plain form of a URL leads elsewhere, as without its host, the URL is kept."""
    import fsspec

    class Hosted(type(fsspec.filesystem("memory"))):
        protocol = "hosted"
        cachable = False

        @classmethod
        def _strip_protocol(cls, path):
            return "/" + path.removeprefix("hosted://").partition("/")[2]

        @staticmethod
        def _get_kwargs_from_urls(url):
            return {"host": url.removeprefix("hosted://").partition("/")[0]}

    fsspec.register_implementation("hosted", Hosted, clobber=True)
    assert str(check_url("HOSTED://one/x.zarr/")) == "hosted://one/x.zarr"


PAIRS = [("~/x.zarr", "{home}/x.zarr"), ("link.zarr", "x.zarr"), ("../linked/x.zarr", "./x.zarr"),
         ("file://{home}/x.zarr", "x.zarr"), tuple(URLS[:2])]  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS)
def test_two_spellings_exclude_each_other(pair, home, monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.05)
    first, second = (url.format(home=home) for url in pair)
    with lease.locked(check_url(first)), pytest.raises(StoreError, match=f"process {os.getpid()}"):
        nm.sweep(function, GRID, 2, store=second)
    with lease.locked(first), pytest.raises(StoreError, match=f"process {os.getpid()}"):
        nm.sweep(function, GRID, 2, store=second, worker=(1, 2))


@pytest.mark.parametrize("pair", PAIRS)
def test_an_extension_by_one_spelling_is_seen_by_the_other(pair, home):
    first, second = (url.format(home=home) for url in pair)
    nm.sweep(function, GRID, 2, store=first)
    nm.sweep(function, {"x": [1.0, 2.0, 3.0]}, 3, store=second, extend=True)
    for url in (first, second):
        assert status(url).cells_done == 9
        with load(url) as found:
            np.testing.assert_array_equal(found["y"].isel(seed=2), [2.0, 4.0, 6.0])
    with pytest.raises(ValueError, match="is among those that are merged"):
        merge([first], second)


def test_the_users_folder_is_where_everything_of_a_store_goes(home):
    nm.sweep(function, GRID, 1, store="~/runs/x.zarr")
    merge(["~/runs/x.zarr"], Path("~/runs/m.zarr"))
    assert status(Path("~/runs/m.zarr")).cells_done == 2
    assert {path.name for path in (home / "runs").iterdir()} >= {"x.zarr", "m.zarr"}
    assert not (home / "~").exists()
    assert xr.open_zarr(home / "runs" / "m.zarr").attrs["merged"] == [
        str(check_url("~/runs/x.zarr"))
    ]


def test_a_folder_that_is_named_like_a_home_is_asked_for_with_a_path(home):
    with pytest.raises(ValueError, match=r"no user 'nobody-of-this-name'; give the whole path"):
        nm.sweep(function, GRID, 1, store="~nobody-of-this-name/x.zarr")
    nm.sweep(function, GRID, 1, store="./~nobody-of-this-name/x.zarr")
    assert (home / "~nobody-of-this-name" / "x.zarr").is_dir()


def test_a_store_stays_where_it_is_when_the_folder_changes(home):
    def move(done, cells):
        os.chdir(home / "sub")

    nm.sweep(function, GRID, 3, store="x.zarr", block=1, progress=move)
    assert status(home / "x.zarr").cells_done == 6
    assert not list((home / "sub").iterdir())


@pytest.mark.parametrize(
    ("url", "error", "said"),
    [
        ("/", ValueError, "a folder of its own, not the root"),
        ("file:///", ValueError, "a folder of its own, not the root"),
        ("memory://", ValueError, "a folder of its own, not the root"),
        ("memory:///", ValueError, "a folder of its own, not the root"),
        ("a\0b", ValueError, "must be a path or a URL"),
        ("x" * 201, ValueError, "at most 200 bytes, got 201"),
        ("/proc/x.zarr", OSError, r"'/proc/x\.zarr' cannot be written \(No such file"),
        ("/dev/null/x.zarr", OSError, r"cannot be written \(there is a file in its path\)"),
        ("{home}/file/x.zarr", OSError, r"cannot be written \(there is a file in its path\)"),
        ("{home}/file", StoreError, "exists and is no zarr store"),
        (".", StoreError, "exists and is no zarr store"),
        ("..", StoreError, "exists and is no zarr store"),
    ],
)
def test_a_place_that_no_store_can_have_is_refused_at_once(url, error, said, home, monkeypatch):
    from tests.internals import Runner

    monkeypatch.setattr(Runner, "probe", None)
    (home / "file").write_text("mine")
    with pytest.raises(error, match=said):
        nm.sweep(function, GRID, 1, store=url.format(home=home))
    assert (home / "file").read_text() == "mine"
    assert {path.name for path in home.iterdir() if path.name[0] != "."} == {
        "file", "link.zarr", "sub"
    }  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"worker": (1, 2)}])
def test_a_finished_store_that_cannot_be_written_is_read(options, tmp_path):
    store = tmp_path / "x.zarr"
    expected = nm.sweep(function, GRID, 3, store=store).load()
    with read_only(tmp_path):
        xr.testing.assert_identical(nm.sweep(function, GRID, 3, store=store, **options), expected)
        part = nm.sweep(function, {"x": [2.0]}, [1], store=store, **options)
        np.testing.assert_array_equal(part["y"], [[4.0]])
        assert status(store).cells_done == 6
        assert load(str(store))["finite"].all()
        merge([store], f"memory://{tmp_path}/m.zarr")
    assert status(f"memory://{tmp_path}/m.zarr").cells_done == 6


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (dict(seeds=4), "seeds"),
        (dict(seeds=4, extend=True), "seeds"),
        (dict(function=lambda key, x: {"y": 3 * x}), "something else"),
        (dict(root_seed=1), "root_seed"),
    ],
)
def test_what_a_store_that_cannot_be_written_lacks_is_an_error_at_once(
    call, error, tmp_path, monkeypatch
):
    from tests.internals import Runner

    store = tmp_path / "x.zarr"
    arguments = dict(function=function, grid=GRID, seeds=3, store=store)
    nm.sweep(**arguments)
    monkeypatch.setattr(Runner, "probe", None)
    with read_only(tmp_path), pytest.raises(OSError, match=r"cannot be written \(Read-only file"):
        nm.sweep(**(arguments | call))


def test_a_store_whose_own_folder_cannot_be_written_is_read(tmp_path, monkeypatch):
    store = tmp_path / "x.zarr"
    nm.sweep(function, GRID, 3, store=store)
    with read_only(store):
        monkeypatch.setattr(os, "access", lambda *_: False)
        assert nm.sweep(function, GRID, 3, store=store)["y"].size == 6
        with pytest.raises(OSError, match=r"cannot be written \(Permission denied"):
            nm.sweep(function, GRID, 4, store=store, extend=True)
