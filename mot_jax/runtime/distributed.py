"""Several processes: their identity, agreement and exit. A single process makes no connections."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import importlib.util
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from mot_jax.config import MeshConfig
from mot_jax.errors import ReportedError, RetryableError, UserError, error_words
from mot_jax.runtime import exit_codes, interrupts, output
from mot_jax.runtime.rendezvous import Process, listed, meet

_FOREVER = 7 * 24 * 3600 * 1000  # milliseconds; if a process dies, the missing heartbeat ends the others


# --- the identity of this process -------------------------------------------------------------------------------------


def from_flags(coordinator: str | None, num_processes: str | None, process_id: str | None) -> Process | None:
    """The process described by the flags; None without flags. Raises UserError.

    `--num-processes 1` needs no other flag: a single process, independent of the cluster.
    """
    flags = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    missing = [name for name, value in flags.items() if value is None]
    if len(missing) == 3:
        return None
    if num_processes == "1" and len(missing) == 2:
        return Process(0, 1, "")
    if missing:
        raise UserError(
            f"{' and '.join(missing)}: missing; the three flags go together; try --coordinator localhost:8476 "
            "--num-processes 2 --process-id 0"
        )
    assert coordinator is not None and num_processes is not None and process_id is not None
    faults = []
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        faults.append(f"--coordinator = {coordinator!r}: must be HOST:PORT, process 0's; try localhost:8476")
    count = int(num_processes) if num_processes.isdecimal() else 0
    if count < 1:
        faults.append(f"--num-processes = {num_processes!r}: must be a whole number, at least 1; try 2")
    elif not process_id.isdecimal() or int(process_id) >= count:
        faults.append(f"--process-id = {process_id!r}: must be 0 to {count - 1}, different in each process; try 0")
    if faults:
        raise UserError(*faults)
    return Process(int(process_id), count, coordinator)


def detect(seconds: int) -> Process | None:
    """The process as Slurm, Open MPI, Kubernetes or Cloud TPU define it; None outside of them. Raises UserError.

    seconds: how long to wait until the coordinator's name can be resolved.
    """
    advice = "try --coordinator HOST:PORT --num-processes N --process-id I, or --num-processes 1"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # JAX prints four lines where Kubernetes has one process
            coordinator, count, index, local = _detected(os.environ.get("JAX_COORDINATOR_ADDRESS"), seconds)
    except Exception as error:
        raise UserError(f"cluster: the process cannot be identified ({error_words(error)}); {advice}") from error
    if "JOB_COMPLETION_INDEX" in os.environ and count is None and importlib.util.find_spec("kubernetes") is None:
        words = "a Kubernetes job, but the package kubernetes is missing, so this is a single process"
        print(f"warning: {words}; {advice}", file=sys.stderr)
    if coordinator is None or count is None or index is None:
        return None
    return Process(index, count, coordinator, None if local is None else tuple(local))


def _detected(coordinator: str | None, seconds: int) -> tuple[Any, Any, Any, Any]:
    """JAX's own detection, which has no public name: (coordinator, count, index, local devices)."""
    from jax._src.clusters import ClusterEnv

    return ClusterEnv.auto_detect_unset_distributed_params(coordinator, None, None, None, None, seconds)


def is_first() -> bool:
    """Whether this process writes files and prints lines: process 0, or a single process."""
    import jax

    return not jax.distributed.is_initialized() or jax.process_index() == 0


def place() -> tuple[int, int]:
    """The index of this process, and the number of processes."""
    import jax

    return (jax.process_index(), jax.process_count()) if jax.distributed.is_initialized() else (0, 1)


def is_connected() -> bool:
    """Whether this is one of several processes that `connect` has connected. JAX need not be imported."""
    return _connected


# --- connecting -------------------------------------------------------------------------------------------------------

_connected = False  # by `connect`
_all_exiting = False  # all processes have agreed to end
_rounds = itertools.count()
_gathered: dict[str, str] = {}  # in process 0, the key of the last call of `gather`, by the first part of its name


