"""Hundreds of calls of everything public: refused in our words before any work, or right.

A table for each area lists them; wrong ones are generated, every argument of a kind being given
every value that is wrong for its kind.
"""

import re
import traceback

import jax
import numpy as np
import pytest

from negmaml.cli import run
from tests.calls import advice, kernels, meta, paper, problem, rules, sweeps, theory

AREAS = (rules, problem, theory, meta, kernels, advice, sweeps, paper)
WRONG = [row for area in AREAS for row in area.WRONG]
RIGHT = [row for area in AREAS for row in area.RIGHT]
compiled: list[str] = []


@jax.monitoring.register_event_duration_secs_listener
def _note(event, _, **facts):
    if event == "/jax/core/compile/backend_compile_duration":
        compiled.append(facts.get("fun_name", ""))


def test_there_are_enough_of_them():
    assert len(WRONG) >= 300 and len(RIGHT) >= 50


@pytest.mark.parametrize("row", WRONG, ids=str)
def test_a_wrong_call_is_refused_in_our_words(row):
    compiled.clear()
    with pytest.raises(row.error) as caught:
        row.function(**row.arguments)
    message = str(caught.value)
    last = traceback.extract_tb(caught.tb)[-1].filename
    assert "negmaml" in last and "site-packages" not in last, f"raised in {last}: {message}"
    assert re.search(row.said, message), message
    assert re.search(r"\bgot\b|without|missing|no ", message), message
    assert not compiled
