"""Stage the pages of the site from the files of the repository.

Texts are in git once, where a reader of the repository finds them. Links between them become links
between pages; links to other files become links to the repository.
"""

import os
import re
import shutil
from pathlib import Path

import commands
import gallery
import notebooks
import public_names
import yaml
from areas import AREAS, PAGES, ROOT, source_url, title_of_page

# Blocks of code, and code in a line that looks like a link.
CODE = re.compile(r"(^ *```.*?^ *```|`[^`\n]*\]\([^`\n]*`)", re.DOTALL | re.MULTILINE)
# The order of the tutorials; others follow.
ORDER = ("first_ten_minutes", "pupils_in_schools", "own_model", "cluster_sweep")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def stage(folder: Path) -> None:
    """Write all pages and figures into a new folder."""
    pages = {f"{area.page}.rst": public_names.page(area) for area in AREAS}
    pages["reference/commands.md"] = commands.page()
    pages["reference/index.rst"] = _reference_index()
    pages["gallery.md"] = gallery.page(rewrite)
    pages["citation.md"] = citation()
    for path, page in PAGES.items():
        if path.endswith(".md"):
            pages[f"{page}.md"] = rewrite((ROOT / path).read_text(), path, page)
    for path in tutorials():
        pages |= _tutorial(path)
    pages["index.md"] += _navigation()
    for area in AREAS:
        pages[f"{area.guide}.md"] += _contents([_titled(page) for page in area.guide_pages[1:]])
    for name, text in pages.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(text if isinstance(text, bytes) else text.encode())
    shutil.copytree(ROOT / "benchmarks", folder / "figures", ignore=_all_but_pictures)


def tutorials() -> list[Path]:
    """The notebooks of the package, from the first steps to the largest study."""
    found = [
        path
        for path in ROOT.glob("negmaml/examples/**/*.ipynb")
        if ".ipynb_checkpoints" not in path.parts
    ]
    known = [path for name in ORDER for path in found if path.stem == name]
    return known + sorted(path for path in found if path not in known)


def rewrite(text: str, source: str, page: str) -> str:
    """Let the links of a text, relative to the file `source`, work on `page`."""
    parts = CODE.split(text)
    parts[::2] = (
        LINK.sub(lambda link: _rewritten(*link.groups(), source, page), part) for part in parts[::2]
    )
    return "".join(parts)


def _rewritten(image: str, text: str, target: str, source: str, page: str) -> str:
    if re.match(r"[a-z]+:|#", target):
        return f"{image}[{text}]({target})"
    name, hash_, anchor = target.partition("#")
    path = os.path.normpath(os.path.join(os.path.dirname(source), name))
    if not (ROOT / path).exists():
        raise ValueError(f"{source} links to {target}, which does not exist")
    place = _place(path)
    if place is None:
        url = source_url(path)
        return f"{image}[{text}]({url})" if url else text
    relative = os.path.relpath(place, os.path.dirname(page) or ".")
    return f"{image}[{text}]({relative}{hash_}{anchor})"


def _place(path: str) -> str | None:
    """The file of the staged site that stands for a file of the repository, if there is one."""
    if path in PAGES:
        return f"{PAGES[path]}.md"
    if ROOT / path in tutorials():
        return f"tutorials/{Path(path).stem}.md"
    if re.fullmatch(r"benchmarks/\w+\.(png|svg)", path):
        return path.replace("benchmarks", "figures")
    return None


def _tutorial(path: Path) -> dict[str, str | bytes]:
    """The page of a notebook, and its pictures."""
    source, page = str(path.relative_to(ROOT)), f"tutorials/{path.stem}"
    text, pictures = notebooks.to_markdown(
        path.read_text(), path.stem, lambda cell: rewrite(cell, source, page)
    )
    if url := source_url(source):
        text += f"\nThis page is a notebook: [{path.name}]({url}).\n"
    return {f"{page}.md": text} | {f"tutorials/{name}": data for name, data in pictures.items()}


def citation() -> str:
    """The page of CITATION.cff: the paper and the software, for readers and for BibTeX."""
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    paper = cff["preferred-citation"]
    bibtex = "\n\n".join(
        [
            _bibtex("inproceedings", "negmaml-paper", paper, booktitle=paper["collection-title"]),
            _bibtex("software", "negmaml", cff, version=cff["version"]),
        ]
    )
    return f"# Citation\n\n{cff['message']}\n\n```bibtex\n{bibtex}\n```\n"


def _bibtex(kind: str, key: str, work: dict, **more: str) -> str:
    fields = {
        "title": f"{{{work['title']}}}",
        "author": " and ".join(map(_author, work["authors"])),
    }
    fields |= more
    fields |= {name: work[name] for name in ("year", "doi", "url") if name in work}
    return f"@{kind}{{{key},\n" + "".join(f"  {k} = {{{v}}},\n" for k, v in fields.items()) + "}"


def _author(person: dict) -> str:
    if "name" in person:
        return f"{{{person['name']}}}"
    return f"{person['family-names']}, {person['given-names']}"


def _navigation() -> str:
    """The hidden tables of contents of the first page, which the sidebar shows."""
    sections = {
        "Tutorials": [f"/tutorials/{path.stem}" for path in tutorials()],
        "Guides": [_titled(area.guide) for area in AREAS if area.guide != "index"],
        "Reference": ["/reference/index"],
        "Results": ["/gallery", "/benchmarks"],
        "Project": ["/changes", "/contributing", "/citation"],
    }
    return "".join(_contents(entries, caption) for caption, entries in sections.items())


def _contents(entries: list[str], caption: str = "") -> str:
    if not entries:
        return ""
    options = ":hidden:\n" + (f":caption: {caption}\n" if caption else "")
    return "\n```{toctree}\n" + options + "\n" + "\n".join(entries) + "\n```\n"


def _titled(page: str) -> str:
    return f"{title_of_page(page)} </{page}>"


def _reference_index() -> str:
    pages = [Path(area.page).name for area in AREAS] + ["commands"]
    listed = "\n".join(f"   {page}" for page in pages)
    title = "Public names"
    text = (
        "One page for each area, and :doc:`one for the command line <commands>`. "
        "Names that are not listed may change without notice."
    )
    head = f"{title}\n{'=' * len(title)}\n\n{text}"
    contents = f".. toctree::\n   :maxdepth: 1\n   :hidden:\n\n{listed}\n"
    return f"{head}\n\n{public_names.areas_table()}\n\n{contents}"


def _all_but_pictures(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not name.endswith((".png", ".svg"))]
