"""Mistakes of the user's, in words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake of the user's. Each fault is one line: the field, the value, the rule, a value that would work."""

    def __init__(self, *faults: str):
        super().__init__("\n".join(faults))
        self.faults = faults


class RetryableError(UserError):
    """No mistake of the user's: the same may work later. Told in the same way, with another exit code."""


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest of `names`, or all of them if none is close."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; there is {', '.join(names)}"


def error_words(error: Exception) -> str:
    """An exception in one line: its class and the first line of its text."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
