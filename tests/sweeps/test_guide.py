"""The blocks of the guide to clusters run: on eight devices, as SLURM jobs, as Dask workers."""

import os
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import dask_jobqueue
import numpy as np
import pytest
import xarray as xr

import negmaml as nm
from tests.documents import ROOT, blocks
from tests.helpers import python

GUIDE = ROOT / "negmaml/sweeps/clusters.md"
TEXT = blocks(GUIDE, "text")
SPEC, SEARCH = blocks(GUIDE.with_name("spec.md"), "toml")
EIGHT = 'import jax\njax.config.update("jax_num_cpu_devices", 8)\n'
GRID = tomllib.loads(SPEC)["grid"]


def test_code_blocks_run_in_order_on_eight_devices(tmp_path):
    code = blocks(GUIDE, "python")
    assert len(code) >= 3
    there = f"import os\nos.chdir({str(tmp_path)!r})\n"
    check = (
        "assert len(gpus) == 8 and params.shape == (16, 3) and simulation.test_loss.size == 5000"
    )
    process = python("\n".join((EIGHT, there, *code, check)))
    error = process.communicate()[1]
    assert process.returncode == 0, error


def test_the_random_search_is_the_spec_of_the_package():
    there = (ROOT / "negmaml/examples/training_sweep.toml").read_text()
    assert tomllib.loads(SEARCH) == tomllib.loads(there)


def program(folder, name, text):
    """A shell program on a path of our own."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.filterwarnings("ignore:Port 8787")  # of a dashboard: other tests may have it
def test_the_lines_for_slurm_run_workers_as_its_jobs(tmp_path, monkeypatch):
    """Stand-ins for the programs of SLURM start the jobs that they are given, here."""
    (tmp_path / "bin").mkdir()
    start = 'copy=$(mktemp); cat "$1" > $copy; bash $copy > /dev/null 2>&1 & echo "batch job $!"'
    program(tmp_path / "bin", "sbatch", f'grep gres "$1" >> {tmp_path}/jobs; {start}')
    program(tmp_path / "bin", "scancel", "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    (lines,) = (text for text in TEXT if "dask_jobqueue" in text)
    names = {"nm": nm, "dask_jobqueue": dask_jobqueue, "seeds": 4, "grid": GRID}
    names["function"] = nm.sweeps.linear
    try:
        exec(lines.replace("jobs=16", "jobs=2").replace("/shared", str(tmp_path)), names)
    finally:
        names["cluster"].close()
    assert (tmp_path / "jobs").read_text().splitlines() == ["#SBATCH --gres=gpu:1"] * 2
    stored, here = xr.open_zarr(tmp_path / "x.zarr"), nm.sweep(nm.sweeps.linear, GRID, 4)
    np.testing.assert_allclose(stored["test_loss"], here["test_loss"], rtol=1e-5)


@pytest.mark.slow  # workers as those of the SLURM jobs above
def test_the_lines_for_a_worker_on_each_gpu_share_a_sweep(tmp_path):
    (lines,) = (text for text in TEXT if "CUDA_VISIBLE_DEVICES" in text)
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    lines = lines.replace("0 1 2 3", "0 1").replace("8786", port)
    lines = lines.replace("dask scheduler", f"dask scheduler --port {port} --no-dashboard")
    (tmp_path / "spec.toml").write_text(SPEC)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", f"trap 'kill $(jobs -p)' EXIT\n{lines}"],
        cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    stored, here = xr.open_zarr(tmp_path / "x.zarr"), nm.sweep(nm.sweeps.linear, GRID, 4)
    np.testing.assert_allclose(stored["test_loss"], here["test_loss"], rtol=1e-5)


@pytest.mark.slow
def test_the_lines_of_an_array_job_share_a_sweep_and_stores_are_merged(tmp_path):
    (lines,) = (text for text in TEXT if "--array=1-16" in text)
    (merge,) = (text for text in TEXT if "negmaml merge" in text)
    (tmp_path / "spec.toml").write_text(SPEC)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    jobs = []
    for task in (1, 2, 3):
        asked = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": "3", "PATH": path}
        script = lines.replace("/shared/x", "a").replace("sweep ", "sweep --block 2 ")
        jobs.append(subprocess.Popen(["bash", "-c", script], cwd=tmp_path, env=os.environ | asked))
    assert [job.wait(timeout=120) for job in jobs] == [0, 0, 0]
    more = "negmaml sweep spec.toml --override seeds=[4,5] --store b.zarr"
    subprocess.run(["bash", "-c", f"{more}\n{merge}"], cwd=tmp_path, check=True,
                   env=os.environ | {"PATH": path})  # fmt: skip
    stored, here = xr.open_zarr(tmp_path / "x.zarr"), nm.sweep(nm.sweeps.linear, GRID, 6)
    np.testing.assert_allclose(stored["test_loss"], here["test_loss"], rtol=1e-5)
