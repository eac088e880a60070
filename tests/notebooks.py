"""The notebooks of negmaml/examples/notebooks, each written from the script beside it.

python -m tests.notebooks             run all scripts, and write the notebooks with their outputs
python -m tests.notebooks NAME ...    only these
python -m tests.notebooks --check     run them in a kernel each, and write nothing
"""

import argparse
import base64
import io
import os
import tempfile
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

from tests.conftest import quick_flags

FOLDER = Path(__file__).parents[1] / "negmaml/examples/notebooks"
NAMES = "first_ten_minutes", "pupils_in_schools", "own_model", "cluster_sweep"
# Parts of texts that differ between machines.
PRIVATE = str(FOLDER.parents[2]), tempfile.gettempdir(), "/home/", "/Users/", " object at 0x"
METADATA = {
    "jupytext": {"formats": "ipynb,py:percent"},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def from_script(name):
    """The notebook of a script, without outputs; the same script gives the same notebook."""
    notebook = jupytext.read(FOLDER / f"{name}.py")
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # not a random one, which every run would change
        cell.metadata = {}
    notebook.metadata = nbformat.from_dict(METADATA)
    return notebook


def executed(name):
    """The notebook with the outputs of a kernel that ran it in an empty folder."""
    notebook = from_script(name)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook, timeout=600, kernel_name="python3", record_timing=False,
            coalesce_streams=True, resources={"metadata": {"path": folder}},
        ).execute()  # fmt: skip
    notebook.metadata = nbformat.from_dict(METADATA)  # without the version of Python
    return notebook


def shrink_figures(notebook):
    """Store each figure with 64 colours, which takes a third of the bytes."""
    for output in (o for cell in notebook.cells for o in cell.get("outputs", ())):
        if figure := output.get("data", {}).get("image/png"):
            image, small = Image.open(io.BytesIO(base64.b64decode(figure))), io.BytesIO()
            image.convert("RGB").quantize(64).save(small, "png", optimize=True)
            output.data["image/png"] = base64.b64encode(small.getvalue()).decode()


def problems(notebook):
    """Sentences on outputs that should not be committed: errors, warnings, paths of a machine."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            text = "".join([output.get("text", ""), *output.get("data", {}).get("text/plain", "")])
            if output.output_type == "error" or output.get("name") == "stderr":
                yield f"{cell.id} has an error or a warning: {text or output.get('evalue')}"
            if any(part in text for part in PRIVATE):
                yield f"{cell.id} shows a path or an address: {text}"


def main():
    """Run the notebooks that are named, or all; write them unless they are only checked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # committed figures are those of a laptop
    if options.check:
        os.environ.setdefault("XLA_FLAGS", quick_flags())
    for name in options.names:
        start = time.perf_counter()
        notebook = executed(name)
        if found := [*problems(notebook)]:
            raise SystemExit("\n".join([f"{name}:", *found]))
        if not options.check:
            shrink_figures(notebook)
            nbformat.write(notebook, FOLDER / f"{name}.ipynb")
        print(f"{name}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
