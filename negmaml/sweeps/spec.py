"""A sweep as a TOML file.

function = "linear"            # or "module:function"
seeds = 100                    # a count or a list
[grid]                         # several [[grid]] form a union
p = [20, 60]
sigma = { start = 0.1, stop = 1.0, num = 10 }
"n_t,n_v" = [[10, 2], [20, 4]]             # zipped
[random]                       # points drawn at random, along the dim `point`
n = 50
nu = { low = 0.01, high = 1.0, scale = "log" }

The fields are in FIELDS.
"""

import re
import textwrap
import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import resources
from typing import Any

import numpy as np

from negmaml._core.checks import check_count, did_you_mean
from negmaml._core.deprecation import warn_renamed
from negmaml._core.paths import expanded
from negmaml._core.registry import registered
from negmaml.sweeps.functions import made
from negmaml.sweeps.objects import imported, resolved
from negmaml.sweeps.parse import MAX_VALUES
from negmaml.sweeps.points import random_points

FIELDS = {
    "function": '"linear", or "module:function" of your own; modules of the current folder count',
    "seeds": "a count n for seeds 0 to n - 1, or a list",
    "grid": 'axes by name: a value, a list, or { start, stop, num }; "a,b" = [[1, 2], ...] are '
    "zipped; several [[grid]] form a union",
    "points": "a list of points [{ a = 1, b = 0.5 }, ...] along `point`, crossed with the grid",
    "random": 'n points drawn at random: n, seed, and for each name { low, high, scale = "log", '
    "integer = true } or a list to choose from",
    "options": 'arguments of the function for all cells; { rule = "Momentum", rate = 0.1, ... }, '
    '{ callable = "jax.nn:relu" } and { call = "optax:adam", ... } stand for objects',
    "root_seed": "seed of all random numbers, 0 by default",
    "static": "axes that set shapes or branches; by default integers, strings and truth values",
    "vectorized": "axes that the function takes as one array each",
    "common_random_numbers": "axes along which cells share their random numbers",
    "output_dims": "names of the dims of outputs, by output",
    "reduce": 'statistics over the seeds in place of single cells: { seed = ["mean", "sem"] }',
    "memory": "bytes that a batch of cells may take",
    "block": "cells computed and stored at once",
    "dtype": '"float32", the default, or "float64"',
    "code_version": "a label for a function that calls back to Python",
}
PASSED = ("seeds", "root_seed", "static", "vectorized", "common_random_numbers", "output_dims",
          "reduce")  # fmt: skip
RENAMED = {"root": "root_seed", "whole": "vectorized", "common": "common_random_numbers",
           "version": "code_version"}  # fmt: skip
EXAMPLES = "negmaml.examples"
WORD = r"[A-Za-z_][\w.:/-]*"  # --override accepts such a value as a string without quotes
RANGE = {"start", "stop", "num"}


def read(
    path: str, overrides: Sequence[str] = (), warn: Callable[[str, str], None] = warn_renamed
) -> dict[str, Any]:
    """Read a spec file, apply `key=value` overrides, and check every field.

    `path` may also name a spec that comes with the package: phase_map. `warn` is called with the
    old and new names of each field that was renamed.
    """
    spec = _load(path)
    for text in overrides:
        _override(spec, text)
    # Old names work for one release.
    for old in RENAMED.keys() & spec.keys():
        new = RENAMED[old]
        if new in spec:
            raise ValueError(
                f"{path}: fields {old!r} and {new!r} are one field by its old and its new name; "
                f"give only {new!r}"
            )
        warn(f"{path}: field {old!r}", repr(new))
        spec[new] = spec.pop(old)
    for field in spec:
        if field not in FIELDS:
            raise ValueError(f"{path}: unknown field {field!r}{did_you_mean(field, FIELDS)}")
    # A spec with points needs no grid.
    if "points" in spec or "random" in spec:
        spec.setdefault("grid", {})
    for field in ("function", "seeds", "grid"):
        if field not in spec:
            raise ValueError(f"{path}: field {field!r} is missing")
    if spec.setdefault("dtype", "float32") not in ("float32", "float64"):
        raise ValueError(f"{path}: dtype must be float32 or float64, got {spec['dtype']!r}")
    several = isinstance(spec["grid"], list)
    grids = [_grid(path, grid) for grid in (spec["grid"] if several else [spec["grid"]])]
    if points := _points(path, spec):
        if any("point" in grid for grid in grids):
            raise ValueError(f"{path}: give points in `points` and `random`, or as grid.point")
        for grid in grids:
            grid["point"] = points
    spec["grid"] = grids if several else grids[0]
    spec["function"] = _function(path, spec["function"], spec.pop("options", {}))
    return spec


