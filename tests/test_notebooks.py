"""The notebooks are written from their scripts, which run, and are fit for readers."""

import re
import runpy
import warnings

import nbformat
import pytest

from negmaml.examples import pupils
from tests.documents import broken_links
from tests.internals import plotting
from tests.notebooks import FOLDER, NAMES, from_script, problems

pytest.importorskip("matplotlib")


def committed(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def test_every_script_has_a_notebook_and_every_notebook_a_script():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {*NAMES}
    assert {path.stem for path in FOLDER.glob("[a-z]*.py")} == {*NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_has_the_cells_of_its_script(name):
    script, notebook = from_script(name), committed(name)
    assert notebook.metadata == script.metadata
    assert [(c.id, c.cell_type, c.source) for c in notebook.cells] == [
        (c.id, c.cell_type, c.source) for c in script.cells
    ], "write it again: python -m tests.notebooks"


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_was_run_in_order_without_warnings(name):
    notebook = committed(name)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert [*problems(notebook)] == []
    assert all(not cell.metadata for cell in notebook.cells)  # no times of execution


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_can_be_read(name):
    notebook = committed(name)
    first, *rest = notebook.cells
    assert first.source.startswith("# ") and "**At the end you can**" in first.source
    assert "## Next steps" in rest[-1].source
    for cell in rest:
        assert cell.cell_type != "code" or len(re.findall(r"^.+$", cell.source, re.M)) <= 16
    assert [*broken_links(FOLDER / f"{name}.ipynb")] == []


@pytest.mark.parametrize("name", ("first_ten_minutes", "own_model", "cluster_sweep"))
def test_negative_rates_have_the_colour_of_all_figures(name):
    text = (FOLDER / f"{name}.py").read_text()
    names, values = re.search(r"^(NEGATIVE.*?) = (.*)$", text, re.M).groups()
    found = dict(zip(names.split(", "), re.findall("#[0-9a-f]{6}", values), strict=True))
    assert found == {name: getattr(plotting, name) for name in found}


def test_the_notebooks_are_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 1_000_000


@pytest.mark.slow  # `python -m tests.notebooks --check` runs the notebooks themselves
@pytest.mark.parametrize("name", NAMES)
def test_a_script_runs_and_its_statements_hold(name, tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(), pyplot.rc_context():
        # A notebook shows its figures; in a test they have nowhere to go.
        warnings.filterwarnings("ignore", ".*non-interactive", UserWarning)
        runpy.run_path(str(FOLDER / f"{name}.py"))
    pyplot.close("all")


def test_the_notebooks_can_be_copied_and_nothing_is_overwritten(tmp_path):
    from negmaml.examples.notebooks.__main__ import main

    assert [path.stem for path in main(str(tmp_path / "mine"))] == sorted(NAMES)
    with pytest.raises(ValueError, match=r"'cluster_sweep\.ipynb' yet"):
        main(str(tmp_path / "mine"))


def test_the_file_of_pupils_is_the_one_that_its_module_writes(tmp_path):
    pupils.main(str(tmp_path / "pupils.csv"))
    assert (tmp_path / "pupils.csv").read_bytes() == pupils.FILE.read_bytes()
    assert len(pupils.content()) < 60_000
