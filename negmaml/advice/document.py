"""A short document of headings, paragraphs, tables and definitions, as text, Markdown or HTML."""

import html
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

WIDTH = 100  # characters of a line of text
FORMATS = ("text", "markdown", "html")
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body{{font-family:sans-serif;max-width:52em;margin:2em auto;line-height:1.45}}
table{{border-collapse:collapse}}td,th{{padding:.2em .8em;text-align:left;
border-bottom:1px solid #ccc}}dt{{font-weight:bold}}</style></head>
<body>
{body}
</body></html>
"""


class Grid(NamedTuple):
    """A table: its column heads, and rows of texts."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


class Section(NamedTuple):
    """A part of a document.

    title: its heading; empty for the first part, which has the title of the document.
    parts: paragraphs, tables, and dictionaries of terms with their definitions.
    """

    title: str
    parts: Sequence[str | Grid | dict[str, str]]


def render(title: str, sections: Sequence[Section], form: str) -> str:
    """Return the document in one of `FORMATS`."""
    block = {"text": _text, "markdown": _markdown, "html": _html}[form]
    heading = {
        "text": lambda text, level: f"{text}\n{'=-'[level - 1] * len(text)}",
        "markdown": lambda text, level: f"{'#' * level} {text}",
        "html": lambda text, level: f"<h{level}>{html.escape(text)}</h{level}>",
    }[form]
    blocks = [heading(title, 1)]
    for section in sections:
        blocks += [heading(section.title, 2)] if section.title else []
        blocks += [block(part) for part in section.parts]
    body = ("\n" if form == "html" else "\n\n").join(blocks)
    return PAGE.format(title=html.escape(title), body=body) if form == "html" else body + "\n"


def _text(part) -> str:
    if isinstance(part, str):
        return textwrap.fill(part, WIDTH, break_on_hyphens=False)
    if isinstance(part, dict):
        indent = "    "
        return "\n".join(
            textwrap.fill(f"{term}: {meaning}.", WIDTH, subsequent_indent=indent,
                          break_on_hyphens=False)
            for term, meaning in part.items()
        )  # fmt: skip
    widths = [max(len(row[i]) for row in (part.head, *part.rows)) for i in range(len(part.head))]
    return "\n".join(
        "  ".join(map(str.ljust, row, widths)).rstrip() for row in (part.head, *part.rows)
    )


def _markdown(part) -> str:
    if isinstance(part, str):
        return _escaped(part)
    if isinstance(part, dict):
        return "\n".join(f"- **{_escaped(t)}**: {_escaped(m)}." for t, m in part.items())
    lines = [part.head, ["---"] * len(part.head), *part.rows]
    return "\n".join("| " + " | ".join(map(_escaped, row)) + " |" for row in lines)


def _escaped(text: str) -> str:
    """Escape what Markdown would read as markup, in names of columns for example."""
    for mark in "\\`*_|<":
        text = text.replace(mark, "\\" + mark)
    return text


def _html(part) -> str:
    if isinstance(part, str):
        return f"<p>{html.escape(part)}</p>"
    if isinstance(part, dict):
        lines = [f"<dt>{html.escape(t)}</dt><dd>{html.escape(m)}.</dd>" for t, m in part.items()]
        return "<dl>\n" + "\n".join(lines) + "\n</dl>"

    def row(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    return "\n".join(
        ["<table>", row(part.head, "th"), *(row(r, "td") for r in part.rows), "</table>"]
    )
