"""Imports run one way between folders: what is compared must not share code."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import negmaml

PACKAGE = Path(negmaml.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# What each folder may import besides itself. Theory never imports linear nor linear theory:
# their agreement is evidence. Meta and training know no problem, sweeps know no model.
FOUNDATION = {"_core", "rules"}
MODEL = {*FOUNDATION, "problem"}
ALLOWED = {
    "_core": set(),
    "rules": {"_core"},
    "problem": FOUNDATION,
    "linear": MODEL,
    "theory": MODEL,
    "meta": FOUNDATION,
    "training": {*FOUNDATION, "meta"},
    "tasks": {*MODEL, "linear", "meta"},
    "sweeps": {"_core"},
    "kernels": {*MODEL, "linear", "meta"},
    "advice": {*MODEL, "linear", "theory", "meta", "kernels"},
    "paper": {*MODEL, "linear", "theory", "meta", "tasks", "training", "kernels", "advice"},
}
ALLOWED["cli"] = {*ALLOWED, "sweeps"}
FRONT = {"__init__", "__main__", "examples"}  # these import what they like
FOLDERS = {name.split(".")[1] for name in MODULES if "." in name}
OPTIONAL = ("dask", "distributed", "equinox", "flax", "fsspec", "matplotlib", "orbax", "rich")
OPTIONAL += ("pandas", "pyarrow", "scipy.io", "sklearn", "tyro", "xarray", "zarr")


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


def folders(names):
    """The folders of negmaml among imported names: "theory" for negmaml.theory.optima."""
    return {name.split(".")[1] for name in names if name.startswith("negmaml.")}


@cache
def imports_of(name):
    path = MODULES[name]
    return imported(path.read_text(), name, path.name == "__init__.py")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from negmaml.linear.solve import minimiser", {"linear"}),
        ("from negmaml import theory, rules", {"theory", "rules"}),
        ("import negmaml.paper.cross_check as v", {"paper"}),
        ("def f():\n    from negmaml.cli.main import run", {"cli"}),
        ("from ..theory import rates", {"theory"}),
        ("from . import solve", {"linear"}),
        ("from .. import meta", {"meta"}),
        ("import numpy", set()),
    ],
)
def test_reader_sees_every_form_of_import(source, expected):
    assert folders(imported(source, "negmaml.linear.simulation")) & FOLDERS == expected


def test_the_rules_are_about_all_folders():
    assert set(ALLOWED) >= FOLDERS - FRONT


@pytest.mark.parametrize("name", [m for m in MODULES if folders([m]) & set(ALLOWED)])
def test_no_import_runs_against_the_arrows(name):
    own = name.split(".")[1]
    wrong = folders(imports_of(name)) & FOLDERS - {own, *ALLOWED[own]}
    assert not wrong, f"{name} imports {', '.join(sorted(wrong))}"


def test_the_arrows_make_no_circle():
    left = {name: set(allowed) for name, allowed in ALLOWED.items()}
    while left:
        free = [name for name, allowed in left.items() if not allowed & set(left)]
        assert free, f"a circle among {sorted(left)}"
        for name in free:
            del left[name]


def test_no_two_modules_import_each_other():
    arrows = {
        name: (imports_of(name) & set(MODULES)) - {name}
        for name in MODULES
        if MODULES[name].name != "__init__.py"
    }
    left = {name: {o for o in others if o in arrows} for name, others in arrows.items()}
    while left:
        free = [name for name, others in left.items() if not others & set(left)]
        assert free, f"a circle among {sorted(left)}"
        for name in free:
            del left[name]


@pytest.mark.parametrize("name", [m for m in MODULES if folders([m]) & (set(ALLOWED) - {"cli"})])
def test_only_the_command_line_and_examples_import_the_package_as_a_whole(name):
    inside = {n for n in imports_of(name) if n.startswith("negmaml.") and n.count(".") == 1}
    inside |= (
        imports_of(name) & {"negmaml"} if "import negmaml\n" in MODULES[name].read_text() else set()
    )
    wrong = {n for n in inside if n.removeprefix("negmaml.") not in FOLDERS}
    assert not wrong, f"{name} imports {sorted(wrong)} from the front door"


@pytest.mark.parametrize("name", MODULES)
def test_no_module_is_shadowed_by_a_function_of_its_name(name):
    __import__(name)
    module, (parent, _, own) = sys.modules[name], name.rpartition(".")
    if parent:
        assert getattr(sys.modules[parent], own) is module


def test_figures_import_nothing_of_the_package():
    assert not {n for n in imports_of("negmaml.paper.figures") if n.startswith("negmaml")}


@pytest.fixture(scope="module")
def loaded():
    """Names of the modules that are loaded in a fresh interpreter by `import negmaml`, and more

    by taking every name from it.
    """
    code = """
import sys, negmaml
first = set(sys.modules)
from negmaml import *
print(*first); print(*set(sys.modules) - first)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    return [set(line.split()) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("name", OPTIONAL)
def test_the_package_does_not_import_an_extra_nor_anything_before_it_is_asked(loaded, name):
    first, more = loaded
    assert "negmaml.paper.cross_check" in more and "jax" in more
    assert "jax" not in first and "numpy" not in first
    assert name not in first | more
