"""Calls of `negmaml.paper`, and command lines."""

import numpy as np

import negmaml as nm
from tests.calls.form import Wrong, wrong
from tests.calls.problem import GIVEN, KEY, KEYS, ONE, PROBLEM, PROBLEMS, RULES, TWO
from tests.calls.rules import COUNTS
from tests.internals import nonlinear, reproduce
from tests.internals import paper_phases as phases

BATCH = nm.GradientDescent(np.array([0.1, 0.2]))
VERIFIED = {"problem": PROBLEM, "train": ONE, "adapt": TWO, "key": KEY, "runs": 2}


def experiments(**arguments):
    """The first of the paper's figures."""
    return next(reproduce.experiments(**arguments))


def runs(**arguments):
    """The first run of the nonlinear problem."""
    return next(nonlinear.runs(**arguments))


WRONG = [
    *wrong(nm.verify, VERIFIED, problem=PROBLEMS, train=(*RULES, BATCH), adapt=(*RULES, BATCH),
           key=[key for key in KEYS if key is not None], runs=(*COUNTS, 1)),
    Wrong(nm.verify, VERIFIED | {"problem": nm.MixedLinearRegression(**GIVEN | {"p": 8})},
          "p = n_v m"),
    Wrong(nm.verify, VERIFIED | {"train": BATCH}, "train must have one scalar"),
    Wrong(nm.verify, VERIFIED | {"adapt": BATCH}, "adapt must have one scalar"),
    *wrong(experiments, {"names": ["overparameterized"], "key": KEY}, key=KEYS,
           names=(["over"], [3], "overparameterized", None, []), runs=(*COUNTS, 19),
           evaluation=("exact", None)),
    *wrong(phases.phases, {"key": KEY}, key=KEYS, runs=(*COUNTS, 1)),
    *wrong(runs, {"key": KEY}, key=KEYS, runs=(*COUNTS, 1), config=(3, None, "small")),
]  # fmt: skip
RIGHT = []
COMMANDS = {
    "predict --p 0": "p must be an integer of at least 1, got 0",
    "predict --p 2.5": "p",
    "predict --sigma -1": "sigma must be at least 0",
    "predict --nu nan": "nu must be finite",
    "predict --train-rate nan": "rate must be finite",
    "predict --adapt-rate inf": "rate must be finite",
    "predict --spectrum flat": "flat",
    "predict --spectrum.level -1 --spectrum spikes": "level must be at least 0",
    "predict --p 8 --n-v 4 --m 2": "p = n_v m = 8: without meta_ridge",
    "predicts": "predicts",
    "verify --runs 1": "runs must be at least 2",
    "verify --steps 0": "steps must be an integer of at least 1",
    "verify --p 6": "p = n_v m = 6",
    "verify --seed x": "seed",
    "reproduce --runs 3 --out {path}/r": "runs must be at least 20",
    "reproduce --figure none": "none",
    "reproduce --out {file}/r": "--out must be a folder that can be written",
    "phases --runs 0 --out {path}/p": "runs must be",
    "advise nothing.csv --group g --target y --out {path}/a": "data must be a CSV or Parquet file",
    "sweep nothing.toml": "nothing.toml",
    "sweep phase_map": "--store must say where the result goes",
    "sweep phase_map --dry-run --override grid.p=0": "p must be an integer of at least 1",
    "sweep phase_map --dry-run --override grid.q=1": "q",
    "sweep phase_map --store {path}/s --block 0": "block must be an integer of at least 1",
    "sweep phase_map --store nowhere://x": "no file system 'nowhere'",
    "heatmap {path}/none.zarr --x p --y m": "none.zarr",
    "curves {path}/none.zarr --x p --select p": "none.zarr",
}
