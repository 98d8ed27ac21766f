"""A rendezvous of the processes in Python, before JAX connects them.

JAX's runtime ends a process from C++, without a readable message, when a peer is missing. So process 0 first listens
on the coordinator's port itself; JAX's service takes the port over when all processes have connected.

A peer sends `mot_jax NUMBER TOTAL`. When the outcome is clear, each peer receives one line: `go`, or an error text,
with the prefix `later ` if the error is retryable.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import socket
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from mot_jax.errors import ReportedError, RetryableError, UserError

_RETRY = 0.2  # seconds between two attempts to reach process 0
_GRACE = 5.0  # further seconds in which process 0 reports missing processes
_MAX_GREETING_BYTES = 80


class Process(NamedTuple):
    """The identity of this process. coordinator: HOST:PORT of process 0. local_devices: device ids, None for all."""

    number: int
    total: int
    coordinator: str
    local_devices: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return f"process {self.number} of {self.total}"


def meet(process: Process, seconds: float) -> None:
    """Wait until all processes have connected to the coordinator's port.

    Raises UserError, the same in all processes, or RetryableError if a process is missing after `seconds`.
    """
    host, _, port = process.coordinator.rpartition(":")
    if process.number == 0:
        _receive(process, int(port), seconds)
    else:
        _visit(process, host.strip("[]"), int(port), seconds)


def _receive(process: Process, port: int, seconds: float) -> None:
    """Process 0: receive a greeting from each process, and answer all of them."""
    peers: dict[int, socket.socket] = {}
    deadline = time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        server = stack.enter_context(_listen(process, port))
        selector.register(server, selectors.EVENT_READ)
        fault: ReportedError | None = None
        while len(peers) < process.total - 1 and fault is None:
            left = deadline - time.monotonic()
            if left <= 0:
                fault = _absent(process, peers, seconds)
                break
            for key, _ in selector.select(left):
                if key.data is None:
                    connection, _ = server.accept()
                    connection.setblocking(False)
                    selector.register(stack.enter_context(connection), selectors.EVENT_READ, bytearray())
                    continue
                assert isinstance(key.fileobj, socket.socket)
                greeting = _read_greeting(key.fileobj, key.data)
                if greeting is None:  # disconnected, or another program
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
                    peers = {i: peer for i, peer in peers.items() if peer is not key.fileobj}
                elif greeting:
                    index, count = greeting
                    fault = fault or _misfit(process, index, count, peers)
                    peers.setdefault(index, key.fileobj)
                    key.data.clear()
        answer = "later " * isinstance(fault, RetryableError) + str(fault or "go") + "\n"
        for key in selector.get_map().values():
            if key.data is not None:
                with contextlib.suppress(OSError):
                    key.fileobj.send(answer.encode())  # type: ignore[union-attr]
    if fault:
        raise fault


def _listen(process: Process, port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, backlog=1024, dualstack_ipv6=both)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UserError(
            f"coordinator = {process.coordinator}: process 0 cannot listen there ({reason}); is another process 0 or "
            "program there? Try another port"
        ) from None


def _read_greeting(connection: socket.socket, buffer: bytearray) -> tuple[int, int] | tuple[()] | None:
    """(index, count) of a greeting; () while it is incomplete; None if there will be none."""
    try:
        received = connection.recv(_MAX_GREETING_BYTES)
    except OSError:
        return None
    buffer += received
    if b"\n" not in buffer:
        return () if received and len(buffer) < _MAX_GREETING_BYTES else None
    greeting = re.fullmatch(rb"mot_jax (\d{1,9}) (\d{1,9})\n", bytes(buffer))
    return None if greeting is None else (int(greeting[1]), int(greeting[2]))


def _misfit(process: Process, index: int, count: int, peers: dict[int, socket.socket]) -> UserError | None:
    if count != process.total:
        words = f"that of process {index}, and process 0 has {process.total}; try one number for all"
        return UserError(f"--num-processes = {count}: {words}")
    if index in peers or not 0 < index < count:
        return UserError(f"--process-id = {index}: given to two processes; try 0 to {count - 1}, each once")
    return None


def _absent(process: Process, peers: Iterable[int], seconds: float) -> RetryableError:
    absent = listed(sorted({*range(1, process.total)}.difference(peers)))
    return RetryableError(
        f"coordinator = {process.coordinator}: {absent} of {process.total} did not connect within {seconds:g} s; "
        "are they running, with the same --coordinator, and can they reach that port? --mesh.wait-seconds sets the time"
    )


def _visit(process: Process, host: str, port: int, seconds: float) -> None:
    """Every other process: send the greeting to process 0 repeatedly until it answers."""
    begin, reason, answer, connected = time.monotonic(), "", b"", False
    while time.monotonic() < begin + seconds and not answer:
        try:
            connected = False
            with socket.create_connection((host, port), begin + seconds - time.monotonic()) as connection:
                connection.sendall(b"mot_jax %d %d\n" % (process.number, process.total))
                connection.settimeout(max(begin + seconds + _GRACE - time.monotonic(), _GRACE))
                connected = True
                with connection.makefile("rb") as answers:
                    answer = answers.readline(1000)
                connected, reason = False, "the connection was closed"
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
        if not answer.endswith(b"\n"):
            answer = b""
            time.sleep(_RETRY)
    if not answer:
        failure = f"{process} {'reached process 0, and got no answer' if connected else 'did not reach process 0'}"
        advice = "did all others start?" if connected else "is it running there, and is that port open?"
        raise RetryableError(
            f"coordinator = {process.coordinator}: {failure} within {seconds:g} s ({reason}); {advice} "
            "--mesh.wait-seconds sets the time"
        )
    words = answer.decode(errors="replace").strip()
    if words != "go":
        raise RetryableError(words.removeprefix("later ")) if words.startswith("later ") else UserError(words)


def listed(numbers: Sequence[int]) -> str:
    """`process 3`, `processes 1, 2 and 3`, or the first eight of many."""
    shown = [str(number) for number in numbers[:8]]
    if len(numbers) > 8:
        return f"processes {', '.join(shown)} and {len(numbers) - 8} more"
    return "process " + shown[0] if len(shown) == 1 else f"processes {', '.join(shown[:-1])} and {shown[-1]}"
