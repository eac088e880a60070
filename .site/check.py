"""Check a built site: links within it lead somewhere, and nothing is loaded from other hosts."""

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src"}


class Page(HTMLParser):
    """The links, loaded files and anchors of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.path, self.links, self.loaded, self.anchors = path, [], [], {""}
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {given[key] for key in ("id", "name") if given.get(key)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag in LOADED and given.get(LOADED[tag]):
            self.loaded.append(given[LOADED[tag]])


def problems(site: Path) -> list[str]:
    """Dead links and files of other hosts, one text each."""
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html")}
    found = [f"{css}: loads from another host" for css in site.rglob("*.css") if _remote(css)]
    for page in pages.values():
        name = page.path.relative_to(site)
        found += [f"{name} loads {url}" for url in page.loaded if urlsplit(url).netloc]
        found += [
            f"{name} has a dead link to {url}"
            for url in page.links + page.loaded
            if not _leads_somewhere(url, page, pages)
        ]
    return found


def _leads_somewhere(url: str, page: Page, pages: dict[Path, Page]) -> bool:
    parts = urlsplit(url)
    if parts.scheme or parts.netloc:
        return True
    path = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path.resolve()
    if path in pages:
        return unquote(parts.fragment) in pages[path].anchors
    return path.is_file()


def _remote(css: Path) -> bool:
    text = css.read_text()
    return any(
        f"{start}{quote}http" in text for start in ("url(", "@import ") for quote in "'\""
    ) or ("url(http" in text)
