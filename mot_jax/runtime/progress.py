"""Progress of long work on standard error: a bar on a terminal, a line every 10 seconds elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[[int], None]  # called with the number of units finished since the last call

_LINE_SECONDS = 10.0  # between lines


@contextlib.contextmanager
def progress(title: str, total: int, quiet: bool = False, done: int = 0) -> Iterator[Advance]:
    """Show the progress of work of `total` units; nothing if `quiet`. Yields the function that advances it.

    done: units that an earlier command has finished.
    """
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    is_bar = console.is_terminal and not quiet
    bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not is_bar)
    begin = last_line = time.monotonic()
    begun_at = done

    def advance(units: int) -> None:
        nonlocal done, last_line
        done += units
        bar.advance(task, units)
        now = time.monotonic()
        if 0 < done < total and not is_bar and not quiet and now - last_line >= _LINE_SECONDS:
            last_line, left = now, (now - begin) * (total - done) / max(done - begun_at, 1)
            print(f"{title}: {done:,} of {total:,}, {duration(left)} left", file=sys.stderr, flush=True)

    with bar:
        task = bar.add_task(title, total=total, completed=done)
        yield advance


def duration(seconds: float) -> str:
    """Format seconds as `1:02:03` or `4:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
