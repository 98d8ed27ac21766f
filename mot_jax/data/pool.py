"""Work that several processes share, and how far it is."""

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

Advance = Callable[[int], None]  # takes the units that have been done since the last call
Task = TypeVar("Task")

_SAY_EVERY = 10.0  # seconds between two lines where there is no terminal


def run(
    function: Callable[[Task, Advance], None], tasks: Sequence[Task], workers: int | None, title: str, total: int
) -> None:
    """Calls function(task, advance) for each task, in up to `workers` processes: None is one for each core.

    Shows on stderr how many of the `total` units are done. One task, or one worker, needs no other process. Raises what
    a task raises, and UserError if a process is killed.
    """
    workers = min(workers or _cores(), len(tasks))
    with _progress(title, total) as advance:
        if workers <= 1:
            for task in tasks:
                function(task, advance)
        else:
            _run(function, tasks, workers, title, advance)


def _run(
    function: Callable[[Task, Advance], None], tasks: Sequence[Task], workers: int, title: str, advance: Advance
) -> None:
    context = multiprocessing.get_context("spawn")  # a fork does not survive JAX's threads
    counter, seen = context.Value("q", 0), 0
    with ProcessPoolExecutor(workers, context, _start, (counter,)) as pool:
        try:
            with _no_main_module():
                futures = {pool.submit(_call, function, task) for task in tasks}
            while futures:
                done, futures = wait(futures, timeout=0.5, return_when=FIRST_EXCEPTION)
                advance(counter.value - seen)
                seen = counter.value
                for future in done:
                    future.result()
        except BrokenProcessPool:
            raise UserError(
                f"{title}: one of {workers} processes was killed, for want of memory perhaps; "
                "the same command goes on from what is finished"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


_counter: Any = None  # of a worker process


def _start(counter: Any) -> None:
    """Makes a process a worker that ends with its parent, however that ends."""
    global _counter
    _counter = counter
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores are taken
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
    """Processes started here do not import the user's script again: it would train in each of them."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _progress(title: str, total: int) -> Iterator[Advance]:
    """A bar on a terminal, a line now and then elsewhere."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)
    with bar:
        task = bar.add_task(title, total=total)
        done, said = 0, time.monotonic()

        def advance(units: int) -> None:
            nonlocal done, said
            done += units
            bar.advance(task, units)
            if not console.is_terminal and time.monotonic() - said >= _SAY_EVERY:
                said = time.monotonic()
                print(f"{title}: {done:,} of {total:,}", file=sys.stderr, flush=True)

        yield advance
