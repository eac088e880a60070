"""Stores of strangers: nothing in them runs code, leads out of them, or takes memory or time."""

import json
import os
import pickle
import shutil
import struct

import google_crc32c
import jax.numpy as jnp
import numpy as np
import pytest
from numcodecs import Zstd

import negmaml as nm
from negmaml.sweeps import StoreError, merge
from tests.helpers import mostly_slow
from tests.internals import (
    MAX_BLOCKS,
    MAX_CELLS,
    check_manifest,
    create,
    description_of,
    guarded,
    one_line,
    summary,
    zarr_arrays,
)
from tests.internals import main as cli
from tests.sweeps.script import GRID, SEEDS, function


def kinds(key, size, scale, name):
    """Outputs of several types, of axes of several types."""
    return function(key, size, scale) | {"count": jnp.int32(size)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "x.zarr"
    nm.sweep(kinds, GRID | {"name": ["a", "bé"]}, SEEDS, store=path, block=7)
    return path


@pytest.fixture
def store(made, tmp_path):
    """A copy to be altered."""
    return shutil.copytree(made, tmp_path / "x.zarr")


def again(path, **options):
    return nm.sweep(kinds, GRID | {"name": ["a", "bé"]}, SEEDS, store=path, **options)


ENTRIES = {
    "sweep": again,
    "extend": lambda path: nm.sweep(
        kinds, GRID | {"name": ["a", "bé"]}, SEEDS + 1, store=path, extend=True
    ),
    "worker": lambda path: again(path, worker=(1, 1)),
    "status": nm.sweeps.status,
    "check": lambda path: nm.sweeps.status(path, check=True),
    "merge": lambda path: merge([path], path.with_name("merged.zarr")),
    "onto": lambda path: merge([path.with_name("other.zarr")], path),
    "load": lambda path: summary.load(str(path)),
}


def refused(path, match):
    """Every way to open the store is an error of ours."""
    if not path.with_name("other.zarr").exists():
        again(path.with_name("other.zarr"))
    for name, enter in ENTRIES.items():
        with pytest.raises(StoreError, match=match):
            enter(path)
            pytest.fail(name)
    assert not path.with_name("merged.zarr").exists()
    assert cli.run(["heatmap", str(path), "--x", "size", "--y", "scale"]) == 2


def edit(path, change, name=None):
    """Change the metadata of the group, or of an array of it."""
    file = path / (f"{name}/zarr.json" if name else "zarr.json")
    held = json.loads(file.read_text())
    change(held)
    file.write_text(json.dumps(held))


class Bomb:
    """Says so when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


PICKLED = {
    "zarr_format": 2, "shape": [2], "chunks": [2], "dtype": "|O", "fill_value": None, "order": "C",
    "filters": [{"id": "vlen-utf8"}, {"id": "pickle"}], "compressor": None, "node_type": "array",
    "attributes": {}, "dimension_separator": ".",
}  # fmt: skip


@pytest.mark.parametrize("name", mostly_slow(["seed", "total", "new", "scale"], 1))
def test_an_array_of_the_older_format_is_never_opened(name, store, tmp_path):
    """Its filters are those of numcodecs, one of which unpickles, with some versions of it."""
    (store / name).mkdir(exist_ok=True)
    (store / name / "0").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))

    def change(held):
        held["consolidated_metadata"]["metadata"][name] = PICKLED

    edit(store, change)
    refused(store, "not those of its sweep" if name == "new" else "codecs|could run code|filters")
    assert not (tmp_path / "ran").exists()


def altered(field, value):
    def change(held):
        held[field] = value(held[field]) if callable(value) else value

    return change


def configured(held):
    held["codecs"][0] = {"name": "bytes", "configuration": {"endian": "big"}}


ALTERED = [
    (altered("zarr_format", 2), "zarr_format"),
    (altered("shape", [10**12]), "shape"),
    (altered("data_type", "int8"), "data_type"),
    (altered("dimension_names", ["x"] * 4), "dimension_names"),
    (altered("chunk_grid", {"name": "regular", "configuration": {"chunk_shape": [1] * 4}}), "grid"),
    (altered("chunk_key_encoding", {"name": "v2"}), "chunk_key_encoding"),
    (altered("fill_value", 1.0), "fill_value"),
    (altered("attributes", {"scale_factor": 2.0}), "attributes"),
    (altered("storage_transformers", [{"name": "x"}]), "storage_transformers"),
    (altered("codecs", lambda codecs: [*codecs, {"name": "gzip"}]), "could run code"),
    (altered("codecs", lambda codecs: [codecs[0], *[codecs[1]] * 9]), "codecs"),
    (altered("codecs", 3), "codecs"),
    (altered("codecs", [[]]), "codecs"),
    (configured, "codec bytes with"),
    (
        altered("filters", [{"id": "pickle"}]) if False else lambda h: h.update(filters=[]),
        "filters",
    ),
]


@pytest.mark.parametrize(("change", "named"), ALTERED)
def test_metadata_that_are_not_those_of_the_sweep_are_refused(change, named, store):
    def of_the_group(held):
        change(held["consolidated_metadata"]["metadata"]["total"])

    edit(store, of_the_group)
    with pytest.raises(StoreError, match=named):
        nm.sweeps.status(store)


@pytest.mark.parametrize(("change", "named"), ALTERED[2:6])
def test_so_are_those_of_a_single_array(change, named, store):
    edit(store, change, "total")
    with pytest.raises(StoreError, match=named):
        nm.sweeps.status(store)


def manifest_with(path, change):
    """Change the manifest of a store."""

    def of_the_manifest(held):
        manifest = json.loads(held["attributes"]["negmaml_sweep"])
        change(manifest)
        held["attributes"]["negmaml_sweep"] = json.dumps(manifest)

    edit(path, of_the_manifest)


def output(**fields):
    def change(manifest):
        held = dict(zip(("name", "dims", "shape", "dtype"), manifest["outputs"][0], strict=True))
        manifest["outputs"][0] = list((held | fields).values())

    return change


def axis(field, value):
    return lambda manifest: manifest["axes"][1].update({field: value})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (altered("block", [-1, -1, -1, -1]), "block"),
        (altered("block", [1, 1, 1, 10**12]), "block"),
        (altered("block", [0, 1, 1, 1]), "block"),
        (altered("block", [1.0, 1, 1, 1]), "block"),
        (altered("block", []), "block"),
        (altered("seeds", [-1]), "seeds"),
        (altered("seeds", [0, 0]), "seeds"),
        (altered("seeds", "01"), "seeds"),
        (altered("seeds", 10**12), "cannot be read"),
        (altered("seeds", {"start": -1, "stop": 3, "step": 1}), "seeds"),
        (altered("seeds", {"start": 0, "stop": 0, "step": 1}), "seeds"),
        (altered("seeds", {"start": 0, "stop": 2**40, "step": 2}), "seeds"),
        (altered("seeds", {"start": 0, "stop": 10**30, "step": 1}), "cannot be read"),
        (altered("seeds", {"start": 0, "stop": 2, "step": 0}), "cannot be read"),
        (altered("labels", {"seed": 10**9}), "chunk of labels"),
        (altered("labels", {"x": 1024}), "chunk of labels"),
        (altered("labels", {"seed": 0}), "chunk of labels"),
        (altered("root", "0"), "root"),
        (altered("function", "\x1b[2Jx"), "function"),
        (altered("programs", {"\x1b": "a"}), "programs"),
        (altered("described", {"{}": {"digest": ["\u202e"]}}), "digest"),
        (altered("described", {"{}": {"unknown": 1}}), "cannot be read"),
        (altered("parts", [{"name": [0, 1]}]), "extension"),
        (altered("common", ["nobody"]), "common"),
        (output(name="../../x"), "output"),
        (output(name="/etc/x"), "output"),
        (output(name=".."), "output"),
        (output(name=""), "output"),
        (output(name="zarr.json"), "output"),
        (output(name="done"), "output"),
        (output(name="\x1b[31m"), "output"),
        (output(shape=[10**12], dims=["y"]), "shape"),
        (output(shape=[2**30], dims=["y"]), "chunks of"),
        (output(shape=[-1], dims=["y"]), "shape"),
        (output(dims=["size"], shape=[2]), "dims"),
        (output(dtype="object"), "dtype"),
        (output(dtype="S4000000000"), "dtype"),
        (output(dtype="datetime64"), "dtype"),
        (axis("names", ["../x"]), "names"),
        (axis("values", [["x" * 10**6], *([i] for i in range(400))]), "texts"),
        (axis("values", [[[1.0]]]), "value"),
        (axis("dim", "a/b"), "dim"),
        (axis("dim", "seed"), "dims"),
    ],
)
def test_what_a_manifest_says_is_bounded(change, named, store):
    manifest_with(store, change)
    with pytest.raises(StoreError, match=named):
        nm.sweeps.status(store)


def test_many_axes_of_few_values_are_not_more_cells_than_there_can_be(made):
    import dataclasses

    held = description_of(str(made)).manifest
    axes = tuple(
        dataclasses.replace(held.grid.axes[0], dim=f"a{i}", names=(f"a{i}",),
                            values=tuple((v,) for v in range(100)))
        for i in range(6)
    )  # fmt: skip
    grid = dataclasses.replace(held.grid, axes=axes, static=frozenset())
    with pytest.raises(ValueError, match=f"cells, and {MAX_CELLS:,} are the most; spread them"):
        check_manifest(dataclasses.replace(held, grid=grid, block=(1,) * 7))
    grid = dataclasses.replace(held.grid, seeds=tuple(range(MAX_BLOCKS)))
    one = dataclasses.replace(held, grid=grid, block=(1,) * 4)
    with pytest.raises(StoreError, match=r"cannot be made.*the most; choose a larger block"):
        create(str(made.with_name("never.zarr")), one, {})
    assert not made.with_name("never.zarr").exists()


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 10**5,
        b'{"attributes": {"negmaml_sweep": ' + b"[" * 10**5,
        b"1" * 5000,
        b'{"attributes": {"negmaml_sweep": "{}"}, "consolidated_metadata": {"metadata": NaN}}',
        b'{"attributes": {"negmaml_sweep": "[]"}, "consolidated_metadata": 1, "zarr_format": 3}',
        b'{"attributes": [], "consolidated_metadata": []}',
        b"\xff\xfe\x00",
        b"",
        b"null",
    ],
)
def test_what_is_no_json_of_ours_is_an_error_of_ours(text, store):
    (store / "zarr.json").write_bytes(text)
    with pytest.raises(StoreError):
        nm.sweeps.status(store)


OF_OTHER_TYPES = [{"wall_seconds": "x"}, {"history": 3}, {"history": ["\x1b"]}]


@pytest.mark.parametrize("attributes", OF_OTHER_TYPES)
def test_attributes_of_other_types_are_refused(attributes, store):
    edit(store, lambda held: held["attributes"].update(attributes))
    with pytest.raises(StoreError, match=next(iter(attributes))):
        again(store)


def with_checksum(data):
    return data + struct.pack("<I", google_crc32c.value(data))


@pytest.mark.parametrize("checksum", [True, False])
def test_a_chunk_unpacks_to_no_more_than_a_chunk(store, checksum):
    """The file is small, and its checksum right."""
    bomb = Zstd(level=19).encode(bytes(2**24))
    key = sorted(p for p in (store / "count" / "c").rglob("*") if p.is_file())[0]
    assert len(bomb) < 3000
    key.write_bytes(with_checksum(bomb) if checksum else bomb)
    relative = key.relative_to(store).as_posix()
    assert relative in nm.sweeps.status(store, check=True).lost
    layouts = description_of(str(store)).layouts
    with pytest.raises(StoreError, match=r"does not unpack|altered|bytes"):
        zarr_arrays(guarded(str(store), {"count": layouts["count"]}))["count"][...]
    np.testing.assert_array_equal(again(store)["count"], again(store.with_name("y"))["count"])


def test_a_huge_file_is_not_read(store):
    with open(store / "zarr.json", "r+b") as file:
        file.truncate(2**40)  # of nothing, which takes no place on the disk
    with pytest.raises(StoreError, match="larger than"):
        nm.sweeps.status(store)


LINKED = ["total", "total/c", "total/c/0", "zarr.json", "scale/zarr.json"]


@pytest.mark.parametrize("what", mostly_slow(LINKED, 2, 3))
def test_links_in_a_store_are_not_followed(what, store, tmp_path):
    outside = tmp_path / "outside"
    shutil.move(store / what, outside)
    (store / what).symlink_to(outside)
    files = {p: p.read_bytes() for p in [outside, *outside.rglob("*")] if p.is_file()}
    refused(store, "symbolic link")
    assert {p: p.read_bytes() for p in [outside, *outside.rglob("*")] if p.is_file()} == files


def test_a_pipe_in_a_store_does_not_hang(store):
    (store / "zarr.json").unlink()
    os.mkfifo(store / "zarr.json")
    with pytest.raises(StoreError, match="device"):
        nm.sweeps.status(store)


@pytest.mark.parametrize("name", [".x.zarr.writer", ".x.zarr.lock", ".x.zarr.workers",
                                  ".x.zarr.opening", ".x.zarr.damaged"])  # fmt: skip
def test_links_beside_a_store_are_not_followed(name, store, tmp_path):
    victim = tmp_path / "victim"
    if name in (".x.zarr.writer", ".x.zarr.lock"):
        victim.write_text("mine")
    else:
        victim.mkdir()
        (victim / "worker-1").write_text("mine")
    store.with_name(name).symlink_to(victim)
    for worker in (None, (1, 2)):
        try:
            again(store, worker=worker)
        except StoreError as error:
            assert "symbolic link" in str(error)
    kept = victim if victim.is_file() else victim / "worker-1"
    assert kept.read_text() == "mine"
    assert victim.is_file() or os.listdir(victim) == ["worker-1"]


WORKERS = {
    "worker-1": b"\xff\xfe\xfa",
    "worker-2": b"[1, 2]",
    "worker-3": b"1/2 | 3 | nan | x",
    "worker-4": b"1/2 | 3 | 1e400 | x",
    "worker-5": b"9" * 10**6,
    "worker-6": b"1/2 | 3 | 5.0 | \x1b[2J[/b]",
    "block-0.0.0.0-" + "9" * 200: b"",
}


def test_files_of_workers_are_ignored_unless_workers_wrote_them(store, capsys, monkeypatch):
    folder = store.with_name(".x.zarr.workers")
    folder.mkdir()
    for name, content in WORKERS.items():
        (folder / name).write_bytes(content)
    (folder / "worker-7").symlink_to("/etc/passwd")
    found = nm.sweeps.status(store)
    assert [worker.key for worker in found.workers] == ["worker-6"]
    assert cli.run(["status", str(store)]) == 0
    assert "\x1b[2J" not in capsys.readouterr().out + str(found)
    monkeypatch.setattr("negmaml.sweeps.lease.HEARTBEAT_S", 0.001)
    again(store)
    assert not folder.exists()


def test_errors_of_commands_hold_no_commands_of_the_terminal(store, capsys):
    edit(store, lambda held: held["attributes"].update(negmaml_sweep='{"format": "\\u001b[2J"}'))
    assert cli.run(["status", str(store)]) == 2
    assert "\x1b" not in capsys.readouterr().err
    assert one_line("a\x1b\u202eé\n") == r"a\x1b\u202eé\n"
