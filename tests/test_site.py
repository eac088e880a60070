"""The site: its pages from docstrings, guides and notebooks; `.site/build.py` builds all of it."""

import base64
import importlib
import inspect
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / ".site"))

import areas  # noqa: E402
import check  # noqa: E402
import docstrings  # noqa: E402
import gallery  # noqa: E402
import notebooks  # noqa: E402
import public_names  # noqa: E402
import signatures  # noqa: E402
import stage  # noqa: E402

PACKAGES = sorted(
    path.parent.name
    for path in ROOT.glob("negmaml/[a-z]*/__init__.py")
    if path.parent.name != "examples"
)


@pytest.fixture(scope="module")
def pages():
    return {area.module: public_names.page(area) for area in areas.AREAS}


def test_every_package_is_an_area():
    named = {area.module.removeprefix("negmaml.") for area in areas.AREAS[1:]}
    assert named == set(PACKAGES)


@pytest.mark.parametrize("area", areas.AREAS, ids=lambda area: area.module)
def test_every_public_name_is_in_the_reference(area, pages):
    module = importlib.import_module(area.module)
    for name in module.__all__:
        value = getattr(module, name)
        if not isinstance(value, ModuleType):
            entry = public_names.entry_of()[id(value)]
            assert f":: {entry.short}" in pages[entry.area.module]
            assert public_names.aliases()[f"{area.module}.{name}"] == entry.name
            assert f"<{entry.name}>" in pages[area.module]  # the table of the page


def test_signatures_name_the_arguments_that_python_knows():
    for entry in public_names.entries():
        try:
            known = list(inspect.signature(entry.found).parameters)
        except (TypeError, ValueError):  # neither a class nor a function, or an exception
            continue
        written = [re.match(r"\**(\w*)", text)[1] for text in signatures.arguments(entry.found)]
        # A protocol has no constructor of its own.
        assert list(filter(None, written)) == known or known == ["args", "kwargs"], entry.name


def test_signatures_have_types_and_defaults_of_the_source(pages):
    text = "simulate(key: PRNGKeyArray, problem: MixedLinearRegression, train: InnerRule"
    assert text in pages["negmaml.linear"]
    assert "GradientDescent(rate: Rate, steps: int = 1)" in pages["negmaml.rules"]


def test_sources_are_found_by_names():
    path, first, last = public_names.source_of("negmaml.fit")
    lines = (ROOT / path).read_text().splitlines()[first - 1 : last]
    assert path == "negmaml/training/loop.py"
    assert any(line.startswith("def fit(") for line in lines)


def test_a_docstring_keeps_formulas_and_describes_arguments():
    text = docstrings.to_rst(
        "Return a*b_ of `x`.\n\n    y = a * |x|\n\n"
        "Arguments:\n    n, m: sizes\n        of x.\n\n>>> 1\n1",
        {"n": "int"},
    )
    assert text.split("\n\n") == [
        r"Return a\*b\_ of \ ``x``\ .",
        ".. code-block:: text",
        "   y = a * |x|",
        "**Arguments**",
        ".. rst-class:: fields",
        ":param-name:`n`, :param-name:`m` : int\n   sizes of x.",
        ".. code-block:: pycon",
        "   >>> 1\n   1",
    ]


def test_links_lead_to_pages_or_to_the_repository(monkeypatch):
    monkeypatch.setattr(stage, "source_url", lambda path: f"https://example.org/{path}")
    text = "[a](../meta/README.md#b) [c](api.py) [d](#e) ![f](../../benchmarks/phases.png) `[g](h)`"
    assert stage.rewrite(text, "negmaml/theory/README.md", "guides/theory") == (
        "[a](meta.md#b) [c](https://example.org/negmaml/theory/api.py) [d](#e) "
        "![f](../figures/phases.png) `[g](h)`"
    )
    with pytest.raises(ValueError, match="which does not exist"):
        stage.rewrite("[a](missing.md)", "README.md", "index")


def test_all_texts_have_links_that_exist():
    for path, page in areas.PAGES.items():
        if path.endswith(".md"):
            stage.rewrite((ROOT / path).read_text(), path, page)


def test_a_notebook_shows_code_and_stored_outputs():
    cells = [
        {"cell_type": "markdown", "source": ["# A\n", "b"]},
        {
            "cell_type": "code",
            "source": ["1 + 1"],
            "outputs": [
                {"data": {"text/plain": ["2"]}},
                {"data": {"image/png": base64.b64encode(b"picture").decode()}},
            ],
        },
    ]
    text, pictures = notebooks.to_markdown(json.dumps({"cells": cells}), "n", str.upper)
    assert "# A\nB\n\n```python\n1 + 1\n```" in text
    assert ":class: output\n\n2\n```" in text
    assert pictures == {"n-1-1.png": b"picture"}


def test_every_figure_is_in_the_gallery_with_the_command_that_draws_it():
    names = {path.name for path in ROOT.glob("benchmarks/*.png")}
    shown = gallery.figures()
    assert {figure.name for figure in shown} == names
    for figure in shown:
        assert figure.caption
        assert gallery.command(figure.name).startswith(("negmaml ", "python benchmarks/"))


def test_the_check_of_a_site_finds_dead_links_and_remote_files(tmp_path):
    (tmp_path / "a.html").write_text(
        '<a href="b.html#x">a</a><a href="b.html#y">a</a><a href="c.html">a</a>'
        '<script src="https://example.org/s.js"></script><a href="https://example.org">a</a>'
    )
    (tmp_path / "b.html").write_text('<p id="x"></p>')
    (tmp_path / "s.css").write_text("@import 'https://example.org/s.css';")
    found = check.problems(tmp_path)
    assert [problem.split()[-1] for problem in found] == [
        "host", "https://example.org/s.js", "b.html#y", "c.html",
    ]  # fmt: skip
