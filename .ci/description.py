"""The long description of the package: README.md with absolute links, as PyPI needs them.

A hook of hatchling, run when a wheel or an sdist is built. Links lead to the tag of the version.
The address of the repository is `project.urls.Source` in pyproject.toml.
"""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

CODE = re.compile(r"(^```.*?^```)", re.DOTALL | re.MULTILINE)
PICTURE = re.compile(r"""(!\[[^\]]*\]\(|(?:src|srcset)=")(?!https?://)""")
LINK = re.compile(r"""((?<!!)\[[^\[\]]*\]\(|href=")(?!https?://)(?=(#?))""")


def description(text: str, source: str, version: str) -> str:
    """Return the page with an absolute address in place of every relative one."""
    parts = CODE.split(text)
    parts[::2] = [_absolute(part, source, f"v{version}") for part in parts[::2]]
    return "".join(parts)


def _absolute(text: str, source: str, tag: str) -> str:
    text = PICTURE.sub(rf"\1{source}/raw/{tag}/", text)
    page = {"#": "README.md", "": ""}  # a heading of this page
    return LINK.sub(lambda found: f"{found[1]}{source}/blob/{tag}/{page[found[2]]}", text)


class DescriptionHook(MetadataHookInterface):
    """Sets the dynamic field `readme` of the project."""

    def update(self, metadata: dict) -> None:
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = description(text, metadata["urls"]["Source"], metadata["version"])
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