def connect(process: Process | None, mesh: MeshConfig, trains: bool = True) -> None:
    """Connect this process to the others; nothing happens for a single one. Raises RetryableError if any is missing.

    trains: a SIGTERM is handled by `preemption`; else it ends the process.
    """
    global _connected
    if process is None or process.total == 1:
        return
    print(f"{process} waiting for {process.coordinator}, at most {mesh.wait_seconds} s", flush=True)
    meet(process, mesh.wait_seconds)
    import jax

    jax.config.update("jax_enable_preemption_service", trains)  # it handles SIGTERM
    jax.distributed.initialize(
        process.coordinator,
        process.total,
        process.number,
        local_device_ids=process.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=mesh.wait_seconds,
        heartbeat_timeout_seconds=mesh.heartbeat_seconds,
    )
    _connected = True
    watch = threading.Thread(target=_watch_peers, daemon=True)
    watch.start()
    atexit.register(watch.join)  # before the client is destroyed; functions run in the opposite order
    atexit.register(_failing.set)
    jax.devices()  # now, in all processes: they exchange their devices


# --- agreeing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def together() -> Iterator[dict[str, str]]:
    """Around work that may fail in some processes: it then fails in all. Each waits here for the last one.

    Yields a dictionary to fill with texts that must be the same in all processes, by name. Raises UserError with the
    errors of all processes, naming the processes unless all have them; RetryableError if none is a user error. After
    any other exception in a process, the others end with its exit code.
    """
    facts: dict[str, str] = {}
    faults: list[str] = []
    error: Exception | None = None
    try:
        yield facts
    except ReportedError as reported:
        error, faults = reported, list(reported.faults)
    except Exception as other:
        error, faults = other, [error_words(other)]
    import jax

    if jax.distributed.is_initialized():
        digests = {name: hashlib.sha256(fact.encode()).hexdigest()[:12] for name, fact in facts.items()}
        bug = not (error is None or isinstance(error, ReportedError))
        reports = gather({"faults": faults, "mistaken": isinstance(error, UserError), "bug": bug, "facts": digests})
        united = _united(reports)
        if united:
            mistaken, bugs = (any(report[name] for report in reports) for name in ("mistaken", "bug"))
            global _all_exiting
            _all_exiting = mistaken or not bugs  # else the process with the bug publishes its exit code
            if error is not None and not isinstance(error, ReportedError):
                raise error  # a bug: its own process prints the traceback
            if not _all_exiting:
                time.sleep(_PUBLISH_SECONDS)  # `_watch_peers` ends this process before
            passing = any(report["faults"] for report in reports) and not mistaken
            raise (RetryableError if passing else UserError)(*united) from None
    if error is not None:
        raise error


def _united(reports: list[dict[str, Any]]) -> list[str]:
    """The errors of all processes, each once, and an error for each text that differs."""
    owners: dict[str, list[int]] = {}
    for index, report in enumerate(reports):
        for fault in report["faults"]:
            owners.setdefault(fault, []).append(index)
    united = [f if len(of) == len(reports) else f"{listed(of)}: {f}" for f, of in owners.items()]
    if not united:
        for name in reports[0]["facts"]:
            values: dict[str, list[int]] = {}
            for index, report in enumerate(reports):
                values.setdefault(report["facts"].get(name), []).append(index)
            if len(values) > 1:
                words = ", ".join(f"{value} in {listed(of)}" for value, of in values.items())
                united.append(f"{name}: must be the same in all processes, and is {words}; try one for all")
    return united


def from_first(compute: Callable[[], Any]) -> Any:
    """Compute a JSON value in process 0, and return it in all processes; an error of process 0 is raised in all."""
    value = None
    with together():
        if is_first():
            value = compute()
    return gather(value)[0]


