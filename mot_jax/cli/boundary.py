"""The boundary around every command: errors that a user can act on become lines and an exit code."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

from mot_jax.errors import DivergedError, ReportedError, RetryableError, error_words
from mot_jax.runtime import distributed, exit_codes

_FREE_SPACE = "free some and run the same command, which resumes from the last checkpoint"

# Errors of the operating system, and a remedy for each. Others are bugs, or are handled where they may occur.
_REMEDIES = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EACCES: "try a path to which you have access",
    errno.EPERM: "try a path to which you have access",
    errno.EROFS: "try a path that can be written",
    errno.ENOENT: "try a path that exists",
    errno.ENOTDIR: "a part of the path is not a directory; try another path",
    errno.EISDIR: "try the path of a file",
    errno.ENAMETOOLONG: "try a shorter name",
}
_LONGEST_PATH = 200


@contextlib.contextmanager
def boundary(debug: bool = False, program: bool = False) -> Iterator[None]:
    """Around a command: report the errors of the user and of the system in one line each, and exit.

    The exit codes are those of `exit_codes`. Any other exception is a bug and passes, with its traceback.

    Args:
        debug: print the traceback of a reported error as well.
        program: the command is the whole process, which then ends at once after a reported error: threads of a library,
            such as that of a failed save, could keep it alive. Otherwise, and with several processes, SystemExit is
            raised.
    """
    with _lenient_streams():
        try:
            yield
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()  # an error of the last write is reported here, not by the interpreter at its exit
        except KeyboardInterrupt:
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the process at once
            lines = ["interrupted; a training run resumes from its last checkpoint with the same command"]
            _exit(lines, exit_codes.INTERRUPTED, debug, program)
        except ReportedError as error:
            codes = {RetryableError: exit_codes.RETRYABLE, DivergedError: exit_codes.DIVERGED}
            _exit(error.faults, codes.get(type(error), exit_codes.USER_ERROR), debug, program)
        except Exception as error:
            line = _system_error(error) or _platform_error(error)
            if line is None:
                raise
            _exit([line], exit_codes.USER_ERROR, debug, program)


def _exit(lines: tuple[str, ...] | list[str], code: int, debug: bool, program: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    if program and not distributed.is_connected():
        distributed.end_now(code)
    sys.exit(code)


# --- errors in one line -----------------------------------------------------------------------------------------------


def _system_error(error: Exception) -> str | None:
    """An error of the operating system in one line; None for other errors.

    A full disk is recognised wherever it is the cause: libraries raise errors of their own, some with only its text.
    """
    if _disk_is_full(error):
        return f"no space left on the disk ({error_words(error)}); {_FREE_SPACE}"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _REMEDIES:
            reason = os.strerror(cause.errno)
            path = "" if cause.filename is None else f"{_printable(cause.filename)}: "
            return f"{path}{reason}; {_REMEDIES[cause.errno]}"
        cause = cause.__cause__  # not __context__: a bug in the handler of such an error is a bug
    return None


def _disk_is_full(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _printable(path: Any) -> str:
    text = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else str(path)
    text = text if len(text) <= _LONGEST_PATH else text[:_LONGEST_PATH] + "..."
    return text if text.isprintable() else repr(text)


def _platform_error(error: Exception) -> str | None:
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
    return f"JAX_PLATFORMS = {platforms}: {reason}; try JAX_PLATFORMS=cpu, or install JAX for this platform"


# --- streams ----------------------------------------------------------------------------------------------------------


class _Output:
    """A text stream that discards all output once the reader of its pipe has gone, so that the command continues."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        with self._until_closed():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._until_closed():
            self._stream.flush()

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
def _lenient_streams() -> Iterator[None]:
    """Standard streams that replace characters outside of their encoding, and outlive the reader of a pipe."""
    for stream in (sys.stdin, sys.stdout):  # standard error escapes such characters by default
        if hasattr(stream, "reconfigure"):
            with contextlib.suppress(io.UnsupportedOperation):  # it was read before, by a program that calls `main`
                stream.reconfigure(errors="replace")
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (None if stream is None else _Output(stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
