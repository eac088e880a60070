"""A sweep as a TOML file.

function = "linear"            # or "module:function"
seeds = 100                    # a count or a list
options = { evaluation = "expected" }      # of the linear model
[grid]                         # [[grid]] more than once for a list of grids
p = [20, 60]
sigma = { start = 0.1, stop = 1.0, num = 10 }
"n_t,n_v" = [[10, 2], [20, 4]]             # zipped
"""

import importlib
import os
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from negmaml._core.registry import registered
from negmaml.sweeps.functions import made
from negmaml.sweeps.parse import near

FIELDS = ("function", "seeds", "grid", "root", "options", "static", "whole", "common",
          "output_dims", "memory", "block", "dtype", "version")  # fmt: skip
PASSED = ("seeds", "root", "static", "whole", "common", "output_dims")
EXAMPLES = "negmaml.examples"
WORD = r"[A-Za-z_][\w.:/-]*"  # what --set takes as a string without quotes
RANGE = {"start", "stop", "num"}


def read(path: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of a spec file with `key=value` overrides, checked.

    `path` may also name a spec that comes with the package: phase_map.
    """
    spec = _load(path)
    for text in overrides:
        _override(spec, text)
    for field in spec:
        if field not in FIELDS:
            raise ValueError(f"{path}: unknown field {field!r}{near(field, FIELDS)}")
    for field in ("function", "seeds", "grid"):
        if field not in spec:
            raise ValueError(f"{path}: field {field!r} is missing")
    if spec.setdefault("dtype", "float32") not in ("float32", "float64"):
        raise ValueError(f"{path}: dtype must be float32 or float64, got {spec['dtype']!r}")
    several = isinstance(spec["grid"], list)
    grids = [_grid(path, grid) for grid in (spec["grid"] if several else [spec["grid"]])]
    spec["grid"] = grids if several else grids[0]
    spec["function"] = _function(path, spec["function"], spec.pop("options", {}))
    return spec


def arguments(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `negmaml.sweeps.prepare`, but for function and grid."""
    return {name: spec[name] for name in PASSED if name in spec}


def _load(path: str) -> dict[str, Any]:
    file = Path(path)
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
        if parsed and not re.fullmatch(WORD, parsed):
            raise ValueError(
                f"--set {text}: the value is no valid TOML ({error}); numbers, [lists] and "
                '"strings" have to be whole'
            ) from error
    if parsed in (None, "") or not all(names):
        raise ValueError(
            f"--set takes key=value, such as seeds=20 or grid.sigma=[0.1, 1.0], got {text!r}"
        )
    for name in names[:-1]:
        where = where.setdefault(name, {})
        if not isinstance(where, dict):
            raise ValueError(f"--set {text}: {name!r} is no table of one value a key")
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
            values = np.round(np.linspace(values["start"], values["stop"], values["num"]), 12)
        key = tuple(part.strip() for part in name.split(",")) if "," in name else name
        found[key] = values
    return found


def _function(path: str, name: str, options: Mapping[str, Any]):
    if name in registered():
        try:
            return made(name, **options)
        except ValueError as error:
            raise ValueError(f"{path}: options of {name!r}: {error}") from error
    module, _, attribute = name.partition(":")
    if options or not attribute:
        raise ValueError(
            f'{path}: function must be "linear" or "module:function" without options, got {name!r}'
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise ValueError(f"{path}: no module {module!r} for function {name!r}") from error
    except AttributeError as error:
        near_one = near(attribute, dir(sys.modules[module]))
        raise ValueError(f"{path}: {module!r} has no {attribute!r}{near_one}") from error
