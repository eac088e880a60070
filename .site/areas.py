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
    def guide_pages(self) -> list[str]:
        """The guide and the pages below it."""
        below = [page for page in PAGES.values() if page.startswith(f"{self.guide}/")]
        return [self.guide, *below]

    @property
    def guide_title(self) -> str:
        return title_of_page(self.guide)


def guides() -> dict[str, str]:
    """The guides with their pages: README.md of each folder, then its other pages."""
    listed = {}
    for path in sorted(ROOT.glob("negmaml/*/*.md"), key=lambda path: _order(path.stem)):
        folder = f"guides/{path.parent.name}"
        listed[str(path.relative_to(ROOT))] = (
            folder if path.stem == "README" else f"{folder}/{path.stem}"
        )
    return listed


def _order(stem: str) -> tuple[bool, int, str]:
    """README first; the isotropic theory before the anisotropic one, which builds on it."""
    return stem != "README", len(stem), stem


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
    words = title.removeprefix("Guide: ")
    return title if words == title else words[0].upper() + words[1:]


def title_of_page(page: str) -> str:
    """The title of the page of a text of the repository."""
    return title_of(next(path for path, known in PAGES.items() if known == page))


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
