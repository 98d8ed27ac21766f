"""Processes meet, or say why not: here they are threads."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from processes import free_port

from mot_jax.errors import RetryableError, UserError
from mot_jax.runtime import rendezvous
from mot_jax.runtime.rendezvous import Process, listed, meet


def outcome(process: Process, seconds: float) -> str:
    """The error of one process, after `later: ` if it is retryable, or an empty text."""
    try:
        meet(process, seconds)
    except (UserError, RetryableError) as error:
        return "later: " * isinstance(error, RetryableError) + str(error)
    return ""


def outcomes(processes: list[tuple[int, int]], seconds: float, between: float = 0.0) -> tuple[str, list[str]]:
    """The coordinator and the outcomes of processes (number, total), started one after the other."""
    coordinator = f"localhost:{free_port()}"
    with ThreadPoolExecutor(len(processes)) as pool:
        waiting = []
        for number, total in processes:
            waiting.append(pool.submit(outcome, Process(number, total, coordinator), seconds))
            time.sleep(between)
        return coordinator, [future.result() for future in waiting]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_all_meet_in_any_order_and_leave_the_port_free(order):
    coordinator, faults = outcomes([(number, 4) for number in order], 10, between=0.05)
    assert faults == [""] * 4
    with socket.create_server(("", int(coordinator.rpartition(":")[2]))):
        pass  # JAX's service comes next


def test_all_that_came_say_who_did_not():
    start = time.monotonic()
    coordinator, faults = outcomes([(0, 5), (1, 5), (3, 5)], 0.6)
    assert time.monotonic() - start < 3
    assert len(set(faults)) == 1
    assert faults[0].startswith(
        f"later: coordinator = {coordinator}: processes 2 and 4 of 5 did not connect within 0.6 s; are they running"
    )


def test_without_process_0_the_others_say_so():
    coordinator, (fault,) = outcomes([(2, 3)], 0.5)
    assert fault.startswith(
        f"later: coordinator = {coordinator}: process 2 of 3 did not reach process 0 within 0.5 s (Conn"
    )
    fault = outcome(Process(1, 2, "no.such.host.invalid:1234"), 0.5)
    assert "process 1 of 2 did not reach process 0 within 0.5 s" in fault


def test_a_process_that_waited_in_vain_for_another_does_not_blame_the_port(monkeypatch):
    """Process 0 began to wait later, and waits on."""
    monkeypatch.setattr(rendezvous, "_GRACE", 0.1)
    with socket.create_server(("", free_port())) as silent:
        coordinator = f"localhost:{silent.getsockname()[1]}"
        fault = outcome(Process(1, 3, coordinator), 0.5)
    words = "process 1 of 3 reached process 0, and got no answer within 0.5 s (timed out); did all others start?"
    assert fault.startswith(f"later: coordinator = {coordinator}: {words}")


def test_a_number_that_two_have_ends_all():
    _, faults = outcomes([(0, 4), (1, 4), (2, 4), (1, 4)], 10, between=0.1)
    assert set(faults) == {"--process-id = 1: given to two processes; try 0 to 3, each once"}


def test_processes_must_agree_how_many_they_are():
    _, faults = outcomes([(0, 3), (1, 3), (2, 4)], 10, between=0.1)
    assert set(faults) == {"--num-processes = 4: that of process 2, and process 0 has 3; try one number for all"}


def test_a_second_process_0_and_a_taken_port_are_told():
    with socket.create_server(("", free_port())) as other:
        port = other.getsockname()[1]
        assert outcome(Process(0, 2, f"localhost:{port}"), 1).startswith(
            f"coordinator = localhost:{port}: process 0 cannot listen there (Address already in use)"
        )


def test_strangers_on_the_port_disturb_nobody():
    port = free_port()
    server = threading.Thread(target=meet, args=(Process(0, 3, f"localhost:{port}"), 20))
    server.start()
    strangers = []
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"x" * 100_000, b"", b"mot_jax", b"mot_jax 1 two\n", b"\0\n", b"\n" * 9):
        while True:
            try:
                strangers.append(socket.create_connection(("localhost", port)))
                break
            except ConnectionRefusedError:
                time.sleep(0.02)
        strangers[-1].sendall(words)
    strangers[0].close()
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda i: outcome(Process(i, 3, f"localhost:{port}"), 10), (1, 2))) == ["", ""]
    server.join()
    for stranger in strangers:
        stranger.close()


def test_who_has_left_again_is_missing():
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(outcome, Process(0, 3, f"localhost:{port}"), 1.5)
        time.sleep(0.3)
        with socket.create_connection(("localhost", port)) as peer:
            peer.sendall(b"mot_jax 1 3\n")
            time.sleep(0.2)
        assert "processes 1 and 2 of 3 did not connect" in waiting.result()


def test_a_process_that_comes_again_is_welcome():
    """A scheduler that restarts a killed process."""
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(outcome, Process(0, 2, f"localhost:{port}"), 10)
        time.sleep(0.2)
        with socket.create_connection(("localhost", port)) as peer:
            peer.sendall(b"mot_jax 1 ")
        assert outcome(Process(1, 2, f"localhost:{port}"), 10) == waiting.result() == ""


def test_process_numbers_in_words():
    assert listed([3]) == "process 3"
    assert listed([1, 2, 3]) == "processes 1, 2 and 3"
    assert listed(list(range(1, 512))) == "processes 1, 2, 3, 4, 5, 6, 7, 8 and 503 more"
