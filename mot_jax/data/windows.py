"""Tokenised text, cut once into windows of fixed length that can be read in any order.

Packing `concatenate`: a split is one stream of tokens, EOT doc EOT doc ... doc EOT. With S = context_length, window i
holds tokens i S .. i S + S of it. The one token of overlap is the last target here and the first input there, so each
token after the first is predicted exactly once. The last window may be shorter; reading pads it.

On disk, in `<directory>/windows/<fingerprint>/`:

    tokens.array_record   one record a window: its tokens, little-endian uint16 (int32 for more than 65,536 tokens)
    documents.npy         int32 [windows, 2], the first and last document that each window touches
    windows.json          everything the fingerprint is made of, and the counts; a directory without it is unfinished

A split of more than 64 MiB is cut into parts, between documents and by its size alone. Each is a stream of its own in
a directory of its own, `<fingerprint>/00003-of-00016/`, so that many processes can build the windows, and a build that
is killed goes on with the parts that are missing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import random
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from mot_jax.data import pool
from mot_jax.data.corpora import Corpus, open_corpus
from mot_jax.data.tokenizers import Tokenizer, batches
from mot_jax.errors import UserError

FORMAT_VERSION = 1  # another one where other windows are made of the same text: the next three decide it, too
PACKING = "concatenate"
PART_BYTES = 2**26
_MOST_PARTS = 256  # each keeps a file open, and systems allow about a thousand
_BATCH = 2**20  # bytes of text that are encoded together
_COUNTS = ("documents", "bytes", "token_bytes", "tokens", "windows")


class DamagedError(Exception):
    """A directory of windows that is unfinished or damaged."""


class WindowBatch(NamedTuple):
    """tokens: int32 [k, S + 1]; mask: bool [k, S], True where the target, tokens[:, 1:], is real."""

    tokens: np.ndarray
    mask: np.ndarray


class Windows:
    """The windows in a finished directory; threads may share it. Raises DamagedError.

    documents: int32 [n, 2], the first and last document of each window, mapped from disk; neither column decreases.
    info: what the fingerprint is made of, and the counts of documents, bytes (of text), token_bytes (of text by the
    tokenizer's account), tokens and windows.
    """

    def __init__(self, directory: Path):
        try:
            self.info: dict[str, Any] = json.loads((directory / "windows.json").read_text())
            self.documents: np.ndarray = np.load(directory / "documents.npy", mmap_mode="r")
        except (OSError, ValueError) as error:
            raise DamagedError(directory) from error
        # No reading ahead: the next record that is wanted lies anywhere.
        self._records = ArrayRecordReader(str(directory / "tokens.array_record"), options="readahead_buffer_size:0")
        counts = {self.info.get("windows"), len(self.documents), self._records.num_records()}
        if len(counts) > 1 or not self.info.keys() >= set(_COUNTS):
            raise DamagedError(directory)
        self._dtype = np.dtype(self.info["dtype"])
        self.context_length: int = self.info["context_length"]
        self.fingerprint = directory.name

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def bytes_per_token_byte(self) -> float:
        """Bytes of text over the sum of the tokenizer's `token_bytes`: 1, unless the tokenizer drops or changes any."""
        return self.info["bytes"] / max(self.info["token_bytes"], 1)

    def read(self, ids: Sequence[int] | np.ndarray) -> WindowBatch:
        """The windows `ids` [k]. An id of -1 is an absent row: all end-of-text, nothing to predict.

        Raises RuntimeError for a record whose checksum is wrong, and for an id past the end.
        """
        ids = np.asarray(ids)
        records = self._records.read(ids[ids >= 0].tolist())
        lengths = np.zeros(len(ids), int)
        lengths[ids >= 0] = [len(record) // self._dtype.itemsize for record in records]
        real = np.arange(self.context_length + 1) < lengths[:, None]
        tokens = np.full(real.shape, self.info["end_of_text"], np.int32)
        tokens[real] = np.frombuffer(b"".join(records), self._dtype)
        return WindowBatch(tokens, real[:, 1:])


class JoinedWindows(Windows):
    """Several `Windows` as one: the ids and the documents of the first, of the second, and so on.

    documents: in memory. info: of the first, with the counts of all.
    """

    def __init__(self, parts: Sequence[Windows], fingerprint: str):
        self.parts = parts
        self.info = parts[0].info | {name: sum(part.info[name] for part in parts) for name in _COUNTS}
        self.context_length = parts[0].context_length
        self.fingerprint = fingerprint
        opened = np.cumsum([0, *(part.info["documents"] for part in parts[:-1])])
        self.documents = np.concatenate(
            [part.documents + n for part, n in zip(parts, opened, strict=True)], dtype="<i4"
        )
        self._begins = np.cumsum([0, *map(len, parts[:-1])])

    def read(self, ids: Sequence[int] | np.ndarray) -> WindowBatch:
        ids = np.asarray(ids)
        of_part = np.searchsorted(self._begins, ids, side="right") - 1
        batch = self.parts[0].read(np.full(len(ids), -1))
        for part in np.unique(of_part[ids >= 0]):
            rows = of_part == part
            batch.tokens[rows], batch.mask[rows] = self.parts[part].read(ids[rows] - self._begins[part])
        return batch


def open_windows(
    corpus: str | Corpus,
    split: str,
    tokenizer: Tokenizer,
    context_length: int,
    directory: str | os.PathLike[str],
    workers: int | None = None,
) -> Windows:
    """The windows of one split of a corpus (its name, or that split already open), built if they are not there yet.

    `directory` is on a local or shared file system: windows are mapped and renamed, which object stores cannot do.
    workers: processes that build parts, None for one a core; corpus and tokenizer are pickled for them.
    Raises UserError for an unknown corpus or split, and for a split without text or shorter than a window.
    """
    if isinstance(corpus, str):
        corpus = open_corpus(corpus, split, directory)
    if not len(corpus):
        raise UserError(
            f"data.corpus = {corpus.name!r}: its {split} split has no documents; try another split or corpus"
        )
    count = min(max(1, -(-corpus.num_bytes // PART_BYTES)), _MOST_PARTS, len(corpus))
    inputs = {
        "format": FORMAT_VERSION,
        "corpus": corpus.name,
        "corpus_fingerprint": corpus.fingerprint,
        "split": split,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "packing": PACKING,
        "context_length": context_length,
    } | ({"parts": count} if count > 1 else {})
    fingerprint = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    whole = Path(directory) / "windows" / fingerprint
    places = [whole] if count == 1 else [whole / f"{i:05d}-of-{count:05d}" for i in range(count)]
    cuts = [i * len(corpus) // count for i in range(count + 1)]
    parts = [_Part(corpus, tokenizer, inputs, *at) for at in zip(cuts, cuts[1:], places, strict=False)]
    missing = [part for part in parts if not part.is_there()]
    if missing:
        # In any order: processes that build the same windows on one file system then share the work.
        random.Random().shuffle(missing)
        documents = sum(part.stop - part.start for part in missing)
        pool.run(_Part.build, missing, workers, f"tokenising {corpus.name} {split}, documents", documents)
    opened = [Windows(place) for place in places]
    return opened[0] if count == 1 else JoinedWindows(opened, fingerprint)


# --- building ---------------------------------------------------------------------------------------------------------


def pack(texts: Iterable[np.ndarray], context_length: int, end_of_text: int) -> Iterator[tuple[np.ndarray, int, int]]:
    """(tokens [2 .. S + 1], first document, last document) of each window of the stream that `texts` make.

    An end-of-text token counts to the document that it opens; the very last one, to the document before it.
    """
    held, owners, document = np.zeros(0, np.uint16), np.zeros(0, np.int32), -1
    for document, text in enumerate(texts):
        held = np.concatenate([held.astype(text.dtype), np.array([end_of_text], text.dtype), text])
        owners = np.concatenate([owners, np.full(1 + len(text), document, np.int32)])
        start = 0  # at least one token is held back, so the last end-of-text always has a window to close
        for start in range(context_length, len(held), context_length):
            yield held[start - context_length : start + 1], owners[start - context_length], owners[start]
        held, owners = held[start:], owners[start:]
    if document >= 0:
        yield np.append(held, held.dtype.type(end_of_text)), owners[0], owners[-1]


class _Part(NamedTuple):
    """The windows of documents start .. stop - 1 of a corpus, and where they belong."""

    corpus: Corpus
    tokenizer: Tokenizer
    inputs: dict[str, Any]
    start: int
    stop: int
    place: Path

    def is_there(self) -> bool:
        with contextlib.suppress(DamagedError):
            Windows(self.place)
            return True
        return False

    def build(self, advance: pool.Advance) -> None:
        if self.is_there():  # another process was faster
            advance(self.stop - self.start)
            return
        with _building(self.place) as temporary:
            _write(temporary, self, advance)


def _write(directory: Path, part: _Part, advance: pool.Advance) -> None:
    """Fills `directory`. Memory stays at a small multiple of the largest document."""
    corpus, tokenizer, inputs, start, stop, _ = part
    context_length, end_of_text = inputs["context_length"], tokenizer.end_of_text
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<i4")
    counts = dict.fromkeys(_COUNTS, 0) | {"tokens": 1}

    def texts() -> Iterator[np.ndarray]:
        for batch in batches((text for _, text in corpus.read(start, stop)), _BATCH):
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
    (directory / "windows.json").write_text(json.dumps(info, indent=1) + "\n")


def _write_header(file: BinaryIO, rows: int) -> None:
    """Begins an .npy file of int32 [rows, 2]. NumPy pads it, so it can be rewritten when the rows have been counted."""
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, {"descr": "<i4", "fortran_order": False, "shape": (rows, 2)})


@contextlib.contextmanager
def _building(final: Path) -> Iterator[Path]:
    """A new directory to fill, which then becomes `final` at one stroke. Several processes may build the same one."""
    final.parent.mkdir(parents=True, exist_ok=True)
    for leftover in final.parent.glob("*.building"):
        _remove_if_dead(leftover)
    temporary = final.parent / f"{final.name}.{uuid.uuid4().hex}.building"
    temporary.mkdir()
    try:
        with open(temporary / "lock", "wb") as lock:
            with contextlib.suppress(OSError):  # a file system without locks: leftovers stay, nothing else changes
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield temporary
        (temporary / "lock").unlink()
        try:
            temporary.rename(final)
        except OSError:  # there is one already
            try:
                Windows(final)  # another process was first, with the same windows
            except DamagedError:
                shutil.rmtree(final, ignore_errors=True)
                temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_if_dead(leftover: Path) -> None:
    """Removes a build whose process is gone: the system has dropped its lock."""
    with contextlib.suppress(OSError), open(leftover / "lock", "rb+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(leftover, ignore_errors=True)
