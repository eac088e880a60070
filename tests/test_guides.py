"""The code blocks, commands and links of the guides of the folders work as written."""

import re

import pytest

from tests.documents import GUIDES, README, ROOT, blocks, broken_links, command_cases, run_command
from tests.documents import run_python as run_blocks

OWN_TEST = ROOT / "negmaml/sweeps/clusters.md"  # on several devices: tests/sweeps/test_guide.py
PYTHON_GUIDES = [path for path in GUIDES if path != OWN_TEST and blocks(path, "python")]
PAGES = [README, *GUIDES, ROOT / "benchmarks/README.md", ROOT / ".github/CONTRIBUTING.md"]


def name_of(path):
    return str(path.relative_to(ROOT).with_suffix(""))


@pytest.mark.parametrize("guide", PYTHON_GUIDES, ids=name_of)
def test_code_blocks_run_in_order(guide, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_blocks(guide, "guide")


@pytest.mark.parametrize("commands", list(command_cases(*GUIDES)))
def test_commands_run(commands, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in commands:
        run_command(command, monkeypatch, capsys)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page):
    assert list(broken_links(page)) == []


def test_every_guide_is_linked_from_readme_or_the_first_page_of_its_folder():
    text = README.read_text()
    for guide in GUIDES:
        first = guide.parent / "README.md"
        assert str(guide.relative_to(ROOT)) in text or f"]({guide.name})" in first.read_text()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paragraphs_begin_with_a_capital_and_no_text_is_left_out(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    cut = [part.strip()[:60] for part in text.split("\n\n") if part.lstrip("\n")[:1].islower()]
    assert not cut
    assert "@@" not in text


@pytest.mark.parametrize("guide", GUIDES, ids=name_of)
def test_a_guide_is_read_in_one_sitting(guide):
    size = len(guide.read_bytes())
    assert 3_000 <= size <= 8_192, f"{size} bytes: split it, or join it with another page"
