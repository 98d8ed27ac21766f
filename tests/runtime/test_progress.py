"""Progress of long work: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import os
import pty

import pytest

from mot_jax.runtime import progress as module
from mot_jax.runtime.progress import duration, progress


def test_a_log_has_lines_with_the_time_left(monkeypatch, capsys):
    seconds = iter([0.0, 4.0, 30.0, 35.0, 130.0, 140.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(seconds))
    with progress("scoring, windows", 1000) as advance:
        for units in (50, 250, 50, 650):  # after 4 s and 35 s no line is due, and at the end none is needed
            advance(units)
    assert capsys.readouterr().err == "scoring, windows: 300 of 1,000, 1:10 left\n"


def test_a_terminal_has_a_bar_and_quiet_work_nothing(monkeypatch, capsys):
    monkeypatch.setattr(module, "_LINE_SECONDS", 0)
    for variable in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    screen, terminal = pty.openpty()
    with open(terminal, "w") as stream:
        monkeypatch.setattr(module.sys, "stderr", stream)
        for quiet in (True, False):
            with progress("counting", 2, quiet) as advance:
                advance(1)
            stream.write("end")
            stream.flush()
    shown = ""
    while shown.count("end") < 2:  # a read returns a part
        shown += os.read(screen, 100_000).decode()
    os.close(screen)
    assert shown.startswith("end") and "counting" in shown and "1/2" in shown and " left" not in shown
    monkeypatch.undo()
    with progress("counting", 2, quiet=True) as advance:
        advance(1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("seconds", "words"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3723, "1:02:03")])
def test_durations(seconds, words):
    assert duration(seconds) == words
