"""Standard output and error of a command: they outlive the reader of a pipe, and never block a training run."""

from __future__ import annotations

import contextlib
import io
import os
import queue
import select
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

_MOST_WAITING = 1000  # pieces of text; those that follow are dropped until all of these are written
_DRAIN_SECONDS = 3.0  # without progress, after which the rest of the text is given up


class Output:
    """A text stream that discards all output once the reader of its pipe has gone, so that the command continues.

    never_blocks: a thread writes the text, and drops text while the reader of a pipe, or a terminal, takes no more.
    """

    def __init__(self, stream: Any, never_blocks: bool = False):
        self._stream, self._writer = stream, None
        if never_blocks:
            with contextlib.suppress(OSError, AttributeError):  # no stream of a file, so that nothing blocks
                stream.flush()
                self._writer = _Writer(stream)

    def write(self, text: str) -> int:
        if self._writer is not None:
            self._writer.write(text)
        else:
            with self._until_closed():
                self._stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self._writer is None:
            with self._until_closed():
                self._stream.flush()

    def drain(self) -> None:
        """Wait until all text is written or, if the stream never blocks, until it has taken none for some seconds."""
        if self._writer is None:
            self.flush()
        else:
            self._writer.drain()

    def close(self) -> None:
        """End the thread; the stream remains open."""
        if self._writer is not None:
            self._writer.drain()
            self._writer.end()

    @contextlib.contextmanager
    def _until_closed(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # Either way the stream still holds the text, and would fail again when the interpreter exits.
            with open(os.devnull, "wb") as null:
                os.dup2(null.fileno(), self._stream.fileno())
            if not isinstance(error, BrokenPipeError):
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lenient_streams(never_block: bool = False) -> Iterator[None]:
    """Standard streams that replace characters outside of their encoding, and outlive the reader of a pipe.

    never_block: text that the reader does not take is dropped.
    """
    for stream in (sys.stdin, sys.stdout):  # standard error escapes such characters by default
        if hasattr(stream, "reconfigure"):
            with contextlib.suppress(io.UnsupportedOperation):  # it was read before, by a program that calls `main`
                stream.reconfigure(errors="replace")
    before = sys.stdout, sys.stderr
    outputs = [None if stream is None else Output(stream, never_block) for stream in before]
    sys.stdout, sys.stderr = outputs
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for output in outputs:
            if output is not None:
                output.close()


def drain() -> None:
    """Wait until standard output and error are written, or do not take any more text."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            getattr(stream, "drain", stream.flush)()


class _Writer:
    """A thread that writes to a file descriptor, each time as much as it takes without blocking.

    The stream's own buffer is not used: a thread that blocks in it would hold its lock when the interpreter exits.
    """

    def __init__(self, stream: Any):
        self._descriptor, self._encoding, self._errors = stream.fileno(), stream.encoding, stream.errors
        # Of the queues, only this one may be used in a signal handler that interrupts its own `put`.
        self._texts: queue.SimpleQueue[str | threading.Event] = queue.SimpleQueue()
        self._dropping = self._ended = False
        self._lines_dropped, self._writes = 0, 0
        threading.Thread(target=self._run, name="output", daemon=True).start()

    def write(self, text: str) -> None:
        self._dropping = self._dropping or self._texts.qsize() >= _MOST_WAITING
        if self._dropping or self._ended:
            self._lines_dropped += text.count("\n")
        else:
            self._texts.put(text)

    def drain(self) -> None:
        if self._ended:
            return
        written, writes = threading.Event(), -1
        self._texts.put(written)
        while writes < self._writes and not written.is_set():
            writes = self._writes
            written.wait(_DRAIN_SECONDS)
        self._ended = not written.is_set()

    def end(self) -> None:
        self._ended = True
        self._texts.put(threading.Event())

    def _run(self) -> None:
        while not self._ended:
            text = self._texts.get()
            if isinstance(text, threading.Event):
                text.set()
            else:
                self._write(text)
            if self._dropping and self._texts.empty():
                dropped, self._lines_dropped, self._dropping = self._lines_dropped, 0, False
                self._write(f"\n{dropped:,} lines were dropped, since this output was not read\n")

    def _write(self, text: str) -> None:
        remaining = memoryview(text.encode(self._encoding, self._errors))
        while remaining and not self._ended:
            try:
                # A pipe that is ready takes at least as many bytes as `PIPE_BUF`.
                if select.select([], [self._descriptor], [], _DRAIN_SECONDS)[1] and not self._ended:
                    remaining = remaining[os.write(self._descriptor, remaining[: select.PIPE_BUF]) :]
                    self._writes += 1
            except BlockingIOError:
                time.sleep(0.1)
            except OSError:  # the reader has gone, or the disk is full
                self._ended = True
