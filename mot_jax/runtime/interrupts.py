"""Ctrl-C ends a command even while its main thread does not react to it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator

_GRACE_SECONDS = 2.0
_unlimited = threading.Event()  # the first Ctrl-C has reached a handler that may take longer


@contextlib.contextmanager
def watch(end: Callable[[], None]) -> Iterator[None]:
    """Call `end` in a thread at the second Ctrl-C, or if the first one does not end this context within 2 s.

    Python's own handler runs in the main thread, when a call of a library such as XLA's compiler has returned, and an
    exception that it raises in a callback of a library is lost. After the first Ctrl-C, any other handler has as much
    time as it needs, for example to save a checkpoint; if it restores Python's, it calls `lift_limit` before. Outside
    of the main thread, and where Ctrl-C is ignored as in the background jobs of a shell, nothing is watched.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    _unlimited.clear()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # gets the number of each signal at once
    threading.Thread(target=_watch, args=(reader, end), name="Ctrl-C", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.close(writer)


def lift_limit() -> None:
    """Give the main thread as much time as it needs after the first Ctrl-C, whose handler calls this."""
    _unlimited.set()


def _watch(reader: int, end: Callable[[], None]) -> None:
    count, deadline = 0, None
    while True:
        ready, _, _ = select.select([reader], [], [], deadline and max(deadline - time.monotonic(), 0))
        if not ready:
            return end()
        number = os.read(reader, 1)
        if not number:  # the context has ended
            return os.close(reader)
        if number[0] == signal.SIGINT:
            count += 1
            if count > 1:
                return end()
            # In this order: a handler may lift the limit and then restore Python's handler between the two.
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler and not _unlimited.is_set():
                deadline = time.monotonic() + _GRACE_SECONDS
