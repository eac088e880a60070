"""Progress is a bar on a terminal, and plain lines in a log."""

import os
import pty
import re
import subprocess
import sys
import time

from tests.internals import ProgressLog, duration, progress, shown_progress


def test_a_line_has_the_share_the_time_and_an_estimate():
    now = [0.0]
    log = ProgressLog("sweep", "cells", lambda: now[0])
    now[0] = 35.0
    assert log.line() == "sweep: starting, 0:00:35 elapsed"
    log(400, 1000)  # resumed with 400 cells
    assert log.line() == "sweep: 400 of 1,000 cells (40%), 0:00:35 elapsed"
    now[0] = 95.0
    log(500, 1000)
    assert log.line().endswith("(50%), 0:01:35 elapsed, about 0:05:00 left")
    now[0] = 105.0  # nothing new, and time passes
    assert log.line().endswith("about 0:04:50 left")
    log(1000, 1000)
    assert log.line() == "sweep: 1,000 of 1,000 cells (100%), 0:01:45 elapsed"
    log.stage("loss 0.3")
    assert log.line() == "sweep: 1,000 of 1,000 cells (100%), loss 0.3, 0:01:45 elapsed"
    assert duration(3600 * 30 + 61) == "30:01:01"


def test_lines_appear_while_the_work_reports_nothing_and_never_for_short_work(capsys, monkeypatch):
    with shown_progress("sweep", "cells") as report:
        report(1, 2)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(progress, "FIRST_LINE", 0.01)
    with shown_progress("sweep", "cells") as report:
        report.stage("compiling")
        time.sleep(0.2)
        report(2, 2)
    out, err = capsys.readouterr()
    assert not out and err.splitlines() == [
        "sweep: compiling, 0:00:00 elapsed",
        "sweep: 2 of 2 cells (100%), compiling, 0:00:00 elapsed",
    ]


SCRIPT = """
import time
from negmaml._core.progress import shown_progress
with shown_progress("sweep", "cells") as report:
    for i in range(4):
        report(i, 4)
        time.sleep(0.15)
"""


def shown_on_a_terminal(**variables) -> str:
    """What a process writes to a terminal that is its stderr."""
    reader, writer = pty.openpty()
    environment = os.environ | {"TERM": "xterm"} | variables
    subprocess.run([sys.executable, "-c", SCRIPT], stderr=writer, check=True, env=environment)
    os.close(writer)
    found = os.read(reader, 10**6).decode() if variables.get("TERM") != "dumb" else ""
    os.close(reader)
    return found


def test_a_terminal_gets_a_bar_and_a_dumb_one_lines():
    shown = shown_on_a_terminal()
    assert "\x1b[" in shown and re.search("[01]/4", shown)
    assert "\x1b[3" not in shown_on_a_terminal(NO_COLOR="1")
