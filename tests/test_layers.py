"""Imports run one way between folders, so that methods that are compared share no code."""

import ast
import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

import negmaml

PACKAGE = Path(negmaml.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.parent != PACKAGE / "examples/notebooks"  # these run when they are imported
}

# The folders that each folder may import besides itself. Theory never imports linear, nor linear
# theory: their agreement is evidence. Meta and training know no problem, sweeps know no model.
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
FRONT = {"__init__", "__main__", "examples"}  # these import any folder
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


def circle(arrows):
    """The nodes that are left when all that lead to no circle are removed."""
    left = {name: {o for o in others if o in arrows} for name, others in arrows.items()}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def test_imports_follow_the_arrows_between_folders():
    assert set(ALLOWED) >= FOLDERS - FRONT
    assert not circle(ALLOWED)
    wrong = []
    for name in MODULES:
        if folders([name]) & ALLOWED.keys():
            own = name.split(".")[1]
            others = folders(imports_of(name)) & FOLDERS - {own, *ALLOWED[own]}
            wrong += [f"{name} imports {other}" for other in sorted(others)]
    assert not wrong
    # Figures are drawn from arrays, whatever computed them.
    own = {n for n in imports_of("negmaml.paper.figures") if n.startswith("negmaml.")}
    assert all(n.startswith("negmaml._core.plotting") for n in own - {"negmaml._core"})


def test_no_circle_of_modules():
    plain = [name for name, path in MODULES.items() if path.name != "__init__.py"]
    assert not circle({name: imports_of(name) - {name} for name in plain})


def test_only_the_command_line_and_examples_import_the_package_as_a_whole():
    wrong = []
    for name, path in MODULES.items():
        if folders([name]) & ALLOWED.keys() - {"cli"}:
            inside = {n for n in imports_of(name) if n.startswith("negmaml.") and n.count(".") == 1}
            whole = "import negmaml\n" in path.read_text()
            inside |= imports_of(name) & {"negmaml"} if whole else set()
            wrong += [f"{name} imports {n}" for n in inside if n.split(".")[-1] not in FOLDERS]
    assert not wrong


def test_no_module_is_shadowed_by_a_function_of_its_name():
    wrong = []
    for name in MODULES:
        __import__(name)
        parent, _, own = name.rpartition(".")
        if parent and getattr(sys.modules[parent], own) is not sys.modules[name]:
            wrong.append(name)
    assert not wrong


def test_no_class_name_is_defined_in_two_modules():
    homes = defaultdict(list)
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(name)
    assert not {name: where for name, where in homes.items() if len(where) > 1}


def test_the_package_imports_neither_an_extra_nor_anything_before_it_is_used():
    code = """
import sys, negmaml
first = set(sys.modules)
from negmaml import *
print(*first); print(*set(sys.modules) - first)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    first, more = (set(line.split()) for line in result.stdout.splitlines())
    assert "negmaml.paper.cross_check" in more and "jax" in more
    assert not first & {"jax", "numpy"}
    assert not (first | more) & set(OPTIONAL)
