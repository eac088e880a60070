"""Every command and code block of the README works as written."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in
            block.splitlines()]  # fmt: skip


def negmaml_commands():
    """The commands of the package itself, without the installation before them."""
    last = [command.split("&&")[-1].strip() for command in COMMANDS]
    return [command for command in last if re.search(r"negmaml( |\.examples)", command)]


def test_there_is_something_to_test():
    assert len(PYTHON) >= 4
    assert len(negmaml_commands()) >= 7


def test_code_blocks_run_in_order():
    exec(compile("\n".join(PYTHON), "README.md", "exec"), {"__name__": "readme"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all commands: some read what an earlier one wrote."""
    return tmp_path_factory.mktemp("readme")


@pytest.mark.parametrize("command", negmaml_commands())
def test_command_runs(command, folder):
    program, *arguments = shlex.split(command)
    if program.endswith("negmaml"):
        arguments = ["-m", "negmaml", *arguments]
    else:
        assert program == "python"
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_installation_commands_name_real_extras():
    import tomllib

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = {name for command in COMMANDS for name in re.findall(r"\.\[(\w+)\]", command)}
    assert extras == {"all", "test"}
    assert extras <= set(project["optional-dependencies"])
