"""Errors that end a command with a message instead of a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ReportedError(Exception):
    """An error that is reported in lines, without a traceback: the base of the three below.

    faults: the lines; each names the field, the value, the rule and a value that works.
    """

    def __init__(self, *faults: str):
        super().__init__("\n".join(faults))
        self.faults = faults


class UserError(ReportedError, ValueError):
    """An error of the user: the same command would fail again. Exit code 2."""


class RetryableError(ReportedError):
    """A failure that may be temporary: the same command may succeed later. Exit code 75."""


class DivergedError(ReportedError):
    """A training run whose loss or parameters have become infinite or NaN: resuming would repeat it. Exit code 3."""


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest of `names`, or all of them if none is close."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; there is {', '.join(names)}"


def error_words(error: Exception) -> str:
    """An exception in one line: its class and the first line of its text."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