def fields_text() -> str:
    """The fields of a spec, an entry each, for help texts of 80 characters."""
    texts = (f"- {name}: {text}" for name, text in FIELDS.items())
    return "\n".join(textwrap.fill(t, 78, subsequent_indent="  ") for t in texts)


def arguments(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `negmaml.sweeps.prepare`, without function and grid."""
    return {name: spec[name] for name in PASSED if name in spec}


def _load(path: str) -> dict[str, Any]:
    # A file of that name takes precedence over a shipped example.
    file = expanded("spec", path)
    shipped = {f.name.removesuffix(".toml"): f for f in resources.files(EXAMPLES).iterdir()
               if f.name.endswith(".toml")}  # fmt: skip
    try:
        found = file if file.exists() else shipped.get(path, file)
        return tomllib.loads(found.read_text())
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"there is no spec file {path!r}; write one, or try an example: {', '.join(shipped)}"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from error


def _override(spec: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    where, names = spec, key.strip().split(".")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"] if equals else None
    except tomllib.TOMLDecodeError as error:
        parsed = value.strip()
        # Strings without quotes are convenient in a shell; anything else has to be TOML.
        if parsed and not re.fullmatch(WORD, parsed):
            raise ValueError(
                f"--override {text}: the value is no valid TOML ({error}); numbers, [lists] and "
                '"strings" have to be whole'
            ) from error
    if parsed in (None, "") or not all(names):
        raise ValueError(
            f"--override takes key=value, such as seeds=20 or grid.sigma=[0.1, 1.0], got {text!r}"
        )
    for name in names[:-1]:
        # Created if missing, since an override may also add a field.
        where = where.setdefault(name, {})
        if not isinstance(where, dict):
            raise ValueError(f"--override {text}: {name!r} is no table of one value a key")
    where[names[-1]] = parsed


def _grid(path: str, grid) -> dict:
    if not isinstance(grid, dict):
        raise ValueError(f"{path}: grid must be a table, [grid], or several, [[grid]]")
    found: dict = {}
    for name, values in grid.items():
        if isinstance(values, dict):
            if set(values) != RANGE:
                raise ValueError(
                    f"{path}: axis {name!r} is a range of start, stop and num, got {sorted(values)}"
                )
            if check_count(f"{path}: num of axis {name!r}", values["num"]) > MAX_VALUES:
                raise ValueError(
                    f"{path}: num of axis {name!r} must be at most {MAX_VALUES:,}, "
                    f"got {values['num']:,}"
                )
            # Rounded, so that 0.1 is not 0.1000000000000001 in the labels of an axis.
            values = np.round(np.linspace(values["start"], values["stop"], values["num"]), 12)
        key = tuple(part.strip() for part in name.split(",")) if "," in name else name
        found[key] = values
    return found


def _points(path: str, spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The listed points, followed by those drawn at random."""
    points = spec.get("points", [])
    if not isinstance(points, list) or not all(isinstance(point, dict) for point in points):
        raise ValueError(f"{path}: points must be a list of tables, [{{ a = 1 }}, ...]")
    if "random" not in spec:
        return points
    given = spec["random"]
    if not isinstance(given, dict) or "n" not in given:
        raise ValueError(f"{path}: random must be a table with n and a range for each name")
    try:
        return [*points, *random_points(**given)]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: random: {error}") from error


def _function(path: str, name: str, options: Any):
    if not isinstance(options, dict):
        raise ValueError(f"{path}: options must be a table, got {options!r}")
    options = {key: resolved(f"{path}: options.{key}", value) for key, value in options.items()}
    if name in registered():
        try:
            return made(name, **options)
        except ValueError as error:
            raise ValueError(f"{path}: options of {name!r}: {error}") from error
    function = imported(f"{path}: function", name)
    # A partial keeps the signature of the other arguments, from which the axes are read.
    return partial(function, **options) if options else function
