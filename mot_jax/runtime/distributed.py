"""Many processes: who they are, how they agree and how they end. A single process connects to nothing."""

from __future__ import annotations

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
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from mot_jax.config import MeshConfig
from mot_jax.errors import RetryableError, UserError, error_words
from mot_jax.runtime.rendezvous import Process, listed, meet

TEMPORARY = 75  # the exit code, EX_TEMPFAIL, where another process was lost, say: the same command goes on

_FOREVER = 7 * 24 * 3600 * 1000  # milliseconds; a process that dies meanwhile ends the others by its heartbeat


# --- who this process is ----------------------------------------------------------------------------------------------


def from_flags(coordinator: str | None, num_processes: str | None, process_id: str | None) -> Process | None:
    """The process that the command line names; None if it names none. Raises UserError.

    `--num-processes 1` needs no others: a single process, whatever cluster it runs in.
    """
    flags = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    missing = [name for name, value in flags.items() if value is None]
    if len(missing) == 3:
        return None
    if num_processes == "1" and len(missing) == 2:
        return Process(0, 1, "")
    if missing:
        raise UserError(
            f"{' and '.join(missing)}: must be given too, the three go together; try --coordinator localhost:8476 "
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
        faults.append(f"--process-id = {process_id!r}: must be 0 to {count - 1}, another in each process; try 0")
    if faults:
        raise UserError(*faults)
    return Process(int(process_id), count, coordinator)


def detect(seconds: int) -> Process | None:
    """The process that Slurm, Open MPI, Kubernetes or Cloud TPU say this is; None outside of them. Raises UserError.

    seconds: how long to wait for the coordinator's name to be known.
    """
    advice = "try --coordinator HOST:PORT --num-processes N --process-id I, or --num-processes 1"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # four lines of JAX's where Kubernetes has one process
            coordinator, count, index, local = _detected(os.environ.get("JAX_COORDINATOR_ADDRESS"), seconds)
    except Exception as error:
        raise UserError(f"cluster: cannot tell which process this is ({error_words(error)}); {advice}") from error
    if "JOB_COMPLETION_INDEX" in os.environ and count is None and importlib.util.find_spec("kubernetes") is None:
        words = "a Kubernetes job, but the package kubernetes is missing, so this process trains alone"
        print(f"warning: {words}; {advice}", file=sys.stderr)
    if coordinator is None or count is None or index is None:
        return None
    return Process(index, count, coordinator, None if local is None else tuple(local))


def _detected(coordinator: str | None, seconds: int) -> tuple[Any, Any, Any, Any]:
    """JAX's own detection, which has no public name: (coordinator, count, index, local devices)."""
    from jax._src.clusters import ClusterEnv

    return ClusterEnv.auto_detect_unset_distributed_params(coordinator, None, None, None, None, seconds)


def is_first() -> bool:
    """Whether this process writes the files and prints the lines of the run: process 0, or a single one."""
    import jax

    return not jax.distributed.is_initialized() or jax.process_index() == 0


# --- connecting -------------------------------------------------------------------------------------------------------

_connected = False  # by us
_parting = False  # all processes have agreed to end
_rounds = itertools.count()


def connect(process: Process | None, mesh: MeshConfig, trains: bool = True) -> None:
    """Makes this process one of many; a single one stays as it is. Raises RetryableError if not all of them come.

    trains: a SIGTERM is for `preemption`; else it ends the process, as ever.
    """
    global _connected
    if process is None or process.total == 1:
        return
    print(f"{process} waiting for {process.coordinator}, at most {mesh.wait_seconds} s", flush=True)
    meet(process, mesh.wait_seconds)
    import jax

    jax.config.update("jax_enable_preemption_service", trains)  # it takes the signal
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
    jax.devices()  # here, where all of them do: they tell each other of their devices


# --- agreeing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def together() -> Iterator[dict[str, str]]:
    """Around what may fail in one process alone: it then fails in all. Each waits here until the last is through.

    Gives a dictionary to fill with what must be the same in all processes, by name. Raises UserError with the faults
    of all processes, which says whose they are where not all have them; RetryableError if none is a user's mistake.
    """
    facts: dict[str, str] = {}
    faults: list[str] = []
    error: Exception | None = None
    try:
        yield facts
    except UserError as found:
        error, faults = found, list(found.faults)
    except Exception as found:
        error, faults = found, [error_words(found)]
    import jax

    if jax.distributed.is_initialized():
        digests = {name: hashlib.sha256(fact.encode()).hexdigest()[:12] for name, fact in facts.items()}
        mistaken = isinstance(error, UserError) and not isinstance(error, RetryableError)
        found_by_all = gather({"faults": faults, "mistaken": mistaken, "facts": digests})
        united = _united(found_by_all)
        if united:
            global _parting
            _parting = True
            if error is not None and not isinstance(error, UserError):
                raise error  # a fault of ours: its own process shows where it is
            passing = any(of["faults"] for of in found_by_all) and not any(of["mistaken"] for of in found_by_all)
            raise (RetryableError if passing else UserError)(*united) from None
    if error is not None:
        raise error


def _united(all_of_them: list[dict[str, Any]]) -> list[str]:
    """The faults of all processes, each once, and a fault for each fact that differs."""
    owners: dict[str, list[int]] = {}
    for index, found in enumerate(all_of_them):
        for fault in found["faults"]:
            owners.setdefault(fault, []).append(index)
    united = [f if len(of) == len(all_of_them) else f"{listed(of)}: {f}" for f, of in owners.items()]
    if not united:
        for name in all_of_them[0]["facts"]:
            values: dict[str, list[int]] = {}
            for index, found in enumerate(all_of_them):
                values.setdefault(found["facts"].get(name), []).append(index)
            if len(values) > 1:
                words = ", ".join(f"{value} in {listed(of)}" for value, of in values.items())
                united.append(f"{name}: must be the same in all processes, and is {words}; try one for all")
    return united


def gather(value: Any) -> list[Any]:
    """What JSON can hold of each process, in their order, everywhere. Waits for the last of them."""
    import jax

    if not jax.distributed.is_initialized():
        return [value]
    count, index = jax.process_count(), jax.process_index()
    client, key = _client(), f"mot_jax/{next(_rounds)}"
    client.key_value_set(f"{key}/{index}", json.dumps(value))
    if index == 0:
        texts = [client.blocking_key_value_get(f"{key}/{i}", _FOREVER) for i in range(count)]
        client.key_value_set(key + "/all", f"[{','.join(texts)}]")
    return json.loads(client.blocking_key_value_get(key + "/all", _FOREVER))


def _client() -> Any:
    """The client of JAX's coordination service, which has no public name. It needs no devices, and waits for hours."""
    from jax._src import distributed

    return distributed.global_state.client


# --- ending -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[int], bool]]:
    """Gives `asked(step)`, to be called in each step: whether to save and stop after it. The same in all processes.

    Of several, any may get the SIGTERM: JAX's service tells the others, and lets all stop after the same step. A single
    process ends at once on the second one.
    """
    import jax
    from jax.experimental import multihost_utils

    if jax.distributed.is_initialized():
        yield multihost_utils.reached_preemption_sync_point
    elif threading.current_thread() is not threading.main_thread():  # where Python allows no handler
        yield lambda step: False
    else:
        asked = threading.Event()

        def on_signal(*_: object) -> None:
            asked.set()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

        previous = signal.signal(signal.SIGTERM, on_signal)
        try:
            yield lambda step: asked.is_set()
        finally:
            signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)


