"""The gallery: all figures of the repository, with the texts of the guides that show them."""

import ast
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
        section = f"[{title_of(figure.guide)}: {figure.section}]"
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
    guides = [path for path in PAGES if path.endswith(".md") and path != "README.md"]
    for guide in sorted(guides, key=lambda path: "paper" not in path):
        for figure in _shown(guide):
            shown.setdefault(figure.name, figure)
    missing = {path.name for path in ROOT.glob("benchmarks/*.png")} - set(shown)
    if missing:
        raise ValueError(f"no guide shows {', '.join(sorted(missing))}")
    return list(shown.values())


def command(name: str) -> str:
    """The commands that draw a figure: of the package, else its script in `benchmarks`."""
    stem = Path(name).stem
    for node in ast.parse((ROOT / "benchmarks/figures.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FIGURES":
            known = ast.literal_eval(node.value)
            if stem in known:
                return "\n".join(shlex.join(["negmaml", *call]) for call in known[stem])
    script = ROOT / "benchmarks" / f"{stem}.py"
    usage = ast.get_docstring(ast.parse(script.read_text()))
    # The first call in the docstring, without its optional arguments and its explanation.
    return re.search(rf"python benchmarks/{stem}\.py(?: [\w-]+)*", usage)[0]


def anchor(heading: str) -> str:
    """The anchor of a heading, as GitHub forms it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _shown(guide: str) -> Iterator[Figure]:
    section = ""
    blocks = re.split(r"\n\s*\n", re.sub(r"^```.*?^```\n", "", _text(guide), flags=re.S | re.M))
    for before, block, after in zip(["", *blocks], blocks, [*blocks[1:], "#"], strict=False):
        if block.startswith("#"):
            section = block.splitlines()[0].lstrip("# ")
        image = IMAGE.match(block)
        if image and image[2].endswith(".png"):
            caption = before if after.startswith(("#", "!", "|")) else after
            yield Figure(Path(image[2]).name, image[1], caption.strip(), guide, section)


def _text(guide: str) -> str:
    return (ROOT / guide).read_text()
