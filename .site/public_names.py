"""Pages of the reference, generated from the `__all__` of each public area."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from textwrap import indent
from types import ModuleType
from typing import Any

import docstrings
import signatures
from areas import AREAS, ROOT, Area


@dataclass
class Entry:
    """A public object, described once: on the page of `area`, under its shortest public name."""

    found: Any
    area: Area
    paths: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return min(self.paths, key=lambda path: path.count("."))

    @property
    def short(self) -> str:
        return self.name.rpartition(".")[2]

    @cached_property
    def doc(self) -> str:
        if isinstance(self.found, type) or callable(self.found):
            return inspect.getdoc(self.found) or ""
        return _comment(self.area.module, self.short)

    @cached_property
    def members(self) -> dict[str, Any]:
        """Public methods and properties with docstrings, without those of public bases."""
        if not isinstance(self.found, type):
            return {}
        listed = entry_of()
        bases = [
            base
            for base in self.found.__mro__
            if base.__module__.startswith("negmaml")
            and (base is self.found or id(base) not in listed)
        ]
        names = [name for base in bases for name in vars(base) if not name.startswith("_")]
        called = ["__call__"] if any("__call__" in vars(base) for base in bases) else []
        members = {name: inspect.getattr_static(self.found, name) for name in called + names}
        return {name: value for name, value in members.items() if _member_doc(value)}


@cache
def entries() -> list[Entry]:
    """All public objects in the order of the areas and of their `__all__`."""
    found: dict[int, Entry] = {}
    for area in AREAS[1:] + AREAS[:1]:
        module = importlib.import_module(area.module)
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if isinstance(value, ModuleType):
                continue
            entry = found.setdefault(id(value), Entry(value, _defined_in(value) or area))
            entry.paths.append(f"{area.module}.{name}")
    return list(found.values())


def _defined_in(value: Any) -> Area | None:
    """The area that defines an object, which describes it if several export it."""
    home = getattr(value, "__module__", None) or ""
    return next((area for area in AREAS[1:] if home.startswith(f"{area.module}.")), None)


@cache
def entry_of() -> dict[int, Entry]:
    return {id(entry.found): entry for entry in entries()}


@cache
def aliases() -> dict[str, str]:
    """Names that texts use for public objects: `nm.fit` and `negmaml.fit` for negmaml.fit."""
    names = {}
    for entry in entries():
        for path in entry.paths:
            short = path.removeprefix("negmaml.")
            dotted = [short] if "." in short else []
            for form in (path, f"nm.{short}", *dotted):
                names[form] = entry.name
                names |= {f"{form}.{member}": f"{entry.name}.{member}" for member in entry.members}
    for area in AREAS[1:]:
        names |= {area.module: area.module, area.module.replace("negmaml", "nm"): area.module}
    return names | _bare_names()


def _bare_names() -> dict[str, str]:
    """Names without a prefix which can mean nothing else: no argument or member has them."""
    bare: dict[str, set[str]] = {}
    for entry in entries():
        if entry.short not in _arguments_and_members() and re.search(r"[A-Z_]", entry.short):
            bare.setdefault(entry.short, set()).add(entry.name)
            for member in entry.members:
                bare[f"{entry.short}.{member}"] = {f"{entry.name}.{member}"}
    return {name: homes.pop() for name, homes in bare.items() if len(homes) == 1}


def local_aliases(modules: set[str]) -> dict[str, str]:
    """Names of areas that their texts use without a prefix, unless an argument has the name."""
    return {
        entry.short: entry.name
        for entry in entries()
        if not modules.isdisjoint(path.rpartition(".")[0] for path in entry.paths)
        and entry.short not in _arguments_and_members(frozenset(modules))
    }


@cache
def _arguments_and_members(modules: frozenset[str] | None = None) -> set[str]:
    """Names of arguments and members in some areas, or in all."""
    names: set[str] = set()
    for entry in entries():
        if modules is None or entry.area.module in modules:
            names |= {*_types(entry), *entry.members}
    return names


def source_of(name: str) -> tuple[str, int, int] | None:
    """File in the repository, first and last line of the object of a full name."""
    found = _objects().get(name)
    node = signatures.node_of(signatures.described(found))
    if node is None:
        return None
    path = Path(inspect.getsourcefile(signatures.described(found))).resolve().relative_to(ROOT)
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return str(path), first, node.end_lineno


@cache
def _objects() -> dict[str, Any]:
    objects = {}
    for entry in entries():
        objects[entry.name] = entry.found
        objects |= {f"{entry.name}.{name}": value for name, value in entry.members.items()}
    return objects


def page(area: Area) -> str:
    """The page of an area in reStructuredText."""
    module = importlib.import_module(area.module)
    here = [entry for entry in entries() if entry.area == area]
    elsewhere = [
        entry
        for entry in entries()
        if entry.area != area
        and any(path.rpartition(".")[0] == area.module for path in entry.paths)
    ]
    title = area.module
    guide = f"Guide: :doc:`{area.guide_title} </{area.guide}>`." if area.guide else ""
    return "\n\n".join(
        [
            f"{title}\n{'=' * len(title)}",
            f".. py:module:: {area.module}\n   :no-index-entry:",
            docstrings.to_rst(inspect.getdoc(module) or ""),
            guide,
            _table(here),
            *(["**Described in other areas**", _table(elsewhere)] if elsewhere else []),
            *map(_entry, here),
        ]
    )


def areas_table() -> str:
    """The areas with the first lines of their docstrings."""
    return _rows(
        (
            f":doc:`{area.module} </{area.page}>`",
            inspect.getdoc(importlib.import_module(area.module)),
        )
        for area in AREAS
    )


def _table(listed: list[Entry]) -> str:
    return _rows(
        (f":py:obj:`{entry.name.removeprefix('negmaml.')} <{entry.name}>`", entry.doc)
        for entry in listed
    )


def _rows(described: Iterable[tuple[str, str]]) -> str:
    """A table of links, and of the first lines of the docstrings they lead to."""
    rows = "\n".join(f"   * - {link}\n     - {docstrings.summary(doc)}" for link, doc in described)
    return f".. list-table::\n   :class: summary\n   :widths: auto\n\n{rows}" if rows else ""


def _entry(entry: Entry) -> str:
    found, module = entry.found, entry.name.rpartition(".")[0]
    kind, signature = _kind(found), ""
    if kind in ("class", "function"):
        signature = signatures.signature(found)
    options = f"   :module: {module}\n"
    if kind == "data":
        options += f"   :value: {signatures.shortened(repr(found))}\n"
    parts = [_bases(found), docstrings.to_rst(entry.doc, _linked(_types(entry)))]
    parts += [f":guide-of:`{entry.name}`"] if entry.area.guide else []
    parts += [_member(entry, name, value, module) for name, value in entry.members.items()]
    body = indent("\n\n".join(filter(None, parts)), "   ")
    return f".. py:{kind}:: {entry.short}{signature}\n{options}\n{body}"


def _kind(found: Any) -> str:
    if isinstance(found, type):
        return "exception" if issubclass(found, BaseException) else "class"
    return "function" if callable(found) else "data"


def _bases(found: Any) -> str:
    if not isinstance(found, type):
        return ""
    public = [entry_of()[id(base)] for base in found.__bases__ if id(base) in entry_of()]
    links = ", ".join(f":py:obj:`{base.short} <{base.name}>`" for base in public)
    return f"Base: {links}" if links else ""


def _member(entry: Entry, name: str, value: Any, module: str) -> str:
    options = f"   :module: {module}\n"
    if isinstance(value, (classmethod, staticmethod)):
        options += f"   :{type(value).__name__}:\n"
        value = value.__func__
    doc = docstrings.to_rst(_member_doc(value))
    if callable(value) and not isinstance(value, type):
        head = f".. py:method:: {name}{signatures.signature(value, bound=True)}"
    else:
        head = f".. py:property:: {name}"
        returns = signatures.function_of(value).returns
        if returns is not None:
            options += f"   :type: {ast.unparse(returns)}\n"
    return f"{head}\n{options}\n{indent(doc, '   ')}"


def _member_doc(value: Any) -> str:
    """The docstring of a method or a property, and none of other attributes of a class."""
    described = (property, cached_property, classmethod, staticmethod)
    if not isinstance(value, described) and not inspect.isfunction(inspect.unwrap(value)):
        return ""
    doc = inspect.cleandoc(getattr(value, "__doc__", None) or "")
    return "" if doc.startswith("Deprecated name") else doc


def _types(entry: Entry) -> dict[str, str]:
    described = _kind(entry.found) in ("class", "function")
    return signatures.types(entry.found) if described else {}


def _linked(types: dict[str, str]) -> dict[str, str]:
    """Types in reStructuredText, in which names of public classes are links."""
    return {name: _with_links(kind) for name, kind in types.items() if kind and kind != "Any"}


def _with_links(annotation: str) -> str:
    pieces = re.split(r"([A-Za-z_]\w*)", annotation)
    for i, piece in enumerate(pieces):
        entry = _class_names().get(piece)
        if entry:
            pieces[i] = f"\\ :py:obj:`{entry.short} <{entry.name}>`\\ "
        else:
            pieces[i] = re.sub(r"([\\*_|`])", r"\\\1", piece)
    return "".join(pieces).removeprefix("\\ ").strip()


@cache
def _class_names() -> dict[str, Entry]:
    return {entry.short: entry for entry in entries() if isinstance(entry.found, type)}


def _comment(module: str, name: str) -> str:
    """The comment above the assignment of a constant that a package exports, or behind it."""
    package = ast.parse(Path(importlib.import_module(module).__file__).read_text())
    homes = [
        node.module
        for node in package.body
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]
    ]
    lines = Path(importlib.import_module(homes[0]).__file__).read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if re.match(rf"{name}\b", line))
    first = at
    while first and lines[first - 1].startswith("#"):
        first -= 1
    above = " ".join(line.lstrip("# ") for line in lines[first:at])
    return above or lines[at].partition("  # ")[2]
