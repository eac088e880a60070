"""The public surface: what completion lists, and what the docstrings of public names contain."""

import importlib
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
