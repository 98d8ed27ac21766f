"""Paths given by users: local ones, and those of object stores, `gs://` and `s3://`."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib.util
import logging
import os
import re
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from typing import TypeGuard

from etils import epath

from mot_jax.errors import ReportedError, RetryableError, UserError, error_words, nearest

VISIBLE_SECONDS = 30.0
DATA_DIRECTORY = "~/.cache/mot_jax"  # default of data.directory, and the place of compiled programs

# By scheme: the packages that access the store (boto3 for TensorBoard).
_STORES = {"gs": ("gcsfs",), "s3": ("s3fs", "boto3")}

# Errors of a network, store or disk that did not respond, and may respond later: by class, status of a response, errno
# (s3fs raises EBUSY for 503, EREMOTEIO for 500), and text for those that have none of these.
_PASSING_ERRNOS = {
    errno.EIO,
    errno.ESTALE,
    errno.EBUSY,
    errno.EREMOTEIO,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENETRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENOTCONN,
}
_PASSING_STATUSES = {408, 429, 500, 502, 503, 504}
_PASSING_CLASSES = {  # by name, since the packages of stores are optional; subclasses are included
    "aiohttp.client_exceptions.ClientConnectionError",
    "aiohttp.client_exceptions.ClientPayloadError",
    "botocore.exceptions.ConnectionError",
    "botocore.exceptions.HTTPClientError",
    "botocore.exceptions.IncompleteReadError",
    "gcsfs.retry.ChecksumError",
    "google.auth.exceptions.TransportError",
    "http.client.IncompleteRead",
    "requests.exceptions.ChunkedEncodingError",
    "requests.exceptions.ConnectionError",
    "requests.exceptions.Timeout",
    "urllib3.exceptions.IncompleteRead",
}
_PASSING_WORDS = re.compile(
    r"UNAVAILABLE|DEADLINE_EXCEEDED|timed out|timeout\b|\bconnection|not connect|reset by peer|max retries|"
    r"service not known|name resolution|service unavailable|server error|internal error|bad gateway|"
    r"too many requests|reduce your request|input/output error|stale file",
    re.IGNORECASE,
)
_OF_PATHS = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
_NAMES = re.compile(r"(?<!\S)(?!\W*input/output error)\S*/\S*", re.IGNORECASE)  # of files in a text
_STORE_PACKAGES = (
    "aiohttp.",
    "boto3.",
    "botocore.",
    "fsspec.",
    "gcsfs.",
    "google.api_core.",
    "google.auth.",
    "requests.",
    "s3fs.",
    "urllib3.",
)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk, quota or limit


def is_passing(error: Exception) -> bool:
    """Whether an I/O error may be transient, such as a store that does not respond."""
    if isinstance(error, (ConnectionError, TimeoutError, socket.gaierror)):
        return True
    if any(f"{kind.__module__}.{kind.__name__}" in _PASSING_CLASSES for kind in type(error).__mro__):
        return True
    if getattr(error, "retryable", None) is True:  # of google.auth, whose token server did not respond
        return True
    if (status := _status(error)) is not None:
        return status in _PASSING_STATUSES
    if (number := getattr(error, "errno", None)) is not None:
        return number in _PASSING_ERRNOS
    # The words of a file's name have no meaning.
    return not isinstance(error, _OF_PATHS) and bool(_PASSING_WORDS.search(_NAMES.sub("", error_words(error))))


def is_store_error(error: BaseException) -> bool:
    """Whether the class of an error is of a package that accesses stores. Such an error need not be an OSError."""
    return f"{type(error).__module__}.".startswith(_STORE_PACKAGES)


def is_io_error(error: BaseException) -> TypeGuard[Exception]:
    """Whether an error is of the operating system or of an object store."""
    return isinstance(error, OSError) or (isinstance(error, Exception) and is_store_error(error))


def _status(error: Exception) -> int | None:
    """The HTTP status of the response that an error of a store's package reports; None without one."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # of botocore
        if response.get("Error", {}).get("Code") == "RequestTimeout":  # with status 400
            return 408
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:  # of requests, aiohttp, and gcsfs or urllib
        values = (getattr(response, "status_code", None), getattr(error, "status", None), getattr(error, "code", None))
        status = next((value for value in values if value is not None), None)
    return int(status) if isinstance(status, int) or (isinstance(status, str) and status.isdecimal()) else None


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is on an object store: there is no append, rename or lock, and a write is whole or absent."""
    return "://" in os.fspath(path)


def user_path(name: str, path: epath.PathLike) -> epath.Path:
    """Convert a user's string into a path: local (`~` is the home directory) or on an object store.

    Raises:
        UserError: naming `name`, for an empty path, and for a store that is unknown, not installed or refuses access.
        RetryableError: for a store that does not respond.
    """
    text = os.fspath(path)
    if not text:
        raise UserError(f"{name} = '': must be a path; try runs/demo")
    if not is_remote(text):
        return _expand_user(name, text)
    scheme = text.partition("://")[0]
    if scheme not in _STORES:
        known = [f"{store}://" for store in _STORES]
        raise UserError(f"{name} = {text}: must be local, gs:// or s3://{nearest(f'{scheme}://', known)}")
    if text.split("/")[2] == "BUCKET":  # as in the documentation and in launch/
        raise UserError(f"{name} = {text}: BUCKET stands for the name of a bucket; try that of yours")
    packages = _STORES[scheme]
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"{name} = {text}: {missing[0]} is not installed; try pip install {' '.join(packages)}")
    _configure_store(scheme)
    remote = epath.Path(text)
    with store_errors(name, text):
        remote.exists()
    return remote


@contextlib.contextmanager
def store_errors(name: str, path: epath.PathLike) -> Iterator[None]:
    """Around requests to an object store: report their errors in one line that has `name` and `path`.

    Raises UserError if the store refuses, or RetryableError if it does not respond.
    """
    try:
        yield
    except ReportedError:
        raise
    except Exception as error:
        text, reason = os.fspath(path), error_words(error)
        if is_passing(error):
            raise RetryableError(f"{name} = {text}: the store does not respond ({reason})") from None
        login = "gcloud auth application-default login" if text.startswith("gs://") else "aws configure"
        advice = f"try a bucket that you may access, after {login}"
        raise UserError(f"{name} = {text}: the store refuses ({reason}); {advice}") from None


@contextlib.contextmanager
def disk_errors(directory: epath.PathLike) -> Iterator[None]:
    """Report a full disk, quota or limit in one line; libraries raise it as errors of their own, with its text."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        words = next((os.strerror(n) for n in FULL if os.strerror(n) in str(error)), None)
        if words is None:
            raise
        raise UserError(
            f"data.directory = {directory}: {words}; free some, and the same command resumes with the finished "
            "parts; or try another directory (--directory, --data.directory)"
        ) from error


