"""Reading a finished or running sweep: means over seeds, best values along an axis, a summary."""

import ast
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from negmaml._core.checks import did_you_mean
from negmaml.sweeps.dataset import dataset_of
from negmaml.sweeps.description import description_of
from negmaml.sweeps.lost import found_in
from negmaml.sweeps.reduce import statistics_of
from negmaml.sweeps.runner import host_memory
from negmaml.sweeps.storage import check_url

OPERATORS = {ast.Mult: operator.mul, ast.Div: operator.truediv}


def load(url: str):
    """The dataset of a store with `completed`; works while a sweep writes it."""
    url = check_url(url)
    held = description_of(url)
    return statistics_of(dataset_of(url, held, found_in(url, held).levels()), held.manifest)


def select(dataset, chosen: Mapping[str, str]):
    """The dataset at the chosen values, up to rounding; errors list the valid values."""
    for name, text in chosen.items():
        if name not in dataset.dims:
            raise ValueError(
                f"--select: no axis {name!r}{did_you_mean(name, map(str, dataset.dims))}"
            )
        values = dataset[name].values
        if values.dtype.kind in "US" or values.dtype == object:
            at = np.flatnonzero(values == text)
        else:
            try:
                number = float(text)
            except ValueError as error:
                raise ValueError(f"--select: axis {name!r} holds numbers, got {text!r}") from error
            at = np.flatnonzero(np.isclose(values.astype(float), number))
        if not at.size:
            raise ValueError(f"--select: axis {name!r} has no value {text}; it has {values}")
        dataset = dataset.isel({name: int(at[0])})
    return dataset


def variable(dataset, asked: str | None) -> str:
    """The requested variable; by default the only one, or test_loss."""
    names = [str(name) for name in dataset.data_vars if name not in ("completed", "finite")]
    # A sweep that reduced over seeds has the statistics of an output in place of the output.
    if "seed" not in dataset.dims:
        means = [name for name in names if name.endswith("_mean")]
        asked = next((name for name in means if name == f"{asked or 'test_loss'}_mean"), asked)
        if asked is None and len(means) == 1:
            return means[0]
    if asked is None and (len(names) == 1 or "test_loss" in names):
        return names[0] if len(names) == 1 else "test_loss"
    if asked is None:
        raise ValueError(f"--value must say which variable to draw; there are {names}")
    if asked not in names:
        raise ValueError(
            f"--value: no variable {asked!r}{did_you_mean(asked, names)}; there are {names}"
        )
    return asked


def mean(dataset, name: str, keep: Sequence[str]):
    """(mean, standard error) of a variable over seeds, from finite and complete cells.

    A statistic over seeds is returned as it is, with the standard error that belongs to a mean.

    Raises ValueError if a dim besides `keep` is left.
    """
    if dataset[name].dtype.kind == "c":
        raise ValueError(f"{name} is complex; store its real part or modulus to have a mean drawn")
    reduced = "seed" not in dataset.dims
    # A statistic leaves out values that are not finite itself.
    valid = dataset["finite"] | reduced
    if "completed" in dataset:
        valid &= dataset["completed"] > 0
    _check_fits(dataset[name])
    values = dataset[name].astype(float).where(valid)
    if extra := [d for d in values.dims if d not in keep and d != "seed"]:
        raise ValueError(f"choose a value of {', '.join(extra)} with --select {extra[0]}=...")
    if lacking := [d for d in keep if d not in values.dims]:
        raise ValueError(f"{name} does not vary over {', '.join(lacking)}")
    if reduced:
        errors = dataset.get(f"{name.removesuffix('mean')}sem")
        return values, values * np.nan if errors is None else errors.astype(float).where(valid)
    count = values.notnull().sum("seed")
    # xarray's deviation divides by n. Over sqrt(n - 1) it is the standard error, s / sqrt(n).
    with np.errstate(invalid="ignore", divide="ignore"):
        return values.mean("seed"), values.std("seed") / np.sqrt(np.maximum(count - 1, 1))


def _check_fits(array) -> None:
    """Raise for a variable that would take more than half of this machine's memory."""
    # The values in float64, and once more for the mask.
    needed = 2 * 8 * array.size
    if needed > host_memory() / 2:
        raise ValueError(
            f"{array.name} has {array.size:,} values, which take {needed / 2**30:,.0f} GiB; choose "
            "a part of them with --select"
        )


def argmin(values, axis: str):
    """The value of an axis at which the values are least; NaN without any value."""
    # Infinity stands for missing values; slices without any value are masked afterwards.
    found = values.fillna(np.inf).idxmin(axis)
    return found.where(values.notnull().any(axis))


def quantity(dataset, expression: str):
    """A coordinate, or a product or quotient of coordinates such as n_v*m/p, over one dim."""

    # Evaluated from the syntax tree, so that no text of the user runs as code.
    def value(node):
        if isinstance(node, ast.Name):
            if node.id not in dataset.coords:
                raise ValueError(
                    f"no coordinate {node.id!r}{did_you_mean(node.id, map(str, dataset.coords))}"
                )
            return dataset[node.id].astype(float)
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        raise ValueError(f"{expression!r} must be names joined by * and /")

    try:
        found = value(ast.parse(expression, mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"{expression!r} must be names joined by * and /") from error
    # A plot needs one coordinate value per position of an axis.
    if len(found.dims) != 1:
        raise ValueError(f"{expression} varies along {found.dims or 'no dim'}, it has to be one")
    return found


def rows(dataset) -> list[tuple[str, str]]:
    """A summary as (name, text): complete and non-finite cells, and the range of variables."""
    known = record(dataset)
    done, diverged = known["cells_done"], known["not_finite"]
    found = [
        ("cells done", f"{done:,} of {known['cells']:,}"),
        ("not finite", f"{diverged:,} ({diverged / max(1, done):.2%})"),
    ]
    for name, about in known["variables"].items():
        kind = dataset[name].dtype.kind
        over_seeds = ", mean over seeds" if "seed" in dataset.dims else ""
        if "share_true" in about:
            found.append((f"{name}, share true", f"{about['share_true']:.4f}"))
        else:
            text = f"{about['min']:.5g} to {about['max']:.5g}"
            found.append((f"{name}{', modulus' if kind == 'c' else over_seeds}", text))
    if "wall_seconds" in known:
        found.append(("wall time, s", f"{known['wall_seconds']:.1f}"))
    return found


def record(dataset) -> dict[str, Any]:
    """The summary in plain numbers; the range of a variable is that of its mean over seeds."""
    finite = dataset["finite"].values
    done = (
        dataset["completed"].values > 0 if "completed" in dataset else np.ones(finite.shape, bool)
    )
    found = {
        "cells": finite.size,
        "cells_done": int(done.sum()),
        "not_finite": int((done & ~finite).sum()),
        "variables": {
            str(name): _range(dataset, str(name))
            for name in dataset.data_vars
            if name not in ("completed", "finite")
        },
    }
    if "wall_seconds" in dataset.attrs:
        found["wall_seconds"] = float(dataset.attrs["wall_seconds"])
    return found


def _range(dataset, name: str) -> dict[str, float]:
    """The least and largest mean, or the share of cells that are true."""
    array = dataset[name]
    if array.dtype == bool:
        return {"share_true": float(array.where(dataset["finite"]).mean())}
    if array.dtype.kind == "c":
        values = abs(array.where(dataset["finite"]))
    else:
        values, _ = mean(dataset, name, [d for d in array.dims if d != "seed"])
    return {"min": float(values.min()), "max": float(values.max())}
