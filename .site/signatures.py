"""Signatures as the source of the package has them, with short annotations and defaults."""

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any


def signature(found: Any, bound: bool = False) -> str:
    """Signature with annotations and defaults as the source has them, which is shortest."""
    if isinstance(found, type):
        return f"({', '.join(arguments(found))})"
    function = function_of(found)
    listed = arguments(found)[1 if bound and _takes_self(function) else 0 :]
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    return f"({', '.join(listed)}){returns}"


def arguments(found: Any) -> list[str]:
    """The arguments of a function or of the constructor of a class, one text each."""
    return _class_arguments(found) if isinstance(found, type) else _arguments(function_of(found))


def types(found: Any) -> dict[str, str]:
    """The annotations of the arguments of a function or the fields of a class, by their names."""
    kinds = _annotations(found) if isinstance(found, type) else {}
    for argument in arguments(found):
        name, _, annotation = argument.partition(": ")
        kinds[name.partition("=")[0].lstrip("*")] = annotation.partition(" = ")[0]
    return kinds


def _takes_self(function: ast.FunctionDef) -> bool:
    names = [arg.arg for arg in (*function.args.posonlyargs, *function.args.args)]
    return names[:1] in (["self"], ["cls"])


def _class_arguments(cls: type) -> list[str]:
    for base in cls.__mro__:
        made = described(vars(base).get("__init__"))
        if inspect.isfunction(made) and made.__code__.co_filename != "<string>":
            return _arguments(function_of(made))[1:] if node_of(made) else []
        if dataclasses.is_dataclass(cls) or hasattr(cls, "_fields"):
            return list(_field_arguments(cls))
    return []


def _field_arguments(cls: type) -> Iterator[str]:
    kinds = _annotations(cls)
    if hasattr(cls, "_fields"):
        for name in cls._fields:
            default = f" = {cls._field_defaults[name]!r}" if name in cls._field_defaults else ""
            yield f"{name}: {kinds.get(name, 'Any')}{default}"
        return
    made = [part for part in dataclasses.fields(cls) if part.init]
    keywords = [part for part in made if part.kw_only]
    for part in [*(part for part in made if not part.kw_only), *keywords]:
        if keywords and part is keywords[0]:
            yield "*"
        yield f"{part.name}: {kinds.get(part.name, 'Any')}{_default(part)}"


def _default(part: dataclasses.Field) -> str:
    if part.default is not dataclasses.MISSING:
        return f" = {shortened(repr(part.default))}"
    return " = ..." if part.default_factory is not dataclasses.MISSING else ""


def _annotations(cls: type) -> dict[str, str]:
    kinds: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        node = node_of(base)
        kinds |= {
            part.target.id: re.sub(r"^ClassVar\[(.*)\]$", r"\1", ast.unparse(part.annotation))
            for part in (node.body if node else ())
            if isinstance(part, ast.AnnAssign)
        }
    return kinds


def _arguments(function: ast.FunctionDef) -> list[str]:
    """The arguments one by one; `ast.unparse` of all in one text would need a parser."""
    given = function.args
    names = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(names) - len(given.defaults)) + given.defaults
    listed = [_argument(*pair) for pair in zip(names, defaults, strict=True)]
    if given.posonlyargs:
        listed.insert(len(given.posonlyargs), "/")
    if given.vararg or given.kwonlyargs:
        listed.append("*" + (_argument(given.vararg) if given.vararg else ""))
    listed += map(_argument, given.kwonlyargs, given.kw_defaults)
    return listed + ([f"**{_argument(given.kwarg)}"] if given.kwarg else [])


def _argument(arg: ast.arg, default: ast.expr | None = None) -> str:
    kind = f": {ast.unparse(arg.annotation)}" if arg.annotation else ""
    value = "" if default is None else (" = " if kind else "=") + ast.unparse(default)
    return f"{arg.arg}{kind}{value}"


def function_of(found: Any) -> ast.FunctionDef:
    node = node_of(described(found))
    if not isinstance(node, ast.FunctionDef):
        raise TypeError(f"the source of {found!r} is no function; found {node!r}")
    return node


def node_of(found: Any) -> ast.FunctionDef | ast.ClassDef | None:
    """The definition of a class or a function of the package in its source."""
    if not getattr(found, "__module__", "").startswith("negmaml"):
        return None
    return _definitions(inspect.getsourcefile(found)).get(found.__qualname__)


@cache
def _definitions(file: str) -> dict[str, Any]:
    """All classes, functions and methods of a module by their qualified names."""
    found = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for part in ast.iter_child_nodes(node):
            if isinstance(part, (ast.ClassDef, ast.FunctionDef)):
                found[prefix + part.name] = part
            if isinstance(part, ast.ClassDef):
                visit(part, f"{prefix}{part.name}.")
            elif isinstance(part, ast.If):
                visit(part, prefix)

    visit(ast.parse(Path(file).read_text()), "")
    return found


def described(found: Any) -> Any:
    """The class, or the function below a property, a method and decorators."""
    found = getattr(found, "fget", None) or getattr(found, "func", found)
    return inspect.unwrap(getattr(found, "__func__", found))


def shortened(text: str) -> str:
    text = re.sub(r" at 0x[0-9a-f]+", "", text)
    return text if len(text) <= 60 else "..."
