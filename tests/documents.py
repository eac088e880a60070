"""README.md and the guides as tests read them: their blocks, commands and links."""

import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DERIVATIONS = {"isotropic.md", "anisotropic.md"}
GUIDES = sorted(p for p in ROOT.glob("negmaml/*/*.md") if p.name not in DERIVATIONS)
SLOW = "negmaml phases", "negmaml reproduce --figure nonlinear"  # thousands of runs; training
PROCESS = re.compile(r"\S*negmaml (reproduce|info)$")  # in a process of its own, which others spare


def blocks(path, language):
    """The contents of the fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)


def run_python(path, name):
    """Run the Python blocks in order, as one module."""
    code = blocks(path, "python")
    assert code
    exec(compile("\n".join(code), str(path), "exec"), {"__name__": name})


def commands_of(block):
    """The commands of the package itself, without the installation before them."""
    last = [line.split("&&")[-1].strip() for line in block.splitlines()]
    return [command for command in last if re.search(r"negmaml( |\.examples)", command)]


def command_cases(*paths):
    """The commands of each block, which may read what an earlier one wrote."""
    groups = [commands_of(block) for path in paths for block in blocks(path, "sh")]
    for commands in filter(None, groups):
        slow = [command for command in commands if command.startswith(SLOW)]
        rest = [command for command in commands if command not in slow]
        for some, marks in ((rest, ()), (slow, pytest.mark.slow)):
            if some:
                yield pytest.param(some, marks=marks, id=some[0])


def run_command(command, monkeypatch, capsys):
    """Run a command of a block, as a shell would; raises if it fails."""
    program, *arguments = shlex.split(command)
    module = "negmaml"
    if not program.endswith("negmaml"):
        assert [program, arguments[0]] == ["python", "-m"]
        module, *arguments = arguments[1:]
    if PROCESS.match(command):
        assert _run_in_a_process(module, arguments)
    else:
        _run_here(module, arguments, monkeypatch, capsys)


def _run_in_a_process(module, arguments):
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def _run_here(module, arguments, monkeypatch, capsys):
    """As `python -m` would, without the seconds of another import of everything."""
    module = f"{module}.__main__" if module == "negmaml" else module
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    try:
        runpy.run_path(importlib.util.find_spec(module).origin, run_name="__main__")
    except SystemExit as end:
        assert not end.code, capsys.readouterr().err


def headings(path):
    """The anchors of the headings of a page, as GitHub forms them."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


def broken_links(path):
    """The links of a page to files or headings that do not exist."""
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        page = (path.parent / name).resolve() if name else path
        if not page.exists() or (anchor and anchor not in headings(page)):
            yield target
