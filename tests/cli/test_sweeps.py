"""The commands sweep, heatmap and curves."""

import numpy as np
import pytest
import xarray as xr

from tests.internals import main as cli
from tests.internals import summary
from tests.sweeps.read_only import read_only

SPEC = """
function = "linear"
seeds = 6
[grid]
p = 6
m = [2, 4, 6]
n_t = 3
n_v = 2
n_r = 3
sigma = 1.0
nu = 0.5
train_rate = { start = -0.5, stop = 0.5, num = 5 }
adapt_rate = 0.2
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spec.toml").write_text(SPEC)
    return tmp_path


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs")
    (path / "spec.toml").write_text(SPEC)
    store = path / "x.zarr"
    assert cli.run(["sweep", str(path / "spec.toml"), "--store", str(store)]) == 0
    return store


def test_sweep_stores_summarises_and_goes_on(stored, capsys):
    arguments = ["sweep", str(stored.with_name("spec.toml")), "--store", str(stored)]
    assert cli.run(arguments) == 0
    printed = capsys.readouterr().out
    for text in ("cells done", "18 of 18", "not finite", "test_loss"):
        assert text in printed
    assert cli.run([*arguments, "--override", "seeds=8"]) == 2
    assert "--extend" in capsys.readouterr().err
    with xr.open_zarr(stored) as dataset:
        np.testing.assert_allclose(dataset["train_rate"], [-0.5, -0.25, 0, 0.25, 0.5])


def test_workers_share_a_store_and_status_says_how_far_it_is(folder, stored, capsys, monkeypatch):
    command = ["sweep", "spec.toml", "--store", "x.zarr", "--worker"]
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "4")
    assert cli.run([*command, "slurm"]) == 0
    assert cli.run([*command, "1/2"]) == 0
    assert "18 of 18" in capsys.readouterr().out
    with xr.open_zarr("x.zarr") as found, xr.open_zarr(stored) as expected:
        np.testing.assert_array_equal(found["test_loss"], expected["test_loss"])
    assert cli.run(["status", "x.zarr"]) == 0
    printed = capsys.readouterr().out
    for text in ("18 of 18 (100.0%)", "blocks done", "blocks claimed", "workers"):
        assert text in printed
    assert cli.run(["merge", "x.zarr", str(stored), "--store", "m.zarr"]) == 0
    assert "18 of 18" in capsys.readouterr().out


def test_a_dry_run_computes_and_stores_nothing(folder, capsys):
    assert cli.run(["sweep", "spec.toml", "--dry-run", "--override", "grid.m=[2, 4]"]) == 0
    printed = capsys.readouterr().out
    for text in ("12 (m 2 x seed 6)", "shape groups", "blocks", "MiB", "estimated time"):
        assert text in printed
    assert [path.name for path in folder.iterdir()] == ["spec.toml"]


def test_heat_maps_and_curves_are_drawn(stored, tmp_path, capsys):
    out = tmp_path / "map"
    arguments = [str(stored), "--out", str(out)]
    assert cli.run(["heatmap", *arguments, "--x", "train_rate", "--y", "n_v*m/p"]) == 0
    assert out.with_suffix(".png").stat().st_size > 5000
    assert cli.run(["curves", *arguments, "--x", "train_rate", "--hue", "m"]) == 0
    assert "m = 4" in out.with_suffix(".svg").read_text()


def test_the_only_variable_is_drawn_unless_another_is_asked_for():
    one, two = (
        xr.Dataset({"a": 1.0, "completed": 1, "finite": True}),
        xr.Dataset({"a": 1.0, "b": 2.0}),
    )
    assert summary.variable(one, None) == "a"
    assert summary.variable(two, "b") == "b"
    assert summary.variable(two.assign(test_loss=1.0), None) == "test_loss"
    with pytest.raises(ValueError, match=r"which variable.*\['a', 'b'\]"):
        summary.variable(two, None)


def test_best_is_where_the_mean_is_least():
    x = np.array([-1.0, 0.0, 1.0])
    loss = (x[:, None] - np.array([-1.0, 1.0])) ** 2
    dataset = xr.Dataset(
        {"loss": (("x", "y", "seed"), np.stack([loss, loss + 2], -1)),
         "finite": (("x", "y", "seed"), np.ones((3, 2, 2), bool))}, {"x": x, "y": [1, 2]},
    )  # fmt: skip
    means, errors = summary.mean(dataset, "loss", ["x", "y"])
    np.testing.assert_allclose(means, loss + 1)
    np.testing.assert_allclose(errors, 1.0)
    assert summary.argmin(means, "x").values.tolist() == [-1.0, 1.0]
    dataset["finite"][0, 0, 0] = False
    means, _ = summary.mean(dataset, "loss", ["x", "y"])
    assert float(means[0, 0]) == loss[0, 0] + 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["sweep", "no.toml", "--store", "x"], "no spec file 'no.toml'"),
        (["sweep", "spec.toml"], "--store"),
        (["sweep", "spec.toml", "--store", "x", "--override", "sedes=3"], "did you mean 'seeds'"),
        (
            ["sweep", "spec.toml", "--store", "x", "--override", "grid.sigam=3"],
            "did you mean 'sigma'",
        ),
        (["sweep", "spec.toml", "--store", "x", "--override", "seeds"], "key=value"),
        (["sweep", "spec.toml", "--store", "x", "--override", "grid.m=[2,4"], "no valid TOML"),
        (["sweep", "spec.toml", "--store", "x", "--override", "grid.m='2"], "no valid TOML"),
        (["sweep", "spec.toml", "--store", "x", "--override", "function=lin"], "module:function"),
        (["sweep", "spec.toml", "--store", "x", "--override", "dtype=float16"], "dtype"),
        (["sweep", "spec.toml", "--store", "x", "--override", "grid.p={start=1}"], "range"),
        (["sweep", "spec.toml", "--store", "x", "--override", "options.evalution=1"], "evaluation"),
        (["sweep", "bad.toml", "--store", "x"], "not valid TOML"),
        (["sweep", "spec.toml", "--store", "x", "--scheduler", "tcp://127.0.0.1:9"], "scheduler"),
        (["sweep", "spec.toml", "--store", "x", "--worker", "3"], "--worker takes k/n"),
        (["sweep", "spec.toml", "--store", "x", "--worker", "0/3"], "k from 1 to n"),
        (["sweep", "spec.toml", "--store", "x", "--worker", "slurm"], "array job"),
        (["sweep", "broken.toml", "--store", "x"], "line 2 of "),
        (["status", "none.zarr"], "no store at"),
        (["merge", "none.zarr", "--store", "x"], "no store at"),
        (["merge", "--store", "x"], "merge takes the stores"),
        (["heatmap", "none.zarr", "--x", "m", "--y", "p"], "no store at"),
    ],
)
def test_bad_input_is_one_clear_line_and_makes_no_store(arguments, named, folder, capsys):
    (folder / "bad.toml").write_text("seeds = ")
    (folder / "broken_study.py").write_text("def f(key, a):\n    return {'b': a @ a}\n")
    spec = 'function = "broken_study:f"\nseeds = 2\n[grid]\na = 2.0\n'
    (folder / "broken.toml").write_text(spec)
    assert cli.run(arguments) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
    assert not (folder / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["heatmap", "--x", "train_rate", "--y", "mm"], "did you mean 'm'"),
        (["heatmap", "--x", "m", "--y", "m*p"], "same axis"),
        (["curves", "--x", "m"], "--select train_rate"),
        (["curves", "--x", "m", "--select", "train_rate=0.3"], "no value 0.3"),
        (["curves", "--x", "m", "--select", "train_rate=[/b]"], "holds numbers, got '[/b]'"),
        (["curves", "--x", "m+p"], "joined by"),
        (["curves", "--x", "p"], "no dim"),
        (["curves", "--x", "m", "--value", "test_los"], "did you mean 'test_loss'"),
    ],
)
def test_bad_drawings_are_one_clear_line(arguments, named, stored, capsys):
    assert cli.run([arguments[0], str(stored), *arguments[1:]]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1


def test_interruption_says_how_to_go_on(folder, capsys, monkeypatch):
    from tests.internals import Runner

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "compute", stop)
    assert cli.run(["sweep", "spec.toml", "--store", "x.zarr"]) == 130
    assert "the same call resumes" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert cli.run(["sweep", "spec.toml", "--store", "x.zarr"]) == 0


def test_pictures_go_beside_the_store_or_where_they_can_be_written(stored, tmp_path, capsys):
    link = tmp_path / "link.zarr"
    link.symlink_to(stored)
    drawing = ["curves", str(link), "--x", "train_rate", "--hue", "m"]
    assert cli.run(drawing) == 0
    assert (tmp_path / "link-curves.png").exists()
    with read_only(tmp_path):
        assert cli.run(drawing) == 2
    assert "--out must be a folder that can be written" in capsys.readouterr().err
