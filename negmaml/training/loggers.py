"""Callbacks of `fit` that write its metrics to a CSV file, to TensorBoard or to Weights & Biases.

    fit(..., callback=CSVLogger("runs/a.csv"), callback_every=100)

Each writes the numbers among the metrics, by their paths: "loss", "gradient_norm", "wall_time",
"evaluation/accuracy". Only the first process of `jax.distributed` writes.
"""

import csv
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from negmaml._core.extras import require
from negmaml._core.paths import expanded


class MetricLogger:
    """A callback of `fit` whose `write` gets the number of the step, and the metrics by name."""

    def __call__(self, step: int, metrics: dict[str, Any], params: Any) -> None:
        """Write the numbers among the metrics."""
        if jax.process_index() == 0:
            self.write(step, _numbers(metrics))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write the values of a step."""
        raise NotImplementedError


class CSVLogger(MetricLogger):
    """Writes a row for each call to a CSV file, with the column "step" first.

    A file that is there is continued: rows from the first new step on are replaced, so that a run
    that resumes from a checkpoint leaves no row twice. Raises ValueError for another kind of file
    and for a directory.
    """

    def __init__(self, path):
        self.path = Path(expanded("path", path)).absolute()
        if self.path.is_dir():
            raise ValueError(
                f"path must be a file, {str(self.path)!r} is a directory; add a name such as a.csv"
            )
        self._rows()  # raises for another kind of file, before the run starts
        self.columns: list[str] = []
        self.last_step = -1

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append a row."""
        row = {"step": step, **values}
        if step <= self.last_step or not set(row) <= set(self.columns):
            self._begin(step, row)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)
        self.last_step = step

    def _begin(self, step: int, row: dict[str, Any]) -> None:
        """Write the file again, with the rows before a step and the columns of a new row."""
        earlier = [old for old in self._rows() if int(old["step"]) < step]
        self.columns = list(dict.fromkeys([key for one in (*earlier[:1], row) for key in one]))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # The file is replaced as a whole, so that an interruption loses no row.
        new = self.path.with_name(f".{self.path.name}.new")
        with new.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(earlier)
        os.replace(new, self.path)

    def _rows(self) -> list[dict[str, Any]]:
        """Return the rows of the file, none if it does not exist."""
        if not self.path.exists() or not self.path.stat().st_size:
            return []
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            if "step" not in (reader.fieldnames or ()):
                raise ValueError(
                    f"path must be a new file or one of CSVLogger, {str(self.path)!r} has no "
                    'column "step"; nothing was changed'
                )
            return list(reader)


class TensorBoardLogger(MetricLogger):
    """Writes scalars for TensorBoard to a directory, by tensorboardX.

    A run that resumes replaces the values from its first new step on. Needs tensorboardX: pip
    install "negmaml[tensorboard]".
    """

    def __init__(self, directory):
        require("tensorboardX", "tensorboard")  # before the run, which compiles first
        self.directory = str(Path(expanded("directory", directory)).absolute())
        self.writer: Any = None

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add the values as scalars."""
        if self.writer is None:
            module = require("tensorboardX", "tensorboard")
            self.writer = module.SummaryWriter(self.directory, purge_step=step)
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()


class WandbLogger(MetricLogger):
    """Logs to Weights & Biases: `WandbLogger(project="maml", id="a", resume="allow")`.

    The options are those of `wandb.init`, which is called with the first metrics; the run is the
    attribute `run`. Needs wandb: pip install "negmaml[wandb]".
    """

    def __init__(self, **options):
        require("wandb", "wandb")  # before the run, which compiles first
        self.options, self.run = options, None

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log the values."""
        if self.run is None:
            self.run = require("wandb", "wandb").init(**self.options)
        self.run.log(values, step=step)  # type: ignore[attr-defined]


def _numbers(metrics) -> dict[str, float]:
    """Return the numbers of a tree by their paths."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): float(np.asarray(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(metrics)
        if np.size(leaf) == 1 and np.ndim(leaf) == 0 and np.asarray(leaf).dtype.kind in "biuf"
    }