def stop(code: int) -> NoReturn:
    """Ends all processes, which all call it, with an exit code."""
    global _parting
    _parting = True
    raise SystemExit(code)


def end_if_peer_lost(error: Exception, where: str) -> None:
    """Ends this process, with one line, if `error` comes of another one that is gone: nothing here can go on.

    At once, since whatever waits for the others would hang: every row and every finished checkpoint is on disk.
    """
    words = re.sub("(Error dispatching computation: )+", "", error_words(error))
    signs = r"gloo|heartbeat|coordination"
    import jax

    if isinstance(error, jax.errors.JaxRuntimeError):  # of others, these could be a store's words
        signs += r"|closed by peer|unavailable|barrier"
    if _connected and re.search(signs, words, re.I):
        advice = "the same command goes on from the last checkpoint"
        print(f"error: another process was lost {where} ({words}); {advice}", file=sys.stderr)
        _end_now(TEMPORARY)


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Around all that a process does. One of many that fails alone ends at once, since at a usual exit JAX would wait
    for the others, and they for it.
    """
    try:
        yield
    except BaseException as error:
        if not _connected or _parting:
            raise
        if isinstance(error, SystemExit):
            _end_now(error.code if isinstance(error.code, int) else int(error.code is not None))
        if isinstance(error, Exception):
            end_if_peer_lost(error, "outside of the training steps")
        traceback.print_exc()
        _end_now(1)


def _end_now(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
