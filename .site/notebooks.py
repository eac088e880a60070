"""Notebooks with their stored outputs as Markdown; nothing is executed."""

import base64
import json
import re
from collections.abc import Callable

# Only notebooks have formulas between dollars; in other texts a dollar is a dollar.
HEAD = "---\nmyst:\n  enable_extensions: [dollarmath]\n---"


def to_markdown(
    text: str, name: str, rewrite: Callable[[str], str]
) -> tuple[str, dict[str, bytes]]:
    """Return a page in Markdown, and the pictures it shows by the names of their files.

    Arguments:
        text: the file of the notebook.
        name: how names of pictures begin.
        rewrite: changes the texts of cells, such as their links.
    """
    parts, pictures = [HEAD], {}
    for number, cell in enumerate(json.loads(text)["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(rewrite(source))
        elif cell["cell_type"] == "code" and source.strip():
            parts.append(_fenced("python", source))
            for k, output in enumerate(cell["outputs"]):
                parts.append(_output(output, f"{name}-{number}-{k}.png", pictures))
    return "\n\n".join(filter(None, parts)) + "\n", pictures


def _output(output: dict, picture: str, pictures: dict[str, bytes]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        pictures[picture] = base64.b64decode("".join(data["image/png"]))
        return f"![Output of the code above]({picture})"
    if "text/html" in data:
        return _fenced("{raw} html", "".join(data["text/html"]))
    text = "".join(output.get("text", data.get("text/plain", output.get("traceback", ""))))
    return _fenced("{code-block} text\n:class: output\n", text.rstrip()) if text.strip() else ""


def _fenced(language: str, text: str) -> str:
    ticks = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`+", text))])
    return f"{ticks}{language}\n{text}\n{ticks}"
