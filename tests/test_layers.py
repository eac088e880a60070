"""Imports run one way: what is compared must not share code, what is general knows no problem."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import negmaml

PACKAGE = Path(negmaml.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

ENDS = {"verify", "reproduce", "phases", "figures", "cli", "examples", "__main__"}
ENDS |= {"sweeps", "sweep_commands", "version"}
SOLVABLE = {"theory", "linear", "adaptation", "problem", "wishart", "tasks"}
GENERAL = {"batching", "checkpoint", "devices", "implicit", "inner", "lowrank", "meta", "mixed"}
GENERAL |= {"patches", "train"}
FORBIDDEN = {
    "theory": {"linear", "tasks", *GENERAL, *ENDS},
    "linear": {"theory", "tasks", *GENERAL, *ENDS},
    "problem": {"theory", "linear", "tasks", *GENERAL, *ENDS},
    "wishart": {"theory", "linear", "tasks", *GENERAL, *ENDS},
    "adaptation": {"theory", "linear", "tasks", *GENERAL, *ENDS},
    "rules": {"theory", "linear", "tasks", *GENERAL, *ENDS},
    "pytree": {*SOLVABLE, *GENERAL, *ENDS},
    "compilation": {*SOLVABLE, *GENERAL, *ENDS},
    "extras": {*SOLVABLE, *GENERAL, *ENDS},
    "provenance": {*SOLVABLE, *GENERAL, *(ENDS - {"version"})},
    "tasks": {"theory", *(GENERAL - {"batching"}), *ENDS},
    **{general: {*SOLVABLE, *ENDS} for general in sorted(GENERAL)},
    "inner": {*SOLVABLE, *ENDS, "meta", "train"},
    "meta": {*SOLVABLE, *ENDS, "train", "devices"},
    "sweeps": {"theory", "tasks", *GENERAL, *(ENDS - {"sweeps", "version"})},
    "verify": {"sweeps", "reproduce", "phases", "figures", "cli", "examples", "__main__"},
    "reproduce": {"phases", "figures", "cli", "examples", "__main__"},
    "phases": {"verify", "reproduce", "figures", "cli", "examples", "__main__"},
}
PARTS = {name.split(".")[1] for name in MODULES if "." in name}
OPTIONAL = ("dask", "distributed", "equinox", "flax", "fsspec", "matplotlib", "orbax", "rich")
OPTIONAL += ("scipy.io", "sklearn", "tyro", "xarray", "zarr")


def imported(source, module, is_package=False):
    """Every dotted name that the source imports, at any depth, absolute."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, *([base] if base else [])])
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def components(names):
    """The parts of negmaml among imported names: "theory" for negmaml.theory.rates."""
    return {name.split(".")[1] for name in names if name.startswith("negmaml.")}


def imports_of(name):
    path = MODULES[name]
    return imported(path.read_text(), name, path.name == "__init__.py")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from negmaml.linear.solve import minimiser", {"linear"}),
        ("from negmaml import theory, rules", {"theory", "rules"}),
        ("import negmaml.verify as v", {"verify"}),
        ("def f():\n    from negmaml.cli import run", {"cli"}),
        ("from ..theory import rates", {"theory"}),
        ("from . import solve", {"linear"}),
        ("from .. import meta", {"meta"}),
        ("import numpy", set()),
    ],
)
def test_reader_sees_every_form_of_import(source, expected):
    assert components(imported(source, "negmaml.linear.simulate")) & PARTS == expected


@pytest.mark.parametrize("name", [m for m in MODULES if components([m]) & set(FORBIDDEN)])
def test_no_import_runs_against_the_arrows(name):
    wrong = components(imports_of(name)) & FORBIDDEN[name.split(".")[1]]
    assert not wrong, f"{name} imports {', '.join(sorted(wrong))}"


@pytest.mark.parametrize(
    "name", [m for m in MODULES if "." in m and m != "negmaml.cli" and "examples" not in m]
)
def test_only_the_command_line_and_examples_import_the_package_as_a_whole(name):
    inside = {n for n in imports_of(name) if n == "negmaml" or n.startswith("negmaml.")}
    inside = {n for n in inside if n == "negmaml" or n.count(".") == 1}
    allowed = {f"negmaml.{part}" for part in PARTS} | {"negmaml"}
    assert inside <= allowed, f"{name} imports {sorted(inside - allowed)} from the front door"


@pytest.mark.parametrize("component", FORBIDDEN)
def test_the_rules_are_about_parts_that_exist(component):
    assert {component, *FORBIDDEN[component]} <= PARTS


def test_figures_import_nothing_of_the_package():
    assert not {name for name in imports_of("negmaml.figures") if name.startswith("negmaml")}


@pytest.fixture(scope="module")
def loaded():
    """Names of the modules that importing negmaml loads in a fresh interpreter."""
    code = "import sys, negmaml; print(*sys.modules, sep='\\n')"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    return set(result.stdout.split())


@pytest.mark.parametrize("name", OPTIONAL)
def test_importing_the_package_does_not_import_an_extra(loaded, name):
    assert "negmaml.verify" in loaded
    assert name not in loaded
