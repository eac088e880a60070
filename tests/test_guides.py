"""The code blocks, commands and links of the guides of the folders work as written."""

import pytest

from tests.documents import GUIDES, README, ROOT, broken_links, command_cases, run_command
from tests.documents import run_python as run_blocks

OWN_TEST = ("sweeps",)  # on several devices: tests/sweeps/test_guide.py
PYTHON_GUIDES = [path for path in GUIDES if path.parent.name not in OWN_TEST]
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


def test_readme_links_to_every_guide():
    text = README.read_text()
    assert [name_of(path) for path in GUIDES if str(path.relative_to(ROOT)) not in text] == []
