"""Output that is not read does not block a command, and is complete for a reader who is only slow."""

from __future__ import annotations

import fcntl
import os
import pty
import sys
import threading

import pytest

from mot_jax.runtime import output
from mot_jax.runtime.output import Output


@pytest.fixture
def pipe():
    """The reading end of a small pipe, and a text stream to its writing end."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    with open(reader, "rb") as readable, open(writer, "w", encoding="ascii", errors="replace") as stream:
        yield readable, stream


def test_a_reader_gets_all_text_in_order(pipe):
    readable, stream = pipe
    expected, received = [f"line {i} caf\u00e9\n" for i in range(500)] + ["x" * 20_000], []
    thread = threading.Thread(target=lambda: received.append(readable.read()))
    thread.start()
    written = Output(stream, never_blocks=True)
    for text in expected:
        written.write(text)
    written.close()
    stream.close()
    thread.join()
    assert received[0].decode() == "".join(expected).replace("\u00e9", "?")


def test_text_is_dropped_while_nothing_reads_and_the_gap_is_named(pipe, monkeypatch):
    monkeypatch.setattr(output, "_DRAIN_SECONDS", 0.1)
    readable, stream = pipe
    written = Output(stream, never_blocks=True)
    for i in range(5000):
        print("line", i, file=written, flush=True)
    received = b""
    while b"lines were dropped, since this output was not read\n" not in received:
        received += os.read(readable.fileno(), 4096)
    print("at last", file=written)
    written.close()
    received += os.read(readable.fileno(), 4096)
    lines = received.decode().splitlines()
    count = next(int(line.split()[0].replace(",", "")) for line in lines if "dropped" in line)
    shown = [line for line in lines if line.startswith("line ") and line[5:].isdecimal()]
    assert lines[-1] == "at last" and shown[:3] == ["line 0", "line 1", "line 2"]
    assert abs(len(shown) + count - 5000) <= 1 and count > 1000  # the end of one line may be dropped


def test_the_end_does_not_wait_for_a_reader(pipe, monkeypatch):
    monkeypatch.setattr(output, "_DRAIN_SECONDS", 0.1)
    readable, stream = pipe
    written = Output(stream, never_blocks=True)
    written.write("x" * 100_000)
    written.drain()
    written.write("more")  # of no effect
    written.close()
    assert readable.read1(10_000) == b"x" * 4096


def test_the_end_does_not_wait_for_a_terminal(monkeypatch):
    """Such as that of a launcher that is ending; the thread may block in its last write."""
    monkeypatch.setattr(output, "_DRAIN_SECONDS", 0.1)
    screen, terminal = pty.openpty()
    with open(terminal, "w") as stream:
        written = Output(stream, never_blocks=True)
        for _ in range(100):
            written.write("x" * 1000)
        assert written.isatty()
        written.close()
        shown = b""
        while len(shown) < 1000:  # a read returns a part
            shown += os.read(screen, 1000 - len(shown))
        assert shown == b"x" * 1000
        os.close(screen)  # the thread ends


def test_a_closed_pipe_and_a_stream_without_a_file(pipe, capsys):
    readable, stream = pipe
    readable.close()
    for written in (Output(stream, never_blocks=True), Output(sys.stdout, never_blocks=True)):
        print("text", file=written, flush=True)
        written.close()
    assert capsys.readouterr().out == "text\n"