def gather(value: Any, name: str | None = None) -> list[Any]:
    """All-gather a JSON value: the values of all processes in their order. Waits for the last process.

    Without a name, all processes make their calls in the same order, from one thread. Other threads give each call a
    name of its own, with a part of it before a slash that only one thread uses.
    """
    import jax

    if not jax.distributed.is_initialized():
        return [value]
    count, index = jax.process_count(), jax.process_index()
    client, key = _coordination().client, f"mot_jax/{next(_rounds) if name is None else name}"
    client.key_value_set(f"{key}/{index}", json.dumps(value))
    if index == 0:
        texts = [client.blocking_key_value_get(f"{key}/{i}", _FOREVER) for i in range(count)]
        # All processes have ended their previous call: its keys would only fill the memory of process 0.
        thread = "" if name is None else name.partition("/")[0]
        if thread in _gathered:
            client.key_value_delete(_gathered[thread] + "/")
        _gathered[thread] = key
        client.key_value_set(key + "/all", f"[{','.join(texts)}]")
    return json.loads(client.blocking_key_value_get(key + "/all", _FOREVER))


class Board:
    """A JSON value of each process that all of them can read at any time, without waiting for one another.

    With several processes, each creates it, as often as the others.
    """

    def __init__(self) -> None:
        self._folder = f"mot_jax/{next(_rounds)}/board/"

    def publish(self, value: Any) -> None:
        """Replace the value of this process."""
        import jax

        if jax.distributed.is_initialized():
            state = _coordination()
            state.client.key_value_set(f"{self._folder}{state.process_id}", json.dumps(value), allow_overwrite=True)

    def read(self) -> list[Any]:
        """The values of all processes in their order; None for each that has none yet, and for a single process."""
        import jax

        if not jax.distributed.is_initialized():
            return [None]
        values = dict(_coordination().client.key_value_dir_get(self._folder))
        names = {key.rpartition("/")[2]: json.loads(value) for key, value in values.items()}
        return [names.get(str(index)) for index in range(jax.process_count())]


def _coordination() -> Any:
    """JAX's coordination service, which has no public name: process_id, client, and in process 0 service.

    The client needs no devices, and waits for hours.
    """
    from jax._src import distributed

    return distributed.global_state


# --- ending -----------------------------------------------------------------------------------------------------------


class StopRequest:
    """A request to stop training, by SIGTERM or Ctrl-C."""

    def __init__(self) -> None:
        self._requested = self._interrupted = False

    def is_due(self, step: int) -> bool:
        """Whether to save and stop after this step, the same in all processes. Must be called in each step."""
        import jax
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        return reached_preemption_sync_point(step) if jax.distributed.is_initialized() else self._requested

    def is_interrupt(self) -> bool:
        """Whether any process was asked to stop by Ctrl-C. All processes call this."""
        return any(gather(self._interrupted))

    @contextlib.contextmanager
    def handled(self, number: signal.Signals, handler: Callable[[], None]) -> Iterator[None]:
        """Around training: call `handler` at the first signal; a second one has the effect that it had before."""
        previous = signal.getsignal(number) or signal.SIG_DFL  # None: a handler that is not Python's
        if previous is signal.SIG_IGN:  # such as SIGINT in the background jobs of a shell
            yield
            return

        def on_signal(*_: object) -> None:
            if number == signal.SIGINT:
                interrupts.lift_limit()
            signal.signal(number, previous)
            handler()

        signal.signal(number, on_signal)
        try:
            yield
        finally:
            signal.signal(number, previous)

    def terminate(self) -> None:
        self._requested = True

    def interrupt(self) -> None:
        import jax

        self._requested = self._interrupted = True
        if jax.distributed.is_initialized():
            os.kill(os.getpid(), signal.SIGTERM)  # JAX's service lets all processes stop after the same step


@contextlib.contextmanager
def preemption() -> Iterator[StopRequest]:
    """Around training: a SIGTERM or Ctrl-C requests it to stop. A second one ends the process at once.

    Any of several processes may receive the signal.
    """
    import jax

    request = StopRequest()
    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():  # Python allows no signal handler elsewhere
            stack.enter_context(request.handled(signal.SIGINT, request.interrupt))
            if not jax.distributed.is_initialized():  # else JAX's service handles SIGTERM
                stack.enter_context(request.handled(signal.SIGTERM, request.terminate))
        yield request


