"""Text on an object store: its files are copied to the local disk before they are read, and uploaded when complete.

Windows are read in random order over a whole split, a few kilobytes at a time, and each host's sequences come from all
of its files. Ranges would take a request per window and epoch, and the mesh may change at a resume; hence each host
copies whole files, once. Of a corpus it copies the metadata, and the shards of a split only to tokenize or print it.

    ~/.cache/mot_jax/stores/gs/BUCKET/PATH/windows/<fingerprint>/          copy of gs://BUCKET/PATH/windows/...
    ~/.cache/mot_jax/stores/gs/BUCKET/PATH/corpora/NAME/1.0.0/<digest>/    copy of gs://BUCKET/PATH/corpora/NAME/1.0.0,
                                                                           by the digest of its list of files

A file has its name only when it is complete: an interrupted copy resumes with the missing files.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from mot_jax.errors import RetryableError, UserError
from mot_jax.runtime.paths import DATA_DIRECTORY, disk_errors, exclusive_lock, store_errors, sync, user_path
from mot_jax.runtime.progress import Advance, progress

_CONNECTIONS = 16


class StoredFile(NamedTuple):
    """A file on a store. version: changes with its content."""

    size: int
    version: str


class StoredDirectory:
    """The files below a directory on an object store, as listed by one request.

    Attributes:
        files: By name relative to the directory.
    """

    def __init__(self, path: epath.PathLike):
        self.path = os.fspath(path)
        with store_errors("data.directory", self.path):
            filesystem, root = _filesystem(self.path)
            infos = filesystem.find(root, detail=True)
        self.files = {
            name.removeprefix(f"{root}/"): _stored_file(info)
            for name, info in sorted(infos.items())
            if name.startswith(f"{root}/") and info["type"] == "file"
        }

    @property
    def digest(self) -> str:
        """Changes with the names and contents of the files."""
        return hashlib.sha256(repr(sorted(self.files.items())).encode()).hexdigest()[:16]

    def copy(self, names: Iterable[str], target: Path) -> None:
        """Copy files to the directory `target`, unless they are there.

        Raises:
            UserError: A file does not exist, the store refuses, or the disk has no space.
            RetryableError: The store does not respond, or a file has been replaced since it was listed.
        """
        missing = sorted(name for name in names if not (target / name).exists())
        if not missing:
            return
        for name in missing:
            if name not in self.files:
                raise UserError(f"{self.path}/{name}: is missing; try copying {self.path} to the store again")
        target.mkdir(parents=True, exist_ok=True)
        needed, free = sum(self.files[name].size for name in missing), shutil.disk_usage(target).free
        if needed > free:
            raise UserError(
                f"data.directory = {self.path}: its copy needs {needed / 1e6:,.1f} MB in {_root()}, and "
                f"{free / 1e6:,.1f} MB are free; free some, or make {_root()} a link to a larger disk"
            )
        filesystem, root = _filesystem(self.path)

        def copy(name: str, advance: Advance) -> None:
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
            try:
                part.touch()  # so that a directory that cannot be written is not taken for an error of the store
                with store_errors("data.directory", self.path), disk_errors(f"{self.path}, copied to {target}"):
                    try:
                        filesystem.get_file(f"{root}/{name}", str(part), callback=_callback(advance))
                        now = _stored_file(filesystem.info(f"{root}/{name}"))
                    except FileNotFoundError:
                        now = None
                    if now != self.files[name]:
                        raise RetryableError(
                            f"data.directory = {self.path}: {name} has changed while it was copied; the same command "
                            "reads the new one"
                        )
                    if part.stat().st_size != now.size:
                        raise ConnectionError(f"{name}: {part.stat().st_size} of {now.size} bytes")
                sync(part)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)

        with disk_errors(f"{self.path}, copied to {target}"):
            _in_threads(copy, missing, f"copying {self.path}, bytes", needed)


@contextlib.contextmanager
def one_process_at_a_time(target: Path, words: str, lock_name: str | None = None) -> Iterator[bool]:
    """Hold the lock of a directory that is written, and delete partial files. Yields False where there are no locks.

    Args:
        lock_name: Of the lock file next to `target`; None for one of its own.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = target.with_name(lock_name or f".{target.name}.lock")
    with exclusive_lock(lock, lambda: print(f"waiting for another process that {words}", file=sys.stderr)) as locked:
        if locked:
            for part in target.parent.glob(f"{target.name}*/**/*.part"):
                part.unlink()
        yield locked


def local_copy(path: epath.PathLike) -> Path:
    """The place on the local disk for copies of a file or directory on a store."""
    scheme, _, rest = os.fspath(path).partition("://")
    return _root().joinpath(scheme, *(part for part in rest.split("/") if part not in ("", ".", "..")))


def upload(source: Path, target: epath.PathLike, names: Sequence[str], last: Sequence[str]) -> None:
    """Copy files of a local directory to a store; those of `last` in this order when all others are complete there.

    Raises:
        UserError: The store refuses.
        RetryableError: The store does not respond.
    """
    filesystem, root = _filesystem(os.fspath(target))

    def copy(name: str, advance: Advance) -> None:
        with store_errors("data.directory", target):
            filesystem.put_file(str(source / name), f"{root}/{name}", callback=_callback(advance))

    first = [name for name in names if name not in last]
    sizes = sum((source / name).stat().st_size for name in first)
    _in_threads(copy, first, f"copying to {target}, bytes", sizes)
    for name in last:
        copy(name, lambda count: None)


def removal(path: epath.PathLike) -> str:
    """The command that removes a directory, for error messages."""
    commands = {"gs": "gcloud storage rm -r", "s3": "aws s3 rm --recursive"}
    return f"{commands.get(os.fspath(path).partition('://')[0], 'rm -r')} {path}"


def _root() -> Path:
    return Path(user_path("data.directory", DATA_DIRECTORY)).absolute() / "stores"


def _stored_file(info: dict[str, Any]) -> StoredFile:
    """A file from fsspec's description of it."""
    checksums = ("ETag", "crc32c", "md5Hash", "etag", "generation")
    return StoredFile(int(info["size"]), str(next((info[key] for key in checksums if info.get(key)), "")))


def _filesystem(path: str) -> tuple[Any, str]:
    """fsspec's file system of a store, and the path in it."""
    import fsspec

    return fsspec.core.url_to_fs(path.rstrip("/"))


def _in_threads(copy: Any, names: Sequence[str], title: str, total: int) -> None:
    """Call copy(name, advance) for each name, in several threads. The first error ends all that have not begun."""
    lock = threading.Lock()
    with progress(title, total) as advance, ThreadPoolExecutor(_CONNECTIONS) as executor:

        def advance_by(count: int) -> None:
            with lock:
                advance(count)

        futures = [executor.submit(copy, name, advance_by) for name in names]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            executor.shutdown(cancel_futures=True)
        for future in done:
            future.result()


def _callback(advance: Advance) -> Any:
    """fsspec's callback that reports the bytes of a file."""
    from fsspec.callbacks import Callback

    class Bytes(Callback):
        reported = 0

        def call(self, *_: object, **__: object) -> None:
            advance(self.value - self.reported)
            self.reported = self.value

    return Bytes()
