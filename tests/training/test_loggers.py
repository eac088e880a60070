"""Loggers write each metric of each call once, also over a resumption."""

import csv
import sys
import types

import jax.numpy as jnp
import optax
import pytest

import negmaml as nm
from negmaml.training import loggers
from tests.training.tiny import ALGORITHM, KEY, PARAMS, TEST, tasks


def train(steps, callback, **options):
    return nm.fit(
        KEY, PARAMS, ALGORITHM, tasks, optax.adam(1e-2), steps, evaluate=both, evaluate_every=3,
        callback=callback, callback_every=2, **options,
    )  # fmt: skip


def both(params, data):
    return {"test": TEST(params, data), "pair": jnp.ones(2)}


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_csv_file_has_a_row_for_each_call(tmp_path):
    path = tmp_path / "new" / "a.csv"
    result = train(6, loggers.CSVLogger(path))
    found = rows(path)
    assert list(found[0]) == ["step", "gradient_norm", "loss", "wall_time", "evaluation/test"]
    assert [row["step"] for row in found] == ["2", "4", "6"]
    assert float(found[0]["loss"]) == pytest.approx(float(result.loss[:2].mean()), rel=1e-5)
    # The first evaluation is after three steps.
    assert found[0]["evaluation/test"] == ""
    last = float(found[2]["evaluation/test"])
    assert last == pytest.approx(float(result.evaluation["test"][1]), rel=1e-5)


def test_a_csv_file_is_continued_without_rows_twice(tmp_path):
    path = tmp_path / "a.csv"
    log = loggers.CSVLogger(path)
    for step in (2, 4, 6):
        log(step, {"loss": jnp.asarray(1.0 * step)}, None)
    # A run that resumes from a checkpoint at step 3.
    again = loggers.CSVLogger(path)
    for step in (4, 6, 8):
        again(step, {"loss": 10.0 * step, "more": {"a": 1}, "text": "x"}, None)
    found = rows(path)
    assert [(row["step"], float(row["loss"])) for row in found] == [
        ("2", 2.0), ("4", 40.0), ("6", 60.0), ("8", 80.0),
    ]  # fmt: skip
    assert [row["more/a"] for row in found] == ["", "1.0", "1.0", "1.0"]
    again(2, {"loss": 0.5}, None)  # a new run with the same logger
    assert [row["loss"] for row in rows(path)] == ["0.5"]


def test_another_file_is_not_overwritten(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"data\.csv' has no column"):
        loggers.CSVLogger(path)
    assert path.read_text() == "a,b\n1,2\n"


def test_a_directory_is_no_csv_file(tmp_path):
    with pytest.raises(ValueError, match=r"is a directory; add a name such as a\.csv"):
        loggers.CSVLogger(tmp_path)


@pytest.mark.parametrize("path", (3, None))
def test_a_path_is_a_path(path):
    with pytest.raises(TypeError, match="path must be a path"):
        loggers.CSVLogger(path)


class Recorder:
    def __init__(self, *given, **options):
        self.given, self.options, self.calls = given, options, []

    def add_scalar(self, name, value, step):
        self.calls.append((step, name, value))

    def log(self, values, step):
        self.calls.append((step, values))

    def flush(self):
        self.calls.append("flush")


def test_tensorboard_gets_scalars_and_replaces_what_a_resumed_run_wrote(tmp_path, monkeypatch):
    stand_in = types.SimpleNamespace(SummaryWriter=Recorder)
    monkeypatch.setitem(sys.modules, "tensorboardX", stand_in)
    log = loggers.TensorBoardLogger(tmp_path)
    for step in (5, 6):
        log(step, {"loss": 1.0, "evaluation": {"accuracy": 0.5}}, None)
    assert log.writer.given == (str(tmp_path),) and log.writer.options == {"purge_step": 5}
    assert log.writer.calls == [
        *[(5, "evaluation/accuracy", 0.5), (5, "loss", 1.0), "flush"],
        *[(6, "evaluation/accuracy", 0.5), (6, "loss", 1.0), "flush"],
    ]


def test_wandb_gets_the_options_and_the_metrics(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=Recorder))
    log = loggers.WandbLogger(project="maml")
    log(5, {"loss": 1.0, "aux": jnp.ones(3)}, None)
    assert log.run.options == {"project": "maml"} and log.run.calls == [(5, {"loss": 1.0})]


@pytest.mark.parametrize(
    ("make", "package"),
    ((lambda: loggers.TensorBoardLogger("x"), "tensorboardX"), (loggers.WandbLogger, "wandb")),
)
def test_a_package_that_is_not_installed_is_named_before_the_run(make, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}.*pip install"):
        make()
