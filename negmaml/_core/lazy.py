"""Names of a package that are imported at their first use (PEP 562).

The public names are written once, as imports in the stub beside `__init__.py`. Type checkers and
editors read the stub, and so does the package when it is imported.
"""

import ast
import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any


def lazily(package: str, file: str) -> tuple[Callable, Callable, list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package, from the stub beside its file."""
    homes, public = _read(Path(file).with_suffix(".pyi").read_text(encoding="utf-8"))

    def get(name: str) -> Any:
        if name not in homes:
            raise missing_name(package, name, public)
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


def suggesting(package: str) -> Callable[[str], Any]:
    """The `__getattr__` of a package, whose error names the nearest public name."""

    def get(name: str) -> Any:
        raise missing_name(package, name, exported(vars(sys.modules[package])))

    return get


def exported(names: Mapping[str, Any]) -> list[str]:
    """The names that a package exports."""
    return list(names.get("__all__", [name for name in names if not name.startswith("_")]))


def missing_name(module: str, name: str, names: Iterable[str]) -> AttributeError:
    """The error for a name that a module does not have, with the nearest of its names."""
    # In the message, since a traceback of Python 3.11 suggests nothing for modules. Names of other
    # cases are compared too: nm.gradientdescent.
    found = {known.lower().replace("_", ""): known for known in names}
    plain = name.lower().replace("_", "")
    close = [] if name.startswith("__") else get_close_matches(plain, found, 1, 0.65)
    hint = f"; did you mean {found[close[0]]!r}?" if close else ""
    return AttributeError(f"module {module!r} has no attribute {name!r}{hint}")


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
