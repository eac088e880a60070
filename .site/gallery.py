"""The gallery: all figures of the repository, with the texts of the guides that show them."""

import ast
import contextlib
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from areas import PAGES, ROOT, title_of

IMAGE = re.compile(r"!\[([^\]]+)\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Figure:
    """A figure as a guide shows it, below the heading `section`."""

    name: str
    title: str
    caption: str
    guide: str
    section: str


def page(rewrite: Callable[[str, str, str], str]) -> str:
    """The gallery in Markdown; `rewrite` lets links of a guide work on another page."""
    parts = ["# Gallery", "The figures of the guides, and the commands that draw them."]
    for figure in figures():
        section = f"[{title_of(figure.guide)}, {figure.section}]"
        link = f"{section}({Path(figure.guide).name}#{anchor(figure.section)})"
        text = f"{figure.caption}\n\nGuide: {link}"
        parts += [
            f"## {figure.title}",
            f"![{figure.title}](figures/{figure.name})",
            f"```sh\n{command(figure.name)}\n```",
            rewrite(text, figure.guide, "gallery"),
        ]
    return "\n\n".join(parts) + "\n"


def figures() -> list[Figure]:
    """All pictures in `benchmarks`, in the order of the guides; raises if no guide shows one."""
    shown: dict[str, Figure] = {}
    guides = [path for path in PAGES if path.endswith(".md")]
    # The guide to the figures first, and README.md for those that no guide shows.
    for guide in sorted(guides, key=lambda path: ("paper" not in path, path == "README.md")):
        for figure in _shown(guide):
            shown.setdefault(figure.name, figure)
    missing = {path.name for path in ROOT.glob("benchmarks/*.png")} - set(shown)
    if missing:
        raise ValueError(f"no guide shows {', '.join(sorted(missing))}")
    return list(shown.values())


def command(name: str) -> str:
    """The commands that draw a figure: of the package, else a script in `benchmarks`."""
    stem = Path(name).stem
    figures = (ROOT / "benchmarks/figures.py").read_text()
    if stem in (known := _commands(figures)):
        return "\n".join(shlex.join(["negmaml", *call]) for call in known[stem])
    script = ROOT / "benchmarks" / f"{stem}.py"
    if script.exists():
        usage = ast.get_docstring(ast.parse(script.read_text()))
        # The first call in the docstring, without its optional arguments and its explanation.
        return re.search(rf"python benchmarks/{stem}\.py(?: [\w-]+)*", usage)[0]
    if f'"{stem}"' not in figures:
        raise ValueError(f"benchmarks/{name} needs a command in benchmarks/figures.py")
    return f"python benchmarks/figures.py {stem}"


def _commands(figures: str) -> dict[str, list[list[str]]]:
    """The table of commands of benchmarks/figures.py, which is not run."""
    tables = (node.value for node in ast.parse(figures).body if isinstance(node, ast.Assign))
    for table in tables:
        with contextlib.suppress(ValueError):
            if isinstance(table, ast.Dict):
                return ast.literal_eval(table)
    raise ValueError("benchmarks/figures.py has no table of commands")


def anchor(heading: str) -> str:
    """The anchor of a heading, as GitHub forms it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _shown(guide: str) -> Iterator[Figure]:
    text = re.sub(r"^```.*?^```$", "```", (ROOT / guide).read_text(), flags=re.S | re.M)
    blocks = ["", *re.split(r"\n\s*\n", text), "#"]
    section = ""
    for i, block in enumerate(blocks):
        if block.startswith("#"):
            section = block.splitlines()[0].lstrip("# ")
        image = IMAGE.match(block)
        if image and image[2].endswith(".png"):
            before = blocks[i - 1]
            after = next(part for part in blocks[i + 1 :] if part != "```")
            caption = before if _is_introduced(before, after) else after
            yield Figure(Path(image[2]).name, image[1], caption.strip(), guide, section)


def _is_introduced(before: str, after: str) -> bool:
    """Whether the text before a figure is about it, not the text after it."""
    if after.startswith("*"):  # a caption
        return False
    return before.endswith(":") or after.startswith(("#", "!", "|"))
