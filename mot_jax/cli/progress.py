"""Progress of a long command on standard error: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

_SECONDS = 30.0  # between lines


class Progress:
    """Shows how many of `total` items are done, and the time left by the speed so far. Use it as a context manager."""

    def __init__(self, total: int, done: int = 0, shown: bool = True):
        """Begin with `done` items of an earlier command. shown: False for none, and `line` still prints."""
        import rich.console
        import rich.progress

        self._total, self._done, self._begin_done = total, done, done
        self._begin = self._printed = time.monotonic()
        self._shown, self._interactive = shown, shown and sys.stderr.isatty()
        self._bar = rich.progress.Progress(
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(),
            console=rich.console.Console(stderr=True, highlight=False, soft_wrap=True),
            redirect_stdout=False,
            disable=not self._interactive,
        )
        self._task = self._bar.add_task("", total=total, completed=done)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def line(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._interactive:
            self._bar.console.print(text, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def advance(self, count: int) -> None:
        """Count items as done."""
        self._done += count
        self._bar.advance(self._task, count)
        now = time.monotonic()
        if self._shown and not self._interactive and now - self._printed >= _SECONDS:
            from mot_jax.runs.metrics import duration

            self._printed = now
            seconds = (now - self._begin) / max(self._done - self._begin_done, 1) * (self._total - self._done)
            self.line(f"{self._done:,} of {self._total:,} done, left {duration(seconds)}")
