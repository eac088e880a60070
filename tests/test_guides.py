"""Every Python block of the guides, the README.md of a folder of the package, works as written."""

import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "negmaml"
OWN_TEST = ("sweeps",)  # on several devices: tests/sweeps/test_guide.py
GUIDES = [p for p in sorted(PACKAGE.glob("*/README.md")) if p.parent.name not in OWN_TEST]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.parent.name)
def test_code_blocks_run_in_order(guide, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", guide.read_text(), re.DOTALL)
    assert blocks
    exec(compile("\n".join(blocks), str(guide), "exec"), {"__name__": "guide"})
