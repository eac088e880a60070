"""Docstrings of the package as reStructuredText.

Docstrings are plain text: paragraphs, equations as indented blocks, doctests, lists, and sections
such as `Arguments:`. Stars, bars and underscores in them are mathematics, not markup.
"""

import re
from textwrap import dedent, indent

SECTION = re.compile(r"(Arguments|Args|Attributes|Raises|Returns|Yields|Notes?):")
FIELD = re.compile(r"\*{0,2}[A-Za-z_]\w*(, \*{0,2}\w+)*: ")
ITEM = re.compile(r"[-*] ")
# Starts of a line that reStructuredText would read as a list, a field or a directive.
MARKUP_START = re.compile(r"[-+*•:|.=>#~^\"'(]|\w+[.)] ")


def to_rst(text: str, types: dict[str, str] | None = None) -> str:
    """Return a docstring, as `inspect.getdoc` cleans it, in reStructuredText.

    Arguments:
        text: the docstring.
        types: types of arguments in reStructuredText, shown beside their names.
    """
    return "\n\n".join(filter(None, (_block(lines, types or {}) for lines in _blocks(text))))


def summary(text: str) -> str:
    """Return the first sentence line of a docstring in reStructuredText."""
    return inline(" ".join(text.split("\n\n")[0].split()))


def inline(text: str) -> str:
    """Return a line of text in reStructuredText: code stays code, all else is literal text."""
    parts = re.split(r"`+([^`]+)`+", text)
    parts[::2] = (re.sub(r"([\\*_|])", r"\\\1", part) for part in parts[::2])
    parts[1::2] = (f"\\ ``{part.strip()}``\\ " for part in parts[1::2])
    return "".join(parts).strip().removeprefix("\\ ").removesuffix("\\")


def _blocks(text: str) -> list[list[str]]:
    """Split into blocks; indented lines after a gap belong to a section or formula before it."""
    blocks: list[list[str]] = [[]]
    gap = False
    for line in text.splitlines():
        last = blocks[-1]
        if line and last and (_ends_section(last, line) or (gap and not _continues(last, line))):
            _drop_gap(last)
            blocks.append([])
        if line or blocks[-1]:
            blocks[-1].append(line)
        gap = not line
    _drop_gap(blocks[-1])
    return [block for block in blocks if block]


def _drop_gap(block: list[str]) -> None:
    while block and not block[-1]:
        block.pop()


def _continues(block: list[str], line: str) -> bool:
    return line.startswith(" ") and (_in_section(block) or block[0].startswith(" "))


def _ends_section(block: list[str], line: str) -> bool:
    return _in_section(block) and not line.startswith(" ")


def _in_section(block: list[str]) -> bool:
    return bool(SECTION.fullmatch(block[0].strip()))


def _block(lines: list[str], types: dict[str, str]) -> str:
    if _in_section(lines):
        return _section(lines, types)
    if lines[0].startswith(">>> "):
        return ".. code-block:: pycon\n\n" + indent("\n".join(lines), "   ")
    if lines[0].startswith(" ") and _are_fields(dedent("\n".join(lines)).splitlines()):
        return _fields(dedent("\n".join(lines)).splitlines(), types)
    if lines[0].startswith(" "):
        return ".. code-block:: text\n\n" + indent(dedent("\n".join(lines)), "   ")
    if _are_fields(lines):
        return _fields(lines, types)
    if all(map(ITEM.match, _flush(lines))):
        return "\n".join(f"- {inline(' '.join(item)[2:])}" for item in _items(lines))
    return _paragraphs(lines)


def _are_fields(lines: list[str]) -> bool:
    """Whether lines describe attributes, `name: text`, without a header above them."""
    return all(FIELD.match(line) and line[0].islower() for line in _flush(lines))


def _flush(lines: list[str]) -> list[str]:
    return [line for line in lines if line and not line.startswith(" ")]


def _section(lines: list[str], types: dict[str, str]) -> str:
    title, body = lines[0].strip(" :"), dedent("\n".join(lines[1:])).splitlines()
    if title in ("Returns", "Yields") or not FIELD.match(body[0]):
        return f"**{title}**\n\n{to_rst(dedent(chr(10).join(body)))}"
    return f"**{title}**\n\n{_fields(body, types)}"


def _fields(lines: list[str], types: dict[str, str]) -> str:
    """A definition list of `name: text` items."""
    items = []
    for first, *rest in _items(lines):
        names, _, text = first.partition(": ")
        # Literal, since these names are parameters and not other public names.
        terms = ", ".join(f":param-name:`{name}`" for name in names.split(", "))
        known = {types[name]: None for name in names.split(", ") if name in types}
        kind = " : " + ", ".join(known) if known else ""
        body = to_rst("\n".join([text, *dedent("\n".join(rest)).splitlines()]))
        items.append(f"{terms}{kind}\n{indent(body, '   ')}")
    return ".. rst-class:: fields\n\n" + "\n\n".join(items)


def _items(lines: list[str]) -> list[list[str]]:
    items: list[list[str]] = []
    for line in lines:
        if line and not line.startswith(" "):
            items.append([])
        items[-1].append(line)
    return items


def _paragraphs(lines: list[str]) -> str:
    """Join lines; a line of one option, `"name": ...`, starts a paragraph of its own."""
    text = re.sub(r'\n(?="[\w-]+": )', "\n\n", "\n".join(line.strip() for line in lines))
    return "\n\n".join(_guarded(inline(_joined(part))) for part in text.split("\n\n"))


def _joined(text: str) -> str:
    return re.sub(r"(?<=\w-)\n(?=\w)", "", text).replace("\n", " ")


def _guarded(text: str) -> str:
    return f"\\ {text}" if MARKUP_START.match(text) else text
