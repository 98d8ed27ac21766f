"""Run tasks in several processes, with a progress bar."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mot_jax.errors import UserError

Advance = Callable[[int], None]  # called with the number of units finished since the last call
Task = TypeVar("Task")

_LINE_INTERVAL = 10.0  # seconds between progress lines where stderr is not a terminal


def run_in_processes(
    function: Callable[[Task, Advance], None], tasks: Sequence[Task], workers: int | None, title: str, total: int
) -> None:
    """Call function(task, advance) for each task, in up to `workers` processes; None for one per core.

    Progress, in `total` units, is shown on stderr. A single task or worker runs in this process.

    Raises:
        UserError: A process was killed.
        Exception: Any exception that a task raises.
    """
    workers = min(workers or _cores(), len(tasks))
    with progress(title, total) as advance:
        if workers <= 1:
            for task in tasks:
                function(task, advance)
        else:
            _run_pool(function, tasks, workers, title, advance)


def _run_pool(
    function: Callable[[Task, Advance], None], tasks: Sequence[Task], workers: int, title: str, advance: Advance
) -> None:
    context = multiprocessing.get_context("spawn")  # forking is unsafe with JAX's threads
    counter, reported = context.Value("q", 0), 0
    with ProcessPoolExecutor(workers, context, _start, (counter,)) as pool:
        try:
            with _no_main_module():
                futures = {pool.submit(_call, function, task) for task in tasks}
            while futures:
                done, futures = wait(futures, timeout=0.5, return_when=FIRST_EXCEPTION)
                advance(counter.value - reported)
                reported = counter.value
                for future in done:
                    future.result()
        except BrokenProcessPool:
            raise UserError(
                f"{title}: one of {workers} processes was killed, possibly for lack of memory; "
                "run the same command again to resume from the finished parts"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


_counter: Any = None  # of a worker process


def _start(counter: Any) -> None:
    """Set up a worker process, which ends when its parent ends, for any reason."""
    global _counter
    _counter = counter
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a worker process
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(function: Callable[[Task, Advance], None], task: Task) -> None:
    def advance(units: int) -> None:
        with _counter.get_lock():
            _counter.value += units

    function(task, advance)


@contextlib.contextmanager
def _no_main_module() -> Iterator[None]:
    """Keep the processes that are started here from importing the user's script, which would train in each of them."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Advance]:
    """A progress bar on a terminal, a line every 10 seconds elsewhere."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)
    with bar:
        task = bar.add_task(title, total=total)
        done, last_line = 0, time.monotonic()

        def advance(units: int) -> None:
            nonlocal done, last_line
            done += units
            bar.advance(task, units)
            if not console.is_terminal and time.monotonic() - last_line >= _LINE_INTERVAL:
                last_line = time.monotonic()
                print(f"{title}: {done:,} of {total:,}", file=sys.stderr, flush=True)

        yield advance
