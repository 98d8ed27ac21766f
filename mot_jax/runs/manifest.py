"""Manifests of checkpoints: sizes and checksums of all files, by which damage is found before a file is used.

A manifest is written after all other files of its checkpoint; a step without one is not a checkpoint. TensorStore could
store checksums too, by zarr's `crc32c` codec, but Orbax has no public option for it, and they would cover only the
chunks of arrays, not the files that describe them.
"""

from __future__ import annotations

import base64
import concurrent.futures
import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
from etils import epath

from mot_jax.errors import RetryableError, UserError, error_words
from mot_jax.runtime import distributed, strict_json
from mot_jax.runtime.paths import is_passing, is_remote, replace_file, sync

FILE = "manifest.json"
FORMAT = 1

_CHUNK_BYTES = 2**22
_THREADS = 8  # that read files at the same time; xxhash computes without Python's lock
_VISIBLE_WITHIN = 30.0  # seconds after which every host sees a new file on a shared file system


class Manifest(NamedTuple):
    """The content of a manifest.

    Attributes:
        validation_loss: that of the parameters, in nats per token; None if they were not validated, or if it is NaN or
            infinite.
        files: (size in bytes, checksum) by path below the checkpoint. A checksum is `xxh3:` and 16 hexadecimal digits;
            on object stores it is the store's, `md5:` and 32 digits or `etag:` and the tag.
    """

    validation_loss: float | None
    files: dict[str, tuple[int, str]]


class DamageError(Exception):
    """A checkpoint is not as it was written, or of a newer format. The message is a clause with its own subject."""


def steps_of(folder: epath.Path) -> list[int]:
    """The steps with a manifest in a directory of checkpoints, in ascending order."""
    if not folder.is_dir():
        return []
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]
    return sorted(step for step in steps if (folder / str(step) / FILE).exists())


def newest_intact(
    folder: epath.Path, contents: bool = False, step: int | None = None
) -> tuple[int | None, dict[int, str]]:
    """Find the newest checkpoint that is as it was written. With several processes, each calls this.

    Args:
        folder: the directory of checkpoints.
        contents: read all files on an object store too, instead of comparing the store's checksums.
        step: consider only the checkpoint of this step; None for all.

    Returns:
        Its step, None if there is none; and, for each newer step, the reason for which it is left out.

    Raises:
        UserError, RetryableError: if a file cannot be read.
    """
    left_out: dict[int, str] = {}

    def candidates() -> list[int]:
        return [one for one in steps_of(folder) if one not in left_out and step in (None, one)]

    while steps := distributed.from_first(candidates):
        newest = steps[-1]
        with distributed.together():
            problem = damage(folder / str(newest), contents, *distributed.place())
        problems = [words for words in distributed.gather(problem) if words is not None]
        if not problems:
            return newest, left_out
        # A checkpoint that a run in progress has removed since is not damaged.
        if newest in distributed.from_first(lambda: steps_of(folder)):
            left_out[newest] = problems[0]
    return None, left_out


def left_out_lines(folder: epath.Path, left_out: dict[int, str]) -> list[str]:
    """A line for each checkpoint in `folder` that `newest_intact` leaves out."""
    place = f"workdir = {folder.parent}: its checkpoint"
    return [f"{place} {step} is left out: {reason}" for step, reason in left_out.items()]


def damage(checkpoint: epath.Path, contents: bool = False, index: int = 0, count: int = 1) -> str | None:
    """Compare the files of a checkpoint with its manifest: sizes, and checksums of their contents.

    Args:
        checkpoint: the directory of one step.
        contents: read the files on an object store too, instead of comparing the store's checksums.
        index, count: compare only each `count`-th file, beginning with number `index`.

    Returns:
        The first difference, as a clause; None if there is none.
    """
    try:
        manifest, present = read(checkpoint), _listing(checkpoint)
        names = sorted(manifest.files)[index::count]
        for name in names:
            _compare(name, manifest.files[name], present.get(name))
        if contents or not is_remote(checkpoint):
            expected = {name: manifest.files[name][1] for name in names}
            for name, checksum in _checksums(checkpoint, expected).items():
                if checksum != expected[name]:
                    raise DamageError(f"{name} has other content than was written (checksum {checksum})")
    except DamageError as error:
        return str(error)
    except OSError as error:
        if is_passing(error):
            raise RetryableError(f"{checkpoint}: cannot be read now ({error_words(error)})") from None
        raise UserError(f"{checkpoint}: cannot be read ({error_words(error)}); try chmod -R u+rX") from None
    return None


def read(checkpoint: epath.Path) -> Manifest:
    """Read the manifest of a checkpoint. Raises DamageError if it is missing, damaged or of a newer format."""
    try:
        text = (checkpoint / FILE).read_text()
        content = json.loads(text)
        if content["format"] > FORMAT:
            raise DamageError(f"its format {content['format']} is newer than this mot_jax, which reads {FORMAT}")
        checksum = content.pop("checksum")
        if text != _encode(content) or checksum != _text_checksum(content):
            raise ValueError("other content than was written")
        files = {name: (size, words) for name, (size, words) in content["files"].items()}
    except FileNotFoundError:
        raise DamageError(f"{FILE} is missing: the checkpoint was not saved completely") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamageError(f"{FILE} is damaged ({error_words(error)})") from None
    return Manifest(content["validation_loss"], files)


