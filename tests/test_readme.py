"""README.md introduces the package in a few pages, and its blocks and commands work as written."""

import re
import tomllib

import pytest

from tests.documents import README, ROOT, blocks, command_cases, run_command, run_python


def test_it_is_an_introduction():
    assert len(README.read_bytes()) <= 12_000  # longer texts belong into the guides
    assert all(len(block.splitlines()) <= 15 for block in blocks(README, "python"))


def test_code_blocks_run_in_order(capsys):
    run_python(README, "readme")
    # The network of the page learns to adapt: the losses after 0 and after 1 step.
    losses = [float(x) for x in re.findall(r"^ +[01] +([0-9.]+) ±", capsys.readouterr().out, re.M)]
    assert len(losses) == 2
    assert losses[1] < 0.3 * losses[0]


@pytest.mark.parametrize("commands", list(command_cases(README)))
def test_commands_run(commands, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in commands:
        run_command(command, monkeypatch, capsys)


def test_installation_commands_name_real_extras():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    commands = "".join(blocks(README, "sh"))
    assert re.findall(r"\.\[([\w,]+)\]", commands) == ["cli,figures", "test"]
    extras = project["optional-dependencies"].keys() - {"test", "dev"}
    assert [name for name in extras if f"`{name}`" not in README.read_text()] == []
