"""The owner of a run's directory: the one run of processes that may write there, described by `owner.json`.

The file is created exclusively and rewritten once a minute, so that another start can tell a run that is in progress
from the remains of one that was killed. On an object store, which has no locks, it protects against mistakes, not
against two starts within the same seconds.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from etils import epath

from mot_jax.errors import RetryableError, UserError
from mot_jax.runtime import strict_json
from mot_jax.runtime.paths import create_file, is_io_error, is_remote, make_directory

FILE = "owner.json"
BEAT_SECONDS = 60.0  # between two writes of the file by a run in progress
STALE_SECONDS = 180.0  # age of the last beat from which the owner counts as gone
_SETTLE_SECONDS = 2.0  # after a takeover without a lock, until all starts see which of them wrote last
_POLL_SECONDS = 1.0

Owner = dict[str, Any]  # the content of the file
# The types of the values that are compared.
_TYPES: dict[str, type | tuple[type, ...]] = {"pid": int, "restarts": int, "beat": (int, float), "token": str}

_held: dict[str, _Ownership] = {}  # by directory


def acquire(workdir: epath.Path, processes: int = 1, take_over: bool = False) -> None:
    """Make this process the owner of a directory until `release`, or until it ends. Creates the directory.

    An owner that is certainly gone is replaced at once: one that was a process of this machine and no longer is, or an
    earlier start of the same job of the scheduler. So is one whose last beat is older than `STALE_SECONDS`. Otherwise
    this waits until the last beat has become that old. Waiting and replacing are reported on standard error.

    Args:
        processes: number of processes of the run, for the message of other starts.
        take_over: replace any owner at once. Its run stops at the first step after its next beat.

    Raises:
        RetryableError: if the owner's run is in progress: the file is rewritten while this waits.
        UserError: if the directory cannot be written.
    """
    if str(workdir) in _held:
        check(workdir)
        return
    make_directory("workdir", workdir)
    current, silent = _this_process(processes), None
    while True:
        with _lock(workdir) as locked:
            current |= {"beat": time.time()}  # waiting takes minutes
            if _create(workdir / FILE, current):
                break
            other = read(workdir)
            if other is None:  # removed by its owner since
                continue
            reason = _reason_to_replace(other, current)
            if take_over:
                reason = "--take-over"
            elif _beat(other) == silent:
                reason = f"no sign of life for {STALE_SECONDS:.0f} s"
            if reason is not None:
                _write(workdir, current)
        if reason is None:
            _report(f"{_in_use(workdir, other)}; waiting until it has shown no sign of life for {STALE_SECONDS:.0f} s")
            _wait(workdir, other)
            silent = _beat(other)
        elif locked or _is_owner_after_settling(workdir, current):
            _report(f"workdir = {workdir}: taken over from {describe(other)} ({reason})")
            break
    _held[str(workdir)] = _Ownership(workdir, current)


def release(workdir: epath.Path) -> None:
    """Remove the file, if this process is the owner."""
    ownership = _held.pop(str(workdir), None)
    if ownership is not None:
        ownership.end()


def is_owner(workdir: epath.Path) -> bool:
    """Whether this process is the owner, by the file."""
    ownership = _held.get(str(workdir))
    return ownership is not None and ownership.is_owner()


def check(workdir: epath.Path, now: bool = False) -> None:
    """Raise UserError if another process has replaced this one as the owner.

    now: read the file. Without it, the result is that of the last beat, and costs nothing.
    """
    ownership = _held.get(str(workdir))
    if ownership is None:
        return
    if now:
        try:
            ownership.is_owner()
        except Exception as error:  # a store that fails now is no sign of another owner
            if not is_io_error(error):
                raise
    if ownership.successor is not None:
        _held.pop(str(workdir))
        raise UserError(
            f"workdir = {workdir}: {describe(ownership.successor)} has taken it over, so this run stops without a "
            "further checkpoint; try another workdir"
        )


def read(workdir: epath.Path) -> Owner | None:
    """The owner of a directory; None without one, and an empty one for a damaged file."""
    for attempt in (1, 2):
        try:
            owner = json.loads((workdir / FILE).read_text())
        except FileNotFoundError:
            return None
        except ValueError:  # it is being created, or its process was killed while doing so
            owner = {}
        if isinstance(owner, dict) and all(isinstance(owner.get(key), kind) for key, kind in _TYPES.items()):
            return owner
        if attempt == 1:
            time.sleep(_SETTLE_SECONDS)
    return {}


def describe(owner: Owner | None) -> str:
    """An owner in words: process, host and start."""
    if not owner:
        return "an unknown process"
    count = owner.get("processes") or 1
    group = f" of {count}" if count > 1 else ""
    job = f", job {owner['job']}" if owner.get("job") else ""
    return f"process {owner.get('pid')}{group} on {owner.get('host')}{job}, since {owner.get('since')}"


def reason_gone(owner: Owner) -> str | None:
    """The reason for which an owner is certainly gone; None if its run may be in progress."""
    return _reason_gone(owner, _this_process(1))


def silence(owner: Owner) -> str | None:
    """The age of an owner's last sign of life, in words, if it is too old for a run in progress."""
    age = time.time() - float(owner.get("beat") or 0)
    return f"its last sign of life is {age:,.0f} s old" if age >= STALE_SECONDS else None


# --- the file ---------------------------------------------------------------------------------------------------------


