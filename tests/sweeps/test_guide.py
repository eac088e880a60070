"""The code blocks of the guide run as written on eight devices."""

import re
from pathlib import Path

from tests.helpers import python

GUIDE = Path(__file__).parents[2] / "negmaml/sweeps/README.md"
EIGHT = 'import jax\njax.config.update("jax_num_cpu_devices", 8)\n'


def test_code_blocks_run_in_order_on_eight_devices():
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    check = (
        "assert len(gpus) == 8 and params.shape == (16, 3) and simulation.test_loss.size == 5000"
    )
    process = python("\n".join((EIGHT, *blocks, check)))
    error = process.communicate()[1]
    assert process.returncode == 0, error
