"""The public surface: what completion lists, and what the docstrings of public names contain."""

import dataclasses
import importlib
import inspect
import re
import sys

import pytest

import negmaml as nm

PACKAGES = (
    "advice", "kernels", "linear", "meta", "problem", "rules", "sweeps", "tasks", "theory",
    "training",
)  # fmt: skip


@pytest.mark.parametrize("package", [*PACKAGES, "cli", "examples", "paper"])
def test_completion_lists_the_public_names_of_a_package(package):
    module = importlib.import_module(f"negmaml.{package}")
    listed = [name for name in dir(module) if not name.startswith("__")]
    registered = ["linear"] if package == "sweeps" else []
    assert listed == sorted([*module.__all__, *registered])
    assert {"__all__", "__doc__", "__file__"} < set(dir(module))


def test_completion_lists_the_public_names_and_packages_of_negmaml():
    listed = {name for name in dir(nm) if not name.startswith("__")}
    packages = {*PACKAGES, "paper"}
    assert listed == {*nm.__all__, *packages, "MetaRegressor", "MetaRegressorCV"}


def test_a_module_of_the_paper_is_imported_when_it_is_asked_for():
    assert nm.paper.gain_map is sys.modules["negmaml.paper.gain_map"]
    with pytest.raises(AttributeError, match="no attribute 'figure'"):
        _ = nm.paper.figure


def _public():
    """Each public object once, under the first of its names."""
    found = {}
    for package in ("negmaml", *(f"negmaml.{name}" for name in PACKAGES)):
        module = importlib.import_module(package)
        for name in module.__all__:
            if not inspect.ismodule(value := getattr(module, name)):
                found.setdefault(id(value), (f"{package}.{name}", value))
    return dict(found.values())


def _fields(found):
    if dataclasses.is_dataclass(found):
        return [field.name for field in dataclasses.fields(found)]
    return list(getattr(found, "_fields", ()))


PUBLIC = _public()
CLASSES = {name: found for name, found in PUBLIC.items() if inspect.isclass(found)}


def test_every_public_name_has_an_example():
    assert not [name for name, found in PUBLIC.items() if ">>>" not in (found.__doc__ or "")]


def test_the_first_line_of_a_docstring_stands_by_itself():
    firsts = {name: found.__doc__.splitlines()[0] for name, found in PUBLIC.items()}
    wrong = re.compile(r"(Of|What|The same|Whether)\b|.*[^.]$")
    assert not {name: line for name, line in firsts.items() if wrong.match(line)}


def test_the_docstring_of_a_class_names_all_of_its_fields():
    missing = {
        name: [field for field in _fields(found) if not re.search(rf"\b{field}\b", found.__doc__)]
        for name, found in CLASSES.items()
    }
    assert not {name: fields for name, fields in missing.items() if fields}


def test_every_public_method_has_a_docstring():
    missing = []
    for name, found in CLASSES.items():
        for member, value in vars(found).items():
            described = callable(value) or isinstance(value, (property, classmethod, staticmethod))
            if described and not member.startswith("_"):
                missing += [] if inspect.getdoc(getattr(found, member)) else [f"{name}.{member}"]
    assert not missing


def test_sections_of_docstrings_have_one_form():
    """A page of the reference shows arguments and attributes as lists, errors as sentences."""
    other = re.compile(r"^\s*(Args|Parameters|Returns|Example|Examples):|^\s*Arguments: \S", re.M)
    documented = [(name, found.__doc__) for name, found in PUBLIC.items()]
    for name, found in CLASSES.items():
        members = (value for key, value in vars(found).items() if not key.startswith("_"))
        documented += [(name, value.__doc__) for value in members if callable(value)]
    assert not [name for name, text in documented if other.search(text or "")]
