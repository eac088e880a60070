"""Names of a package that are imported at their first use (PEP 562).

The public names are written once, as imports in the stub beside `__init__.py`. Type checkers and
editors read the stub, and so does the package when it is imported.
"""

import ast
import importlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def lazily(package: str, file: str) -> tuple[Callable, Callable, list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package, from the stub beside its file."""
    homes, public = _read(Path(file).with_suffix(".pyi").read_text(encoding="utf-8"))

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = homes[name]
        if home == package:  # a submodule, which importing sets as an attribute
            return importlib.import_module(f"{package}.{name}")
        found = getattr(importlib.import_module(home), name)
        # The next access finds it without this function.
        setattr(sys.modules[package], name, found)
        return found

    return get, lambda: _listed(package, homes), public


def public_names(module: str) -> Callable[[], list[str]]:
    """Return the `__dir__` of a module: the names of `__all__`, and those with two underscores.

    Completion in an editor or a notebook then lists the names that a user can rely on, without
    modules and their imports.
    """
    return lambda: _listed(module, sys.modules[module].__all__)


def _listed(module: str, names: Iterable[str]) -> list[str]:
    special = (name for name in vars(sys.modules[module]) if name.startswith("__"))
    return sorted({*names, *special})


def _read(stub: str) -> tuple[dict[str, str], list[str]]:
    """The module of every name that a stub imports, and its `__all__`."""
    homes: dict[str, str] = {}
    public: list[str] = []
    for node in ast.parse(stub).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            homes |= {alias.name: node.module for alias in node.names}
        elif isinstance(node, ast.Assign):
            public = ast.literal_eval(node.value)
    return homes, public
