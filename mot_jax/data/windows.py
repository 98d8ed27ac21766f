"""Tokenized text, packed once into windows of fixed length that can be read in any order.

Packing `concatenate`: a split is one stream of tokens, EOT doc EOT doc ... doc EOT (EOT: end-of-text token). With
S = context_length, window i holds tokens i S .. i S + S of the stream. Consecutive windows overlap by one token, the
last target of one and the first input of the next, so each token after the first is predicted exactly once. The last
window may be shorter; it is padded when it is read.

On disk, in `<directory>/windows/<fingerprint>/`:

    tokens.array_record   one record per window: its tokens, little-endian uint16 (int32 for more than 65,536 tokens)
    documents.npy         int32 [windows, 2], the first and the last document of each window
    windows.json          all inputs of the fingerprint, and the counts; a directory without this file is incomplete

A split of more than 64 MiB is divided into parts at document boundaries; the number of parts depends only on its size.
Each part is a separate stream in its own directory, `<fingerprint>/00003-of-00016/`: several processes build the parts,
and an interrupted build resumes with the missing ones.

If `<directory>` is on an object store, parts are copied from there to the local disk. Parts that it lacks are tokenized
on the local disk and uploaded, each with its `windows.json` last.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import random
import shutil
import socket
import uuid
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath

from mot_jax.config import is_corpus_path
from mot_jax.data import pool, stores
from mot_jax.data.corpora import Corpus, open_corpus
from mot_jax.data.tokenizers import Tokenizer, batch_by_size
from mot_jax.errors import UserError, error_words
from mot_jax.runtime import strict_json
from mot_jax.runtime.paths import disk_errors, is_remote, make_directory, sync

FORMAT_VERSION = 1  # increase it if the same text gives other windows; the next three constants affect the windows, too
PACKING = "concatenate"
PART_BYTES = 2**26
_MAX_PARTS = 256  # each keeps a file open, and systems allow about 1,000
_BATCH = 2**20  # bytes of text that are tokenized in one call
_COUNTS = ("documents", "bytes", "token_bytes", "tokens", "windows")


FILES = ("tokens.array_record", "documents.npy", "windows.json")


class DamagedError(Exception):
    """A directory of windows is incomplete or damaged."""

    def __init__(self, directory: Path, file: str):
        super().__init__(str(directory / file))
        self.file = file


class WindowBatch(NamedTuple):
    """tokens: int32 [k, S + 1]. mask: bool [k, S], True where the target, tokens[:, 1:], is not padding."""

    tokens: np.ndarray
    mask: np.ndarray


class Windows:
    """The windows in a complete directory. Reading is thread-safe.

    Attributes:
        documents: int32 [n, 2], the first and the last document of each window, memory-mapped; both columns are
            non-decreasing.
        info: The inputs of the fingerprint and the counts: documents, bytes (of text), token_bytes (sum of the
            tokenizer's `token_bytes`), tokens, windows.

    Raises:
        DamagedError: The directory is incomplete or damaged.
    """

    def __init__(self, directory: Path):
        file = "windows.json"
        try:
            self.info: dict[str, Any] = _read_info(directory / file)
            file = "documents.npy"
            self.documents = _read_documents(directory / file, self.info)
        except (OSError, ValueError) as error:
            raise DamagedError(directory, file) from error
        # No read-ahead, since access is random.
        self._records = ArrayRecordReader(str(directory / "tokens.array_record"), options="readahead_buffer_size:0")
        if not self.info.keys() >= {*_COUNTS, "dtype", "context_length", "end_of_text"}:
            raise DamagedError(directory, "windows.json")
        if self.info["windows"] != self._records.num_records():
            raise DamagedError(directory, "tokens.array_record")
        if self.info["windows"] != len(self.documents):
            raise DamagedError(directory, "documents.npy")
        self._dtype = np.dtype(self.info["dtype"])
        self.context_length: int = self.info["context_length"]
        self.fingerprint = directory.name
        self.directory = directory

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def bytes_per_token_byte(self) -> float:
        """Bytes of text / sum of the tokenizer's `token_bytes`; 1 for a lossless tokenizer."""
        return self.info["bytes"] / max(self.info["token_bytes"], 1)

    def read(self, ids: Sequence[int] | np.ndarray) -> WindowBatch:
        """Read the windows `ids` [k]. An id of -1 gives an empty sequence: all end-of-text tokens, no targets.

        Raises:
            UserError: The checksum of a record is wrong.
            IndexError: An id is out of range.
        """
        ids = np.asarray(ids)
        if ids.size and ids.max() >= len(self):
            raise IndexError(f"window {ids.max()} of {len(self)}")
        try:
            records = self._records.read(ids[ids >= 0].tolist())
        except RuntimeError as error:
            raise UserError(
                f"{self.directory / 'tokens.array_record'}: is damaged ({error_words(error)}); try rm -r "
                f"{self.directory}, and the same command replaces it"
            ) from error
        lengths = np.zeros(len(ids), int)
        lengths[ids >= 0] = [len(record) // self._dtype.itemsize for record in records]
        non_padding = np.arange(self.context_length + 1) < lengths[:, None]
        tokens = np.full(non_padding.shape, self.info["end_of_text"], np.int32)
        tokens[non_padding] = np.frombuffer(b"".join(records), self._dtype)
        return WindowBatch(tokens, non_padding[:, 1:])


def _read_info(path: Path) -> dict[str, Any]:
    """The content of windows.json. Raises ValueError if it is not as it was written."""
    info = json.loads(path.read_text())
    checksum = info.pop("checksum", None)  # windows of earlier versions have none
    if checksum not in (None, _checksum(info)):
        raise ValueError(f"{path}: wrong checksum")
    return info


def _read_documents(path: Path, info: dict[str, Any]) -> np.ndarray:
    """Map documents.npy into memory. Raises ValueError or OSError if it is not as it was written."""
    if info.get("documents_file_crc32", crc := _crc32(path)) != crc:
        raise ValueError("its checksum is another one")
    try:
        documents: Any = np.load(path, mmap_mode="r")
    except Exception as error:  # of NumPy's parser of the header
        raise ValueError(error_words(error)) from error
    if info.get("documents_crc32", crc := zlib.crc32(documents)) != crc:  # of windows from before the other checksum
        raise ValueError("its checksum is another one")
    return documents


def _crc32(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


def _checksum(info: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(info, sort_keys=True).encode())


class JoinedWindows(Windows):
    """The concatenation of several `Windows`, with consecutive ids and document numbers.

    Attributes:
        documents: In memory.
        info: That of the first part, with the counts summed over all parts.
    """

    def __init__(self, parts: Sequence[Windows], fingerprint: str):
        self.parts = parts
        self.info = parts[0].info | {name: sum(part.info[name] for part in parts) for name in _COUNTS}
        self.context_length = parts[0].context_length
        self.fingerprint = fingerprint
        first_documents = np.cumsum([0, *(part.info["documents"] for part in parts[:-1])])
        self.documents = np.concatenate(
            [part.documents + n for part, n in zip(parts, first_documents, strict=True)], dtype="<i4"
        )
        self._first_ids = np.cumsum([0, *map(len, parts[:-1])])

    def read(self, ids: Sequence[int] | np.ndarray) -> WindowBatch:
        ids = np.asarray(ids)
        of_part = np.searchsorted(self._first_ids, ids, side="right") - 1
        batch = self.parts[0].read(np.full(len(ids), -1))
        for part in np.unique(of_part[ids >= 0]):
            chosen = of_part == part
            batch.tokens[chosen], batch.mask[chosen] = self.parts[part].read(ids[chosen] - self._first_ids[part])
        return batch


def open_windows(
    corpus: str | Corpus,
    split: str,
    tokenizer: Tokenizer,
    context_length: int,
    directory: str | os.PathLike[str],
    workers: int | None = None,
) -> Windows:
    """Open the windows of one split of a corpus; build them first if they do not exist.

    Args:
        corpus: Name, or the split of the corpus if it is open already.
        directory: Local, or on an object store, of which windows are copied to the local disk.
        workers: Number of processes that build parts; None for one per core. Corpus and tokenizer are pickled for them.

    Raises:
        UserError: Unknown corpus or split, or a split that is empty or shorter than a window; a corpus that has changed
            since it was tokenized; damaged windows on a store.
        RetryableError: A store does not respond.
    """
    if isinstance(corpus, str):
        corpus = open_corpus(corpus, split, directory)
    fingerprint, parts = _divide(corpus, split, tokenizer, context_length, directory)
    missing = [part for part in parts if not part.is_complete()]
    if missing and is_remote(directory):
        _tokenize(parts, _absent_from_store(parts), workers)
        _copy(parts)
    elif missing:
        _tokenize(parts, missing, workers)
    opened = [Windows(part.directory) for part in parts]
    for windows in opened:
        _check_shards(windows, parts[0])
    return opened[0] if len(opened) == 1 else JoinedWindows(opened, fingerprint)


def store_windows(
    corpus: Corpus,
    split: str,
    tokenizer: Tokenizer,
    context_length: int,
    directory: str | os.PathLike[str],
    workers: int | None = None,
) -> None:
    """Tokenize and upload the windows that a directory on an object store lacks, so that other hosts can copy them.

    Arguments and errors are those of `open_windows`.
    """
    _, parts = _divide(corpus, split, tokenizer, context_length, directory)
    _tokenize(parts, _absent_from_store(parts), workers)


def _divide(
    corpus: Corpus, split: str, tokenizer: Tokenizer, context_length: int, directory: str | os.PathLike[str]
) -> tuple[str, list[_WindowPart]]:
    """The fingerprint and the parts of the windows of a split."""
    if not len(corpus):
        raise UserError(
            f"data.corpus = {corpus.name!r}: its {split} split has no documents; try another split or corpus"
        )
    count = min(max(1, -(-corpus.num_bytes // PART_BYTES)), _MAX_PARTS, len(corpus))
    inputs = {
        "format": FORMAT_VERSION,
        # Of a path, the name of the data set there: windows do not depend on the spelling of a path.
        "corpus": corpus.version.rpartition("/")[0] if is_corpus_path(corpus.name) else corpus.name,
        "corpus_fingerprint": corpus.fingerprint,
        "split": split,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "packing": PACKING,
        "context_length": context_length,
    } | ({"parts": count} if count > 1 else {})
    fingerprint = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    root = Path(stores.local_copy(directory) if is_remote(directory) else directory) / "windows" / fingerprint
    stored = f"{os.fspath(directory).rstrip('/')}/windows/{fingerprint}" if is_remote(directory) else ""
    names = [""] if count == 1 else [f"{i:05d}-of-{count:05d}" for i in range(count)]
    bounds = [i * len(corpus) // count for i in range(count + 1)]
    return fingerprint, [
        _WindowPart(corpus, tokenizer, inputs, start, stop, root, stored, name)
        for start, stop, name in zip(bounds, bounds[1:], names, strict=False)
    ]


def _check_shards(windows: Windows, part: _WindowPart) -> None:
    """Raise UserError if a data set whose fingerprint is not that of its content has other files than it had."""
    corpus, removals = part.corpus, [f"rm -r {part.root}"]
    if part.stored_root:  # first: another process would copy them again
        removals.insert(0, stores.removal(part.stored_root))
    sizes = {} if corpus.metadata else corpus.shard_sizes()
    for shard, size in windows.info.get("shards", {}).items():
        if sizes.get(shard, size) != size:
            raise UserError(
                f"data.corpus = {corpus.name!r}: {shard} has {sizes[shard]:,} bytes, and had {size:,} when it was "
                f"tokenized: the data set has changed, but not its version; try a new version of it, or "
                f"{' and '.join(removals)} to tokenize it again"
            )


# --- object stores ----------------------------------------------------------------------------------------------------


def _absent_from_store(parts: Sequence[_WindowPart]) -> list[_WindowPart]:
    files = stores.StoredDirectory(parts[0].stored_root).files
    return [part for part in parts if os.path.join(part.name, "windows.json") not in files]


def _copy(parts: Sequence[_WindowPart]) -> None:
    """Copy the parts that are not complete on the local disk from the store, and verify them."""
    root, stored = parts[0].root, stores.StoredDirectory(parts[0].stored_root)
    with stores.one_process_at_a_time(root, f"copies {stored.path}") as locked:
        missing = [part for part in parts if not part.is_complete()]
        staged = root.with_name(f"{root.name}.{stored.digest if locked else uuid.uuid4().hex}.copying")
        for other in root.parent.glob(f"{root.name}.*.copying") if locked else ():  # copies of files since replaced
            if other != staged:
                shutil.rmtree(other, ignore_errors=True)
        stored.copy([os.path.join(part.name, file) for part in missing for file in FILES], staged)
        faults = []
        for part in missing:
            copy = staged / part.name
            if damage := _damage(copy):
                faults.append(
                    f"{part.stored}/{damage}: is damaged; try {stores.removal(part.stored)}, and the same command "
                    "tokenizes the text again"
                )
            else:
                _rename(copy, part.directory)
        shutil.rmtree(staged, ignore_errors=True)
        if faults:
            raise UserError(*faults)


def _damage(directory: Path) -> str | None:
    """The name of a damaged file of windows; None if there is none. All of their content is read."""
    try:
        info = Windows(directory).info
    except DamagedError as error:
        return error.file
    damaged = info.get("tokens_crc32", crc := _crc32(directory / FILES[0])) != crc
    return FILES[0] if damaged else None


# --- building ---------------------------------------------------------------------------------------------------------


def pack(texts: Iterable[np.ndarray], context_length: int, end_of_text: int) -> Iterator[tuple[np.ndarray, int, int]]:
    """Pack tokenized documents into windows: yield (tokens [2 .. S + 1], first document, last document) of each.

    An end-of-text token belongs to the document that it precedes; the final one belongs to the last document.
    """
    pending, document_of, document = np.zeros(0, np.uint16), np.zeros(0, np.int32), -1
    for document, text in enumerate(texts):
        pending = np.concatenate([pending.astype(text.dtype), np.array([end_of_text], text.dtype), text])
        document_of = np.concatenate([document_of, np.full(1 + len(text), document, np.int32)])
        start = 0  # at least one token remains pending, so that the final end-of-text token always completes a window
        for start in range(context_length, len(pending), context_length):
            yield pending[start - context_length : start + 1], document_of[start - context_length], document_of[start]
        pending, document_of = pending[start:], document_of[start:]
    if document >= 0:
        yield np.append(pending, pending.dtype.type(end_of_text)), document_of[0], document_of[-1]


class _WindowPart(NamedTuple):
    """The windows of documents start .. stop - 1 of a corpus.

    root: the directory of all parts. stored_root: on a store; empty without. name: of the part's directory; empty if it
    is the only one.
    """

    corpus: Corpus
    tokenizer: Tokenizer
    inputs: dict[str, Any]
    start: int
    stop: int
    root: Path
    stored_root: str
    name: str

    @property
    def directory(self) -> Path:
        return self.root / self.name

    @property
    def stored(self) -> str:
        return f"{self.stored_root}/{self.name}".rstrip("/")

    def is_complete(self) -> bool:
        with contextlib.suppress(DamagedError):
            Windows(self.directory)
            return True
        return False

    def build(self, advance: pool.Advance) -> None:
        if self.is_complete():  # built by another process since
            advance(self.stop - self.start)
        else:
            with _temporary_directory(self.directory) as temporary:
                _write_windows(temporary, self, advance)
        if self.stored_root:
            stores.upload(self.directory, self.stored, FILES, last=["windows.json"])


def _tokenize(parts: Sequence[_WindowPart], missing: list[_WindowPart], workers: int | None) -> None:
    """Build some of the parts; upload them if they belong on a store."""
    if not missing:
        return
    corpus, store = parts[0].corpus, parts[0].stored_root
    if store:
        make_directory("data.directory", epath.Path(store))  # fails now rather than after the work
    # In random order, so that processes on one file system that build the same windows share the work.
    random.Random().shuffle(missing)
    documents = sum(part.stop - part.start for part in missing)
    with disk_errors(parts[0].root.parent.parent):
        corpus.copy_shards()
        pool.run_in_processes(
            _WindowPart.build, missing, workers, f"tokenizing {corpus.name} {corpus.split}, documents", documents
        )


def _write_windows(directory: Path, part: _WindowPart, advance: pool.Advance) -> None:
    """Write the files of a part. Memory is bounded by a small multiple of the largest document."""
    corpus, tokenizer, inputs, start, stop, *_ = part
    context_length, end_of_text = inputs["context_length"], tokenizer.end_of_text
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<i4")
    counts = dict.fromkeys(_COUNTS, 0) | {"tokens": 1}

    def texts() -> Iterator[np.ndarray]:
        for batch in batch_by_size((text for _, text in corpus.read(start, stop)), _BATCH):
            for text, tokens in zip(batch, tokenizer.encode_batch(batch), strict=True):
                counts["documents"] += 1
                counts["bytes"] += len(text)
                counts["token_bytes"] += int(tokenizer.token_bytes[tokens].sum(dtype=np.int64))
                counts["tokens"] += 1 + len(tokens)
                yield tokens.astype(dtype, copy=False)
            advance(len(batch))

    records = ArrayRecordWriter(str(directory / "tokens.array_record"), "group_size:1")
    with open(directory / "documents.npy", "wb") as documents:
        _write_header(documents, 0)
        for window, first, last in pack(texts(), context_length, end_of_text):
            records.write(window.tobytes())
            documents.write(np.array([first, last], "<i4").tobytes())
            counts["windows"] += 1
        _write_header(documents, counts["windows"])
    records.close()
    if counts["tokens"] <= context_length and "parts" not in inputs:
        raise UserError(
            f"model.context_length = {context_length}: the {corpus.split} split of data.corpus = {corpus.name!r} has "
            f"{counts['tokens']} tokens, and a window takes one more than context_length; "
            f"try {max(counts['tokens'] - 1, 1)} or a larger corpus"
        )
    info = inputs | {"dtype": dtype.str, "end_of_text": end_of_text} | counts
    info["documents_file_crc32"] = _crc32(directory / "documents.npy")
    info["tokens_crc32"] = _crc32(directory / "tokens.array_record")
    if not corpus.metadata:
        info["shards"] = corpus.shard_sizes()
    info["checksum"] = _checksum(info)
    (directory / "windows.json").write_text(strict_json.dumps(info, indent=1) + "\n")


def _write_header(file: BinaryIO, count: int) -> None:
    """Write the header of an .npy file of int32 [count, 2]; padding lets the final count overwrite the first."""
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, {"descr": "<i4", "fortran_order": False, "shape": (count, 2)})


@contextlib.contextmanager
def _temporary_directory(final: Path) -> Iterator[Path]:
    """A new directory that is renamed to `final` at the end, atomically. Several processes may build the same one."""
    final.parent.mkdir(parents=True, exist_ok=True)
    # Some shared file systems grant the same lock to several hosts, so that only builds of this host can be tested.
    for leftover in final.parent.glob(f"*.{glob.escape(socket.gethostname())}.*.building"):
        _remove_if_dead(leftover)
    temporary, lock = _locked_directory(final)
    try:
        yield temporary
        (temporary / "lock").unlink()  # still locked: from here on, no other process takes it for a leftover
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        _rename(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def _locked_directory(final: Path) -> tuple[Path, int]:
    """A new directory next to `final`, and the descriptor of its lock, which shows that the directory is in use."""
    while True:
        temporary = final.parent / f"{final.name}.{socket.gethostname()}.{uuid.uuid4().hex}.building"
        temporary.mkdir()
        lock = os.open(temporary / "lock", os.O_CREAT | os.O_RDWR)
        with contextlib.suppress(OSError):  # without locks, leftovers of interrupted builds are not deleted
            fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if (temporary / "lock").stat().st_ino == os.fstat(lock).st_ino:
                return temporary, lock
        os.close(lock)  # before it was locked, another process took the directory for a leftover and removed it


def _rename(complete: Path, final: Path) -> None:
    """Rename a directory of windows, unless another process has written the same ones."""
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        complete.rename(final)
    except OSError:  # it exists
        try:
            Windows(final)
        except DamagedError:
            shutil.rmtree(final, ignore_errors=True)
            complete.rename(final)


def _remove_if_dead(leftover: Path) -> None:
    """Remove the directory of a build whose process has ended, which released its lock."""
    with contextlib.suppress(OSError), open(leftover / "lock", "rb+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(leftover, ignore_errors=True)