def write(checkpoint: epath.Path, key: str, validation_loss: float | None = None) -> None:
    """Write the manifest of a checkpoint whose files are complete, and sync them to the disk.

    With several processes, each calls this, in any thread; each reads its share of the files. Process 0 writes.

    Args:
        key: a text that is the same in all processes, and different for each call.
    """
    listing = distributed.gather(_listing(checkpoint) if distributed.is_first() else None, f"{key}/listing")[0]
    sizes = {name: size for name, (size, _) in listing.items()}
    checksums = {name: checksum for name, (_, checksum) in listing.items()}
    if not is_remote(checkpoint):
        index, count = distributed.place()
        share = dict.fromkeys(sorted(sizes)[index::count], "xxh3:")
        _await_visible(checkpoint, share)
        shares = distributed.gather(_checksums(checkpoint, share, durable=True), f"{key}/checksums")
        checksums = {name: checksum for share in shares for name, checksum in share.items()}
    if not distributed.is_first():
        return
    if not is_remote(checkpoint):
        for folder, _, _ in os.walk(checkpoint):
            sync(Path(folder))
        sync(Path(checkpoint.parent))
    content = {
        "format": FORMAT,
        "validation_loss": validation_loss,  # written as null if it is not finite
        "files": {name: (sizes[name], checksums[name]) for name in sorted(sizes)},
    }
    replace_file(checkpoint / FILE, _encode(content).encode())


def _encode(content: dict[str, Any]) -> str:
    return strict_json.dumps(content | {"checksum": _text_checksum(content)}, indent=1) + "\n"


def _text_checksum(content: dict[str, Any]) -> str:
    return "xxh3:" + xxhash.xxh3_64_hexdigest(strict_json.dumps(content).encode())


def _compare(name: str, expected: tuple[int, str], present: tuple[int, str] | None) -> None:
    """Raise DamageError if a file is missing or has another size or another checksum of its store."""
    if present is None:
        raise DamageError(f"{name} is missing")
    (size, checksum), (present_size, present_checksum) = expected, present
    if present_size != size:
        raise DamageError(f"{name} has {present_size:,} bytes instead of {size:,}")
    same_kind = checksum.partition(":")[0] == present_checksum.partition(":")[0]
    if same_kind and checksum != present_checksum:
        raise DamageError(f"{name} has other content than was written (checksum {present_checksum})")


def _listing(checkpoint: epath.Path) -> dict[str, tuple[int, str]]:
    """(Size, checksum of the store) of all files by their path below the checkpoint, without the manifest."""
    files: dict[str, tuple[int, str]] = {}
    if is_remote(checkpoint):
        import fsspec

        filesystem, root = fsspec.core.url_to_fs(str(checkpoint))
        for path, info in filesystem.find(root, detail=True).items():
            files[path.removeprefix(root).lstrip("/")] = (info["size"], _store_checksum(info))
    else:
        for folder, _, names in os.walk(checkpoint):
            for path in (Path(folder, name) for name in names):
                files[path.relative_to(checkpoint).as_posix()] = (path.stat().st_size, "")
    return {name: file for name, file in files.items() if name not in (FILE, FILE + ".new")}


def _store_checksum(info: dict[str, Any]) -> str:
    """The checksum of an object as its store lists it: MD5 on Google's, a tag on S3."""
    if "md5Hash" in info:
        return "md5:" + base64.b64decode(info["md5Hash"]).hex()
    return f"etag:{info.get('ETag', '')}"


def _checksums(checkpoint: epath.Path, kinds: dict[str, str], durable: bool = False) -> dict[str, str]:
    """Read files and compute their checksums, of the same kinds as the checksums given. durable: sync them too."""

    def compute(name: str) -> str:
        return _checksum(checkpoint / name, kinds[name], durable)

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        return dict(zip(kinds, threads.map(compute, kinds), strict=True))


def _checksum(path: epath.Path, like: str, durable: bool) -> str:
    kind = like.partition(":")[0]
    # An S3 tag cannot be computed: that the file can be read is all there is to check.
    digest = hashlib.md5(usedforsecurity=False) if kind == "md5" else xxhash.xxh3_64()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
            if durable:
                os.fsync(file.fileno())
    except FileNotFoundError:
        raise DamageError(f"{path.name} is missing") from None
    return like if kind == "etag" else f"{kind}:{digest.hexdigest()}"


def _await_visible(checkpoint: epath.Path, names: Iterable[str]) -> None:
    """Wait until this process sees the files, which on shared file systems can take seconds."""
    deadline = time.monotonic() + _VISIBLE_WITHIN
    for path in (checkpoint / name for name in names):
        while not path.exists():
            if time.monotonic() > deadline:
                raise UserError(f"{path}: is not visible in every process; try a workdir on a shared file system")
            time.sleep(0.1)
