"""The boundary around every command: errors that a user can act on become lines and an exit code."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from mot_jax.errors import DivergedError, ReportedError, RetryableError, UserError, error_words
from mot_jax.runtime import distributed, exit_codes, interrupts, output
from mot_jax.runtime.paths import FULL, is_io_error, is_passing, is_store_error

# Errors of the operating system, and a remedy for each. Others are a full disk, passing ones or bugs, or are handled
# where they may occur.
_REMEDIES = {
    errno.EACCES: "try a path to which you have access",
    errno.EPERM: "try a path to which you have access",
    errno.EROFS: "try a path that can be written",
    errno.ENOENT: "try a path that exists",
    errno.ENOTDIR: "a part of the path is not a directory; try another path",
    errno.EISDIR: "try the path of a file",
    errno.EEXIST: "another file has this name; try another path",
    errno.ENAMETOOLONG: "try a shorter name",
}
_LONGEST_PATH = 200
_INTERRUPTED = "interrupted"
_RESUMES = "; a training run resumes from its last checkpoint with the same command"
_ending = threading.Lock()  # held by the thread that ends the process after Ctrl-C


@contextlib.contextmanager
def boundary(debug: bool = False, program: bool = False, trains: bool = False) -> Iterator[None]:
    """Around a command: report the errors of the user and of the system in one line each, and exit.

    The exit codes are those of `exit_codes`. Any other exception is a bug and passes, with its traceback.

    Args:
        debug: print the traceback of a reported error as well.
        program: the command is the whole process, which then ends at once after a reported error: threads of a library,
            such as that of a failed save, could keep it alive. Otherwise, and with several processes, SystemExit is
            raised.
        trains: the command continues while nothing reads its output, and drops text. After Ctrl-C it can be resumed.
    """
    interrupted = _INTERRUPTED + _RESUMES * trains
    with output.lenient_streams(never_block=trains):
        try:
            with interrupts.watch(lambda: _end_interrupted(interrupted)) if program else contextlib.nullcontext():
                yield
            output.drain()  # an error of the last write is reported here, not by the interpreter at its exit
        except KeyboardInterrupt:
            if program:
                _ending.acquire()
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the process at once
            _exit([interrupted], exit_codes.INTERRUPTED, debug, program)
        except Exception as error:
            reported = error if isinstance(error, ReportedError) else _system_error(error) or _platform_error(error)
            if reported is None:
                raise
            codes = {RetryableError: exit_codes.RETRYABLE, DivergedError: exit_codes.DIVERGED}
            _exit(reported.faults, codes.get(type(reported), exit_codes.USER_ERROR), debug, program)


def _end_interrupted(line: str) -> None:
    """End the process, and the others of its run, unless the main thread does so. Called in a thread."""
    if _ending.acquire(blocking=False):
        print(f"error: {line}", file=sys.stderr)
        distributed.end_all(exit_codes.INTERRUPTED)


def _exit(lines: Iterable[str], code: int, debug: bool, program: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    if program and not distributed.is_connected():
        distributed.end_now(code)
    sys.exit(code)


# --- errors in one line -----------------------------------------------------------------------------------------------


def _system_error(error: Exception) -> ReportedError | None:
    """An error of the operating system or of an object store in one line; None for other errors.

    A full disk is recognized wherever it is the cause: libraries raise errors of their own, some with only its text.
    """
    if _disk_is_full(error):
        advice = "free some and run the same command, which resumes from the last checkpoint"
        return UserError(f"no space left on the disk ({error_words(error)}); {advice}")
    cause: BaseException | None = error
    while cause is not None:
        if is_io_error(cause):
            filename, number = getattr(cause, "filename", None), getattr(cause, "errno", None)
            path = "" if filename is None else f"{_printable(filename)}: "
            if number in _REMEDIES:
                return UserError(f"{path}{os.strerror(number)}; {_REMEDIES[number]}")
            if is_passing(cause):
                reason = getattr(cause, "strerror", None) or error_words(cause)
                return RetryableError(f"{path}{reason}; the same command may succeed later, and resumes a run")
            if is_store_error(cause):
                return UserError(f"an object store refuses ({error_words(cause)}); try a bucket that you may access")
        cause = cause.__cause__  # not __context__: a bug in the handler of such an error is a bug
    return None


def _disk_is_full(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, "errno", None) in FULL or any(os.strerror(number) in str(error) for number in FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def _printable(path: Any) -> str:
    text = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else str(path)
    text = text if len(text) <= _LONGEST_PATH else text[:_LONGEST_PATH] + "..."
    return text if text.isprintable() else repr(text)


def _platform_error(error: Exception) -> UserError | None:
    """A platform of JAX_PLATFORMS that JAX cannot initialize, in one line; None for other errors."""
    platforms = os.environ.get("JAX_PLATFORMS")
    if not platforms:
        return None
    if isinstance(error, RuntimeError) and "Unable to initialize backend" in str(error):
        reason = error_words(error).partition(" (set JAX_PLATFORMS")[0].removeprefix("RuntimeError: ").rstrip(".")
    elif isinstance(error, AssertionError) and traceback.extract_tb(error.__traceback__)[-1].name == "backends":
        reason = "JAX has no plugin for it"  # jax 0.10.2 and 0.12 assert that some platform is left
    else:
        return None
    return UserError(f"JAX_PLATFORMS = {platforms}: {reason}; try JAX_PLATFORMS=cpu, or install JAX for this platform")
