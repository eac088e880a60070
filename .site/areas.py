"""The public areas of the package, and the texts of the repository that become pages."""

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Area:
    """A package with public names; `guide` is the page that treats them."""

    module: str
    guide: str

    @property
    def page(self) -> str:
        return f"reference/{self.module.removeprefix('negmaml.')}"

    @property
    def guide_title(self) -> str:
        return title_of(next(path for path, page in PAGES.items() if page == self.guide))


def guides() -> dict[str, str]:
    """The guides of the folders, README.md and others, with their pages."""
    listed = {}
    for path in sorted(ROOT.glob("negmaml/*/*.md")):
        folder = path.parent.name
        name = folder if path.name == "README.md" else path.stem
        kind = "theory" if folder == "theory" and path.name != "README.md" else "guides"
        listed[str(path.relative_to(ROOT))] = f"{kind}/{name}"
    return listed


# Files of the repository and their pages. Links between them follow.
PAGES = {
    "README.md": "index",
    **guides(),
    "benchmarks/README.md": "benchmarks",
    "CHANGELOG.md": "changes",
    ".github/CONTRIBUTING.md": "contributing",
    "CITATION.cff": "citation",
}

# In the order in which README.md introduces them.
AREAS = [
    Area("negmaml", "index"),
    *(
        Area(f"negmaml.{name}", f"guides/{name}")
        for name in (
            "problem", "rules", "linear", "theory", "paper", "meta", "training", "tasks", "kernels",
            "advice", "sweeps", "cli",
        )
    ),
]  # fmt: skip


@cache
def title_of(path: str) -> str:
    """The first heading of a page, without the word that all guides share."""
    title = re.search(r"^# (.*)$", (ROOT / path).read_text(), re.MULTILINE)[1]
    title = title.removeprefix("Guide: ")
    return title[0].upper() + title[1:]


@cache
def repository() -> str | None:
    """The address of the repository in pyproject.toml."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {})
    named = {name.lower(): url.rstrip("/") for name, url in urls.items()}
    return next((named[n] for n in ("repository", "source", "homepage") if n in named), None)


def source_url(path: str, lines: tuple[int, int] | None = None) -> str | None:
    """The address of a file or folder of the repository, at its lines."""
    if repository() is None:
        return None
    kind = "tree" if (ROOT / path).is_dir() else "blob"
    anchor = f"#L{lines[0]}-L{lines[1]}" if lines else ""
    return f"{repository()}/{kind}/HEAD/{path}{anchor}"