@contextlib.contextmanager
def exclusive_lock(path: epath.PathLike, wait: Callable[[], None]) -> Iterator[bool]:
    """Hold a lock among the processes of a file system. Yields False on file systems without locks.

    wait: called if another process holds the lock.
    """
    with open(path, "wb") as file:
        exclusive = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            exclusive = False
        yield exclusive


def _expand_user(name: str, text: str) -> epath.Path:
    """Replace a leading `~` by the home directory.

    Without one, as in containers with an arbitrary user id, the default of `data.directory` is in the temporary
    directory. Raises UserError for other paths.
    """
    expanded = os.path.expanduser(text)
    if not expanded.startswith("~"):
        return epath.Path(expanded)
    if text == DATA_DIRECTORY:
        return epath.Path(tempfile.gettempdir()) / f"mot_jax-{os.getuid()}"
    raise UserError(f"{name} = {text}: there is no such home directory; set HOME, or try an absolute path")


def local_path(name: str, path: epath.PathLike) -> epath.Path:
    """Convert a user's string into a path on a file system, where files can be mapped, renamed and locked.

    Raises UserError, naming `name`, for an object store.
    """
    if is_remote(path):
        raise UserError(f"{name} = {path}: must be on a local or shared file system; try ~/.cache/mot_jax")
    return user_path(name, path)


def make_directory(name: str, path: epath.Path) -> None:
    """Create a directory and its parents; on an object store, which has none, test that it can be written.

    Raises UserError, naming `name`, if this fails, or RetryableError if it may succeed later.
    """
    try:
        if is_remote(path):
            probe = path / "config.json.new"  # a kill may leave this file behind
            probe.write_bytes(b"")
            probe.unlink()
        else:
            path.mkdir(parents=True, exist_ok=True)
    except Exception as error:
        kind = RetryableError if is_passing(error) else UserError
        raise kind(f"{name} = {path}: cannot be written to ({error_words(error)}); try another") from None


def read_file(path: epath.Path, advice: str) -> bytes:
    """The content of a file of a run or an export.

    Raises:
        UserError: the file cannot be read, for example since it is a directory. `advice` is the end of the line, unless
            the permission is missing.
        RetryableError: the disk or store does not respond.
    """
    try:
        return path.read_bytes()
    except Exception as error:  # a store raises errors of its libraries
        kind = RetryableError if is_passing(error) else UserError
        reason = getattr(error, "strerror", None) or error_words(error)
        if isinstance(error, PermissionError):  # removing a file that only others can read would lose it
            advice = "try as a user who has access to it"
        raise kind(f"{path}: cannot be read ({reason}); {advice}") from None


def replace_file(path: epath.Path, content: bytes) -> None:
    """Write a file atomically: a kill or a power loss leaves the old content or the new one."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if is_remote(path):
        path.write_bytes(content)
    else:
        new = path.with_name(path.name + ".new")
        new.write_bytes(content)
        sync(new)
        new.replace(path)
        sync(path.parent)


def create_file(path: epath.Path, content: bytes) -> bool:
    """Create a file exclusively. Returns whether it did not exist.

    It appears with its whole content, so that a process that did not create it can read it at once; empty only on file
    systems without hard links.
    """
    try:
        if is_remote(path):
            import fsspec

            filesystem, name = fsspec.core.url_to_fs(str(path))
            filesystem.pipe_file(name, content, mode="create")
        else:
            _create_local_file(path, content)
    except FileExistsError:
        return False
    return True


def _create_local_file(path: epath.Path, content: bytes) -> None:
    new = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.new")
    try:
        new.write_bytes(content)
        try:
            os.link(new, path)
        except FileExistsError:
            raise
        except OSError:  # not on every file system
            with open(path, "xb") as file:
                file.write(content)
    finally:
        new.unlink(missing_ok=True)


def await_visible(is_visible: Callable[[], bool]) -> bool:
    """Wait until this host sees the files that another one has written: seconds on some shared file systems.

    Returns whether it does within `VISIBLE_SECONDS`.
    """
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not is_visible():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def sync(path: os.PathLike[str]) -> None:
    """Write a local file, or the names in a directory, from memory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _configure_store(scheme: str) -> None:
    """Disable fsspec's cache of directory listings: Orbax and other processes write to the same directories.

    Also disable gcsfs's tracebacks on stderr: the error is reported where it is raised.
    """
    import fsspec.config

    fsspec.config.conf.setdefault(scheme, {})["use_listings_cache"] = False
    logging.getLogger("gcsfs").addHandler(logging.NullHandler())
