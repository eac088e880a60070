"""Every command and code block of the README works as written."""

import importlib.util
import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import dask_jobqueue
import numpy as np
import pytest
import xarray as xr

import negmaml as nm

README = (Path(__file__).parents[1] / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
TEXT = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
SLOW = "negmaml phases", "negmaml reproduce --figure nonlinear"  # thousands of runs; training
PROCESS = re.compile(r"\S*negmaml (reproduce|info)$")  # in a process of its own, which others spare


def commands_of(block):
    """The commands of the package itself, without the installation before them."""
    last = [line.split("&&")[-1].strip() for line in block.splitlines()]
    return [command for command in last if re.search(r"negmaml( |\.examples)", command)]


def cases():
    """The commands of each block, which may read what an earlier one wrote."""
    for commands in filter(None, map(commands_of, BLOCKS)):
        slow = [command for command in commands if command.startswith(SLOW)]
        rest = [command for command in commands if command not in slow]
        for some, marks in ((rest, ()), (slow, pytest.mark.slow)):
            if some:
                yield pytest.param(some, marks=marks, id=some[0])


def test_there_is_something_to_test():
    assert len(PYTHON) >= 4
    assert sum(len(commands_of(block)) for block in BLOCKS) >= 9


def test_code_blocks_run_in_order():
    exec(compile("\n".join(PYTHON), "README.md", "exec"), {"__name__": "readme"})


def run_in_a_process(module, arguments):
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_here(module, arguments, monkeypatch, capsys):
    """As `python -m` would, without the seconds of another import of everything."""
    module = f"{module}.__main__" if module == "negmaml" else module
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    try:
        runpy.run_path(importlib.util.find_spec(module).origin, run_name="__main__")
    except SystemExit as end:
        assert not end.code, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.mark.parametrize("commands", list(cases()))
def test_commands_run(commands, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in commands:
        program, *arguments = shlex.split(command)
        module = "negmaml"
        if not program.endswith("negmaml"):
            assert [program, arguments[0]] == ["python", "-m"]
            module, *arguments = arguments[1:]
        if PROCESS.match(command):
            assert run_in_a_process(module, arguments)
        else:
            assert run_here(module, arguments, monkeypatch, capsys)


GRID = {"p": 6, "m": 2, "n_t": 4, "n_v": 2, "n_r": 4, "sigma": [0.1, 0.5, 1.0], "nu": 0.5,
        "train_rate": [-0.3, 0.0], "adapt_rate": 0.2}  # fmt: skip


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
    (lines,) = (text for text in TEXT if "SLURM" in text)
    names = {"nm": nm, "dask_jobqueue": dask_jobqueue, "seeds": 4, "grid": GRID}
    names["function"] = nm.sweeps.linear
    try:
        exec(lines.replace("jobs=16", "jobs=2").replace("/shared", str(tmp_path)), names)
    finally:
        names["cluster"].close()
    assert (tmp_path / "jobs").read_text().splitlines() == ["#SBATCH --gres=gpu:1"] * 2
    stored, here = xr.open_zarr(tmp_path / "x.zarr"), nm.sweep(nm.sweeps.linear, GRID, 4)
    np.testing.assert_allclose(stored["test_loss"], here["test_loss"], rtol=1e-5)


def test_the_lines_for_a_worker_on_each_gpu_share_a_sweep(tmp_path):
    (lines,) = (text for text in TEXT if "CUDA_VISIBLE_DEVICES" in text)
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    lines = lines.replace("0 1 2 3", "0 1").replace("8786", port)
    lines = lines.replace("dask scheduler", f"dask scheduler --port {port} --no-dashboard")
    axes = "\n".join(f"{name} = {value}" for name, value in GRID.items())
    (tmp_path / "spec.toml").write_text(f'function = "linear"\nseeds = 4\n[grid]\n{axes}\n')
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
    (lines,) = (text for text in TEXT if "--array" in text)
    (merge,) = (text for text in TEXT if "negmaml merge" in text)
    axes = "\n".join(f"{name} = {value}" for name, value in GRID.items())
    (tmp_path / "spec.toml").write_text(f'function = "linear"\nseeds = 4\n[grid]\n{axes}\n')
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


def test_installation_commands_name_real_extras():
    import tomllib

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = {name for block in BLOCKS for name in re.findall(r"\.\[(\w+)\]", block)}
    assert extras == {"all", "test"}
    assert extras <= set(project["optional-dependencies"])