class _Ownership:
    """The ownership of a directory by this process, with the thread that rewrites the file.

    successor: the process that has replaced this one, if any.
    """

    def __init__(self, workdir: epath.Path, current: Owner):
        self.workdir = workdir
        self.successor: Owner | None = None
        self._owner, self._ended = current, threading.Event()
        self._thread = threading.Thread(target=self._beat, name="owner of the workdir", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while self.successor is None and not self._ended.wait(BEAT_SECONDS):
            # A disk or store that fails for a minute does not end the run.
            with contextlib.suppress(Exception), _lock(self.workdir):
                if self.is_owner():
                    _write(self.workdir, self._owner | {"beat": time.time()})

    def is_owner(self) -> bool:
        """Read the file. A missing one has been removed by a successor that has ended; a damaged one is of none."""
        owner = read(self.workdir)
        if owner == {} or (owner is not None and owner["token"] == self._owner["token"]):
            return True
        self.successor = owner or {}
        return False

    def end(self) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(Exception), _lock(self.workdir):
            if self.is_owner():
                (self.workdir / FILE).unlink(missing_ok=True)


@atexit.register
def _release_all() -> None:
    for key in list(_held):
        _held.pop(key).end()


def _create(path: epath.Path, owner: Owner) -> bool:
    """Create the file exclusively. Returns whether it did not exist."""
    return create_file(path, _encode(owner))


def _write(workdir: epath.Path, owner: Owner) -> None:
    """Replace the file as a whole."""
    path = workdir / FILE
    if is_remote(path):
        path.write_bytes(_encode(owner))
    else:
        new = path.with_name(f"{FILE}.{owner['token'][:8]}.new")  # without locks, two starts may write at one time
        new.write_bytes(_encode(owner))
        new.replace(path)


def _encode(owner: Owner) -> bytes:
    return (strict_json.dumps(owner, indent=1) + "\n").encode()


@contextlib.contextmanager
def _lock(workdir: epath.Path) -> Iterator[bool]:
    """Around reading and replacing the owner: one start at a time. Yields False where there is no such lock."""
    if is_remote(workdir):
        yield False
        return
    directory = os.open(workdir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)
            locked = True
        except OSError:  # not on every shared file system
            locked = False
        yield locked
    finally:
        os.close(directory)


def _is_owner_after_settling(workdir: epath.Path, current: Owner) -> bool:
    time.sleep(_SETTLE_SECONDS)
    owner = read(workdir)
    return owner is not None and owner.get("token") == current["token"]


# --- other owners -----------------------------------------------------------------------------------------------------


def _reason_to_replace(other: Owner, current: Owner) -> str | None:
    """The reason for which the other owner is certainly gone, or counts as gone; None if it may be in progress."""
    return _reason_gone(other, current) or silence(other)


def _reason_gone(other: Owner, current: Owner) -> str | None:
    if not other:
        return "its file is damaged"
    same_system = all(other.get(key) and other.get(key) == current[key] for key in ("boot_id", "pid_namespace"))
    if same_system and _has_ended(other):
        return "that process has ended"
    if other.get("job") and other.get("job") == current["job"] and current["restarts"] > (other.get("restarts") or 0):
        return "an earlier start of the same job"
    return None


def _has_ended(owner: Owner) -> bool:
    """Whether the process of this id has ended, or is another process; for a process of this system."""
    start = _start_time(owner["pid"])
    if start is not None:
        return start != owner.get("process_start")
    try:
        os.kill(owner["pid"], 0)
    except PermissionError:  # of another user, whose processes are hidden
        return False
    except OSError:
        pass
    return True


def _wait(workdir: epath.Path, other: Owner) -> None:
    """Wait until the owner has ended, or has shown no sign of life for `STALE_SECONDS` by this machine's clock.

    Raises RetryableError at its next beat, since its run is then in progress.
    """
    deadline, current = time.monotonic() + STALE_SECONDS, _this_process(1)
    while time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        now = read(workdir)
        if now is None or _reason_to_replace(now, current) is not None:
            return
        if _beat(now) != _beat(other):
            raise RetryableError(f"{_in_use(workdir, now)}; try another directory, or --take-over to end that run")


def _beat(owner: Owner) -> tuple[str | None, float | None]:
    return owner.get("token"), owner.get("beat")


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _in_use(workdir: epath.Path, owner: Owner) -> str:
    return f"workdir = {workdir}: is in use by {describe(owner)}"


# --- this process -----------------------------------------------------------------------------------------------------


def _this_process(processes: int) -> Owner:
    now = time.time()
    job, restarts = _scheduler_job()
    return {
        "host": socket.gethostname(),
        "boot_id": _content("/proc/sys/kernel/random/boot_id"),
        "pid_namespace": _target("/proc/self/ns/pid"),
        "pid": os.getpid(),
        "process_start": _start_time(os.getpid()),
        "job": job,
        "restarts": restarts,
        "processes": processes,
        "since": time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(now)),
        "beat": now,
        "token": uuid.uuid4().hex,
    }


def _scheduler_job() -> tuple[str | None, int]:
    """The id of the scheduler's job, and how often it was started again; a job without a restart count has 0."""
    job = os.environ.get("SLURM_JOB_ID")
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    return job, int(restarts) if restarts.isdecimal() else 0


def _start_time(pid: int | None) -> int | None:
    """The start of a process in clock ticks since the system's boot; None if it has ended, or without /proc."""
    stat = _content(f"/proc/{pid}/stat")
    if stat is None:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in ("Z", "X") else int(fields[18])


def _content(path: str) -> str | None:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return None


def _target(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None
