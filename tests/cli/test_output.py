"""Output of commands: JSON, logs, pipes, terminals and signals."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr

import negmaml as nm
from tests.internals import main as cli
from tests.internals import output, paper

START = [sys.executable, "-m", "negmaml"]
SPEC = """
function = "linear"
seeds = 4
[grid]
p = 6
m = [2, 4]
n_t = 3
n_v = 2
n_r = 3
sigma = 1.0
nu = 0.5
train_rate = [-0.4, 0.0]
adapt_rate = 0.2
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a spec and its store."""
    folder = tmp_path_factory.mktemp("sweeps")
    (folder / "spec.toml").write_text(SPEC)
    assert cli.run(["sweep", f"{folder}/spec.toml", "--store", f"{folder}/new/x.zarr"]) == 0
    return folder


PROBLEM = [
    "--p",
    "20",
    "--m",
    "2",
    "--n-t",
    "10",
    "--n-v",
    "2",
    "--n-r",
    "5",
    "--train-rate",
    "-.3",
]
COMMANDS = [
    (["predict", *PROBLEM], ("best_train_rate", "problem")),
    pytest.param(
        ["verify", *PROBLEM, "--runs", "20"], ("agrees", "methods"), marks=pytest.mark.slow
    ),
    (["info"], ("jax",)),
    (["sweep", "{}/spec.toml", "--dry-run"], ("cells", "sizes", "outputs")),
    (["sweep", "{}/spec.toml", "--store", "{}/new/x.zarr"], ("store", "cells_done", "variables")),
    (["status", "{}/new/x.zarr", "--check"], ("cells_done", "lost", "workers")),
    (["merge", "{}/new/x.zarr", "--store", "{}/merged.zarr"], ("cells_done", "variables")),
    (["curves", "{}/new/x.zarr", "--x", "m", "--select", "train_rate=-0.4"], ("files",)),
    (["heatmap", "{}/new/x.zarr", "--x", "m", "--y", "train_rate"], ("files",)),
]


@pytest.mark.parametrize(("command", "names"), COMMANDS, ids=lambda x: x[0])
def test_json_is_one_document_and_quiet_has_results_only(command, names, folder, capsys):
    arguments = [part.format(folder) for part in command]
    capsys.readouterr()
    assert cli.run([*arguments, "--json"]) in (0, 1)
    out, err = capsys.readouterr()
    assert set(names) <= set(json.loads(out)) and not err
    assert cli.run([*arguments, "--quiet"]) in (0, 1)
    out, err = capsys.readouterr()
    assert "wrote" not in out and not err
    assert bool(out) == (command[0] not in ("curves", "heatmap"))


PANEL = SimpleNamespace(theory=np.ones(2), mean=np.ones(2), found=np.nan, found_error=0.01,
                        predicted=0.1)  # fmt: skip


def test_json_of_figures_has_their_numbers_and_files(tmp_path, capsys, monkeypatch):
    """The computations are replaced by constants."""
    from tests.internals import figures, gain_map, netcdf, plotting
    from tests.internals import paper_phases as phases

    maps = {f"{what}_{name}": (("ridge",), np.zeros(2))
            for what in ("over_zero", "over_same") for name in ("noise", "data")}  # fmt: skip
    nothing = {name: ((), np.zeros(())) for name in ("best_by_data", "best_by_noise")}
    monkeypatch.setattr(paper, "experiments", lambda *_: [("over", {"a": PANEL, "b": PANEL})])
    monkeypatch.setattr(paper, "PROBLEMS", {"over": nm.MixedLinearRegression(4, 2, 3, 2, 3, 1, 1)})
    monkeypatch.setattr(paper, "_write", lambda _, out, *__: [out / "reproduction.nc"])
    monkeypatch.setattr(phases, "contents", lambda *_: (nothing, {}))
    dataset = xr.Dataset(maps, {"ridge": ["none", "best"]})
    monkeypatch.setattr(gain_map, "payoff", lambda *_: dataset)
    monkeypatch.setattr(netcdf, "write", lambda path, *_: path.touch())
    monkeypatch.setattr(plotting, "save", lambda *_: [])
    for drawing in ("phases", "payoff"):
        monkeypatch.setattr(figures, drawing, lambda *_: None)
    found = {}
    for command in ("reproduce", "phases", "gain-map"):
        assert cli.run([command, "--json", "--out", f"{tmp_path}/{command}/deep"]) == 0
        found[command] = json.loads(capsys.readouterr().out)
        assert found[command]["files"][0].endswith(".nc")
    assert found["reproduce"]["best_rates"][0]["found"] is None  # NaN
    assert found["phases"]["share_of_negative_best_rates"]["best_by_data"] == 0.0
    assert len(found["gain-map"]["share_that_gains_over_1_percent"]) == 4


def test_json_holds_no_number_that_json_does_not_have():
    text = output.json_text({"a": np.array([1.0, np.inf]), "b": float("nan"), 3: (True, None)})
    assert json.loads(text) == {"a": [1.0, None], "b": None, "3": [True, None]}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_every_encoding_takes_the_output(encoding, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    output.say("0.3 ± 0.1, Zürich 大")
    stream.flush()
    said = stream.buffer.getvalue().decode(encoding)
    assert said.startswith("0.3 +/- 0.1" if encoding == "ascii" else "0.3 ")


def test_tables_have_no_boxes_and_are_never_cut(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    output.print_table(("name", "value"), [("x" * 60, "1" * 60)], "title")
    out = capsys.readouterr().out
    assert "x" * 60 + "  " + "1" * 60 in out and out.isascii()


def test_help_has_an_example_and_fits_a_narrow_terminal(capsys):
    for command in cli.COMMANDS:
        assert cli.run([command, "--help"]) == 0
        out = capsys.readouterr().out
        assert f"example:\n  negmaml {command} {cli.EXAMPLES[command]}" in out
        assert max(map(len, out.splitlines())) <= 90 and out.isascii()
        assert "{None}" not in out and "--json" in out


def test_a_closed_pipe_ends_a_command_silently():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*START, "info"], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_terminated_sweep_says_how_to_resume(folder, monkeypatch, capsys):
    from tests.internals import Runner

    def stop(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(9)

    monkeypatch.setattr(Runner, "compute", stop)
    command = ["sweep", f"{folder}/spec.toml", "--store", f"{folder}/y.zarr"]
    with cli.terminated_as_interrupt():
        assert cli.run(command) == 143
    error = capsys.readouterr().err
    assert error.startswith("negmaml: terminated; finished blocks are in")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_an_example_without_its_extra_names_it():
    code = (
        "import sys; sys.modules['equinox'] = None; sys.argv = ['-m']; import runpy;"
        "runpy.run_module('negmaml.examples.equinox_model', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = "equinox is needed here and not installed; pip install 'negmaml[examples]'\n"
    assert done.returncode == 1 and done.stderr == said


def test_negative_numbers_are_values_of_options(capsys):
    for text, value in (("-0.4", -0.4), ("-.4", -0.4), ("-4e-1", -0.4), ("-1", -1.0)):
        assert cli.run(["predict", "--train-rate", text, f"--w0={text}", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["train_rate"], found["problem"]["w0"]) == (value, value)
