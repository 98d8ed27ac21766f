"""Manifests of checkpoints: sizes and checksums of all files, by which damage is found before a file is used.

A manifest is written after all other files of its checkpoint; a step without one is not a checkpoint. TensorStore could
store checksums too, by zarr's `crc32c` codec, but Orbax has no public option for it, and they would cover only the
chunks of arrays, not the files that describe them.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
from etils import epath

from mot_jax.errors import ReportedError, RetryableError, UserError, error_words
from mot_jax.runtime import distributed, strict_json
from mot_jax.runtime.paths import await_visible, is_io_error, is_passing, is_remote, replace_file, sync

FILE = "manifest.json"
FORMAT = 1

_CHUNK_BYTES = 2**22
_THREADS = 8  # that read files at the same time; xxhash computes without Python's lock


class Manifest(NamedTuple):
    """The content of a manifest.

    Attributes:
        validation_loss: that of the parameters, in nats per token; None if they were not validated, or if it is NaN or
            infinite.
        files: (size in bytes, checksum) by path below the checkpoint. A checksum is `xxh3:` and 16 hexadecimal digits;
            on object stores it is the store's, `md5:` and 32 digits, or `etag:` and a tag of S3 that is no checksum of
            the content, since the object was uploaded in parts or is encrypted with a key of AWS KMS.
    """

    validation_loss: float | None
    files: dict[str, tuple[int, str]]

    def remark(self) -> str:
        """A clause about files whose contents cannot be compared; empty without such files."""
        tagged = sum(checksum.startswith("etag:") for _, checksum in self.files.values())
        return (
            f"; of {tagged} of {len(self.files)} files only sizes, and tags on S3, could be compared" if tagged else ""
        )


class DamageError(Exception):
    """A checkpoint is not as it was written. The message is a clause with its own subject."""


class NewerFormatError(DamageError):
    """A checkpoint has a format that this version cannot read."""


def steps_of(folder: epath.Path) -> list[int]:
    """The steps with a manifest in a directory of checkpoints, in ascending order."""
    return [step for step in committed_steps(folder) if (folder / str(step) / FILE).exists()]


def committed_steps(folder: epath.Path) -> list[int]:
    """The steps that Orbax has committed, with a manifest or without, in ascending order."""
    if not folder.is_dir():
        return []
    mark = "commit_success.txt" if is_remote(folder) else "_CHECKPOINT_METADATA"
    names = [path.name for path in folder.iterdir() if path.name.isdecimal()]
    return sorted(int(name) for name in names if any((folder / name / file).exists() for file in (FILE, mark)))


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
    index, count = distributed.place()

    def candidates() -> list[int]:
        return [one for one in committed_steps(folder) if one not in left_out and step in (None, one)]

    # Process 0 lists the files: other hosts of a shared file system may still see an older state.
    while steps := distributed.from_first(candidates):
        newest = steps[-1]
        checkpoint = folder / str(newest)
        problem, checksums = distributed.from_first(functools.partial(_listed, checkpoint, contents))
        if problem is None:
            share = {name: checksums[name] for name in sorted(checksums)[index::count]}
            with distributed.together():
                problem = _content_damage(checkpoint, share)
        problems = [words for words in distributed.gather(problem) if words is not None]
        if not problems:
            return newest, left_out
        # A checkpoint that a run in progress has removed since is not damaged.
        if newest in distributed.from_first(lambda: committed_steps(folder)):
            left_out[newest] = problems[0]
    return None, left_out


def left_out_lines(folder: epath.Path, left_out: dict[int, str]) -> list[str]:
    """A line for each checkpoint in `folder` that `newest_intact` leaves out."""
    place = f"workdir = {folder.parent}: its checkpoint"
    return [f"{place} {step} is left out: {reason}" for step, reason in left_out.items()]


def damage(checkpoint: epath.Path) -> str | None:
    """Compare all files of a checkpoint with its manifest: sizes and contents, also on an object store.

    Returns:
        The first difference, as a clause; None if there is none.
    """
    problem, checksums = _listed(checkpoint, contents=True)
    return problem or _content_damage(checkpoint, checksums)


def _listed(checkpoint: epath.Path, contents: bool) -> tuple[str | None, dict[str, str]]:
    """Compare the sizes of files, and checksums of the store that has them.

    Returns:
        The first difference, as a clause, and the checksums with which contents remain to be compared.
    """
    try:
        with _reading(checkpoint):
            manifest, present = read(checkpoint), _listing(checkpoint)
            for name, expected in manifest.files.items():
                _compare(checkpoint / name, name, expected, present.get(name))
    except DamageError as error:
        return str(error), {}
    compared = is_remote(checkpoint) and not contents
    return None, {} if compared else {name: checksum for name, (_, checksum) in manifest.files.items()}


def _content_damage(checkpoint: epath.Path, checksums: dict[str, str]) -> str | None:
    """Read files, and compare their contents with checksums. Returns the first difference, as a clause."""
    try:
        with _reading(checkpoint):
            for name, checksum in _checksums(checkpoint, checksums).items():
                if checksum != checksums[name]:
                    return f"{name} has other content than was written (checksum {checksum})"
    except DamageError as error:
        return str(error)
    return None


@contextlib.contextmanager
def _reading(checkpoint: epath.Path) -> Iterator[None]:
    """Around reading: raises RetryableError for a disk or store that does not respond, UserError if it refuses."""
    try:
        yield
    except (DamageError, ReportedError):
        raise
    except Exception as error:
        if is_passing(error):
            raise RetryableError(f"{checkpoint}: cannot be read now ({error_words(error)})") from None
        if not is_io_error(error):
            raise
        raise UserError(f"{checkpoint}: cannot be read ({error_words(error)}); try chmod -R u+rX") from None


def read(checkpoint: epath.Path) -> Manifest:
    """Read the manifest of a checkpoint. Raises DamageError if it is missing, damaged or of a newer format."""
    try:
        text = (checkpoint / FILE).read_text()
        content = json.loads(text)
        if content["format"] > FORMAT:
            raise NewerFormatError(f"its format {content['format']} is newer than {FORMAT}, that of this mot_jax")
        checksum = content.pop("checksum")
        if text != _encode(content) or checksum != _text_checksum(content):
            raise ValueError("other content than was written")
        files = {
            name: (size, _of_tag(words.removeprefix("etag:")) if words.startswith('etag:"') else words)
            for name, (size, words) in content["files"].items()
        }
    except FileNotFoundError:
        reason = "its save is in progress or was interrupted, or an earlier mot_jax saved it"
        raise DamageError(f"{FILE} is missing: {reason}; `mot verify --adopt` writes one") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamageError(f"{FILE} is damaged ({error_words(error)})") from None
    return Manifest(content["validation_loss"], files)


def is_newer_format(checkpoint: epath.Path) -> bool:
    """Whether a checkpoint has a format that this version cannot read."""
    try:
        read(checkpoint)
    except NewerFormatError:
        return True
    except DamageError:
        pass
    return False


def write(checkpoint: epath.Path, key: str, validation_loss: float | None = None) -> None:
    """Write the manifest of a checkpoint whose files are complete, and sync them to the disk.

    With several processes, each calls this, in any thread; each reads its share of the files. Process 0 writes.

    Args:
        key: a text that is the same in all processes, and different for each call.
    """
    listing = distributed.gather(_listing(checkpoint) if distributed.is_first() else None, f"{key}/listing")[0]
    sizes = {name: size for name, (size, _) in listing.items()}
    checksums: dict[str, str] = {}
    if not is_remote(checkpoint):
        index, count = distributed.place()
        share = dict.fromkeys(sorted(sizes)[index::count], "xxh3:")
        shares = distributed.gather(_checksums(checkpoint, share, durable=True), f"{key}/checksums")
        checksums = {name: checksum for share in shares for name, checksum in share.items()}
    if not distributed.is_first():
        return
    if is_remote(checkpoint):
        checksums = _without_encrypted_tags(checkpoint, listing)
    else:
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


def _compare(path: epath.Path, name: str, expected: tuple[int, str], present: tuple[int, str] | None) -> None:
    """Raise DamageError if a file is missing or has another size or another checksum of its store."""
    if present is None:
        raise DamageError(f"{name} is missing")
    (size, checksum), (present_size, present_checksum) = expected, present
    if present_size != size:
        raise DamageError(f"{name} has {present_size:,} bytes instead of {size:,}")
    kind, _, digest = checksum.partition(":")
    if digest == present_checksum.partition(":")[2] or kind == "xxh3" or not present_checksum:
        return
    # The tag of an object that was uploaded in parts changes with a copy, and one of an encrypted copy is no MD5.
    if kind == "etag" and (not digest or "-" in checksum + present_checksum):
        return
    if kind == "md5" and _checksum(path, "md5:", False) == checksum:
        return
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
    return _of_tag(info.get("ETag", ""))


def _of_tag(tag: str) -> str:
    """The checksum that a tag of S3 is: MD5, if it has the form of one. Stores return it in quotes."""
    tag = tag.strip('"')
    return f"md5:{tag}" if re.fullmatch("[0-9a-f]{32}", tag) else f"etag:{tag}"


def _without_encrypted_tags(checkpoint: epath.Path, listing: dict[str, tuple[int, str]]) -> dict[str, str]:
    """The checksums in a listing. On S3, tags of encrypted objects have the form of MD5: the smallest file is read."""
    checksums = {name: checksum for name, (_, checksum) in listing.items()}
    names = [name for name, checksum in checksums.items() if checksum.startswith("md5:")]
    if str(checkpoint).startswith("s3://") and names:
        smallest = min(names, key=lambda name: listing[name][0])
        if _checksum(checkpoint / smallest, "md5:", False) != checksums[smallest]:
            checksums |= {name: checksums[name].replace("md5:", "etag:") for name in names}
    return checksums


def _checksums(checkpoint: epath.Path, kinds: dict[str, str], durable: bool = False) -> dict[str, str]:
    """Read files and compute their checksums, of the same kinds as the checksums given. durable: sync them too."""

    def compute(name: str) -> str:
        return _checksum(checkpoint / name, kinds[name], durable)

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        return dict(zip(kinds, threads.map(compute, kinds), strict=True))


def _checksum(path: epath.Path, like: str, durable: bool) -> str:
    kind = like.partition(":")[0]
    # A tag that is no checksum cannot be computed: that the file can be read is all there is to check.
    digest = hashlib.md5(usedforsecurity=False) if kind == "md5" else xxhash.xxh3_64()
    try:
        if not distributed.is_first():
            await_visible(path.exists)
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
            if durable:
                os.fsync(file.fileno())
    except FileNotFoundError:
        raise DamageError(f"{path.name} is missing") from None
    return like if kind == "etag" else f"{kind}:{digest.hexdigest()}"
