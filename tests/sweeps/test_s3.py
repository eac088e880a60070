"""Stores and their locks on S3, which a server of moto imitates."""

import numpy as np
import pytest
import xarray as xr

import negmaml as nm
from negmaml.sweeps import StoreError
from tests.internals import lease
from tests.sweeps.script import GRID, SEEDS, function
from tests.sweeps.test_lock import holders
from tests.sweeps.test_worker import together

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bucket():
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patched.setenv("AWS_DEFAULT_REGION", "us-east-1")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patched.setenv(name, "of-the-imitation")
        import s3fs

        s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
        yield "s3://bucket"
    server.stop()


def test_a_sweep_is_stored_extended_and_read(bucket):
    url, longer = f"{bucket}/x.zarr", GRID | {"scale": [-1.0, 0.0, 0.25, 0.5, 2.0]}
    nm.sweep(function, GRID, SEEDS, store=url, block=6)
    result = nm.sweep(function, longer, SEEDS, store=url, extend=True)
    expected = nm.sweep(function, longer, SEEDS)
    np.testing.assert_allclose(result["total"], expected["total"], rtol=1e-5)
    with xr.open_zarr(url) as plain:
        assert plain["completed"].all()
        assert plain.sizes["scale"] == 5


def test_what_is_not_ours_stays(bucket):
    import s3fs

    s3fs.S3FileSystem().pipe_file("bucket/mine/data", b"mine")
    with pytest.raises(StoreError, match="no zarr store"):
        nm.sweep(function, GRID, SEEDS, store=f"{bucket}/mine")
    assert s3fs.S3FileSystem().cat_file("bucket/mine/data") == b"mine"


def test_workers_share_a_store_and_stores_are_merged(bucket):
    parts = [
        lambda k=k: nm.sweep(
            function, GRID, SEEDS, store=f"{bucket}/s.zarr", block=3, worker=(k, 3)
        )
        for k in (1, 2, 3)
    ]
    assert not together(parts)
    expected = nm.sweep(function, GRID, SEEDS)
    for url in (f"{bucket}/s.zarr", f"{bucket}/m.zarr"):
        found = xr.open_zarr(url).load()
        xr.testing.assert_identical(
            found.drop_vars("completed").drop_attrs(), expected.drop_attrs()
        )
        nm.sweeps.merge([url], f"{bucket}/m.zarr") if url.endswith("s.zarr") else None
    assert nm.sweeps.status(f"{bucket}/s.zarr").cells_done == expected["finite"].size


@pytest.mark.parametrize("before", ["", "process 1 on another, beat 3", "free"])
def test_of_many_that_come_at_once_one_gets_the_lock(bucket, before, monkeypatch):
    import s3fs

    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.2)
    url = f"{bucket}/{before[:4] or 'none'}.zarr"
    if before:
        s3fs.S3FileSystem().pipe_file(f"{url}.lock/00000007", before.encode())
    assert holders(url, 4) == (1, 3)