def stop(code: int) -> NoReturn:
    """End this process with an exit code; all processes call it."""
    global _all_exiting
    _all_exiting = True
    raise SystemExit(code)


def end_if_peer_lost(error: Exception, where: str) -> None:
    """End this process with one line if `error` was caused by the loss of another process.

    Waiting for the others would hang; every metrics row and finished checkpoint is on disk. If the other process has
    failed, this one ends with the exit code of that failure.
    """
    words = re.sub("(Error dispatching computation: )+", "", error_words(error))
    signs = r"gloo|heartbeat|coordination"
    import jax

    if isinstance(error, jax.errors.JaxRuntimeError):  # errors of other classes may be those of a store
        signs += r"|closed by peer|unavailable|barrier"
    if _connected and re.search(signs, words, re.I):
        _end_if_peer_failed()
        # A process that has closed its connections would have published its failure before. One that is still there,
        # as after a timeout, may be about to do so.
        if _failing.wait(0 if "closed by peer" in words else _PUBLISH_SECONDS):
            time.sleep(_PUBLISH_SECONDS)  # `_watch_peers` ends this process before
        advice = "the same command resumes from the last checkpoint"
        print(f"error: another process was lost {where} ({words}); {advice}", file=sys.stderr)
        end_now(exit_codes.RETRYABLE)


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Around the whole program. If one of several processes fails, it ends at once: at a normal exit JAX would wait for
    the others, and they for it.
    """
    try:
        yield
    except BaseException as error:
        if not _connected or _all_exiting:
            raise
        if isinstance(error, SystemExit):
            _end_with_failure(error.code if isinstance(error.code, int) else int(error.code is not None))
        if isinstance(error, Exception):
            end_if_peer_lost(error, "outside of the training steps")
        traceback.print_exc()
        _end_with_failure(1)


# A process that fails publishes its exit code, and the others end with it: schedulers decide by the code whether to
# restart them all.
_FAILURE = "mot_jax/failure"  # [process, exit code] of the first that failed, in the coordination service
_WATCH_SECONDS = 2.0  # between two queries
_PUBLISH_SECONDS = 10.0  # within which the failure that another process reports is published
_failing = threading.Event()  # this process ends; the others no longer matter


def _end_with_failure(code: int) -> NoReturn:
    """End this process after its failure, and publish its exit code for the others."""
    _failing.set()
    state = _coordination()
    with contextlib.suppress(Exception):  # another process failed before, or process 0 is lost
        state.client.key_value_set(_FAILURE, json.dumps([state.process_id, code]))
    _end_after_peers(code)


def _end_after_peers(code: int) -> NoReturn:
    """End this process; process 0, with which the coordination service ends, when all peers have queried it."""
    if _coordination().service is not None:
        time.sleep(3 * _WATCH_SECONDS)
    end_now(code)


def _end_if_peer_failed() -> None:
    """End this process with the exit code that another one has published, if any."""
    try:
        failure = _coordination().client.key_value_try_get(_FAILURE)
    except Exception:  # not published, or process 0 is lost
        return
    if not _failing.is_set():
        index, code = json.loads(failure)
        _failing.set()
        print(f"error: process {index} ended with exit code {code}; its output has the reason", file=sys.stderr)
        _end_after_peers(code)


def _watch_peers() -> None:
    """In a thread: end this process when another one has failed, even if it waits in a collective."""
    while not _failing.wait(_WATCH_SECONDS):
        _end_if_peer_failed()


def end_all(code: int) -> NoReturn:
    """End this process with an exit code, whatever its threads do, and then the others with the same code."""
    if _connected:
        _end_with_failure(code)
    end_now(code)


def end_now(code: int) -> NoReturn:
    """End this process with an exit code, whatever its threads do."""
    output.drain()
    os._exit(code)
