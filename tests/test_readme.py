"""Every command and code block of the README works as written."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
SLOW = "negmaml phases"  # draws thousands of simulated runs


def commands_of(block):
    """The commands of the package itself, without the installation before them."""
    last = [line.split("&&")[-1].strip() for line in block.splitlines()]
    return [command for command in last if re.search(r"negmaml( |\.examples)", command)]


def cases():
    """The commands of each block, which may read what an earlier one wrote."""
    for commands in filter(None, map(commands_of, BLOCKS)):
        slow = [command for command in commands if command.startswith(SLOW)]
        rest = [command for command in commands if command not in slow]
        for some, marks in ((rest, ()), (slow, pytest.mark.slow)):
            if some:
                yield pytest.param(some, marks=marks, id=some[0])


def test_there_is_something_to_test():
    assert len(PYTHON) >= 4
    assert sum(len(commands_of(block)) for block in BLOCKS) >= 9


def test_code_blocks_run_in_order():
    exec(compile("\n".join(PYTHON), "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("commands", cases())
def test_commands_run(commands, tmp_path):
    for command in commands:
        program, *arguments = shlex.split(command)
        if program.endswith("negmaml"):
            arguments = ["-m", "negmaml", *arguments]
        else:
            assert program == "python"
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout


def test_installation_commands_name_real_extras():
    import tomllib

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = {name for block in BLOCKS for name in re.findall(r"\.\[(\w+)\]", block)}
    assert extras == {"all", "test"}
    assert extras <= set(project["optional-dependencies"])
