"""The user's own files as documents: which files there are, how they are cut into parts, and what a part holds.

A part can be read without the rest of its file: a stretch of bytes of a text or JSON lines file, row groups of a
parquet file, the whole of a compressed one. Text comes out as valid UTF-8: what is damaged becomes U+FFFD, and counts.
Memory stays at the size of the largest document, `LIMIT` at most; of a parquet file, at that of a row group's text.
"""

from __future__ import annotations

import dataclasses
import glob
import gzip
import io
import json
import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import IO, Any, Literal

from mot_jax.errors import UserError

LIMIT = 1 << 26  # bytes of the longest line or document that is kept
Documents = Literal["file", "line", "paragraph"]

_JSON = frozenset([".jsonl", ".ndjson", ".json"])
_TEXT = frozenset(
    ".c .cc .cpp .css .csv .cu .go .h .hpp .htm .html .java .js .kt .log .lua .md .org .php .py .pyi .r .rb .rs .rst "
    ".scala .sh .sql .swift .tex .text .toml .ts .tsv .txt .xml .yaml .yml".split()
)


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """What one worker reads of one file.

    name: of the file, for the names of its documents. start, stop: bytes, or row groups of a parquet file.
    size: bytes of text, about. modified: of the file, in ns. split: of its documents; None is by their hash.
    """

    path: str
    name: str
    start: int
    stop: int
    size: int
    modified: int = 0
    split: str | None = None

    @property
    def kind(self) -> str | None:
        return kind_of(self.path)


def kind_of(path: str) -> str | None:
    """`text`, `json` (lines of it) or `parquet`, by the file's suffix before any `.gz`; None is none of these."""
    suffix = os.path.splitext(path.removesuffix(".gz"))[1].lower()
    if suffix == ".parquet":
        return None if path.endswith(".gz") else "parquet"
    return "json" if suffix in _JSON else "text" if suffix in _TEXT else None


def find_files(arguments: Iterable[str]) -> tuple[dict[str, str], int]:
    """({path: name}, how many files of other kinds were left out) of files, patterns and directories, in order.

    Directories are searched to the bottom, without hidden files. Raises UserError where there is nothing to read.
    """
    found: dict[str, str] = {}
    others = 0
    for argument in arguments:
        expanded = os.path.expanduser(argument)
        paths = [expanded] if os.path.exists(expanded) else sorted(glob.glob(expanded, recursive=True))
        if not paths:
            raise UserError(f"FILE = {argument!r}: no such file, and no file fits it as a pattern")
        for path in map(os.path.abspath, paths):
            if os.path.isdir(path):
                inside = {file: os.path.relpath(file, path) for file in _walk(path)}
                known = {file: name for file, name in inside.items() if kind_of(file)}
                others += len(inside) - len(known)
                found |= known
            elif kind_of(path):
                found[path] = os.path.basename(path)
            else:
                raise UserError(
                    f"FILE = {path!r}: no kind of file that can be read; must be .parquet, or end, before any .gz, in "
                    f"one of {' '.join(sorted(_JSON | _TEXT))}; try renaming it to .txt or .jsonl"
                )
    unreadable = next((path for path in found if not os.access(path, os.R_OK)), None)
    if unreadable is not None:
        raise UserError(f"FILE = {unreadable!r}: may not be read; try chmod +r")
    return found, others


def _walk(directory: str) -> Iterator[str]:
    for root, directories, files in os.walk(directory):
        directories[:] = sorted(d for d in directories if not d.startswith("."))
        for file in sorted(files):
            if not file.startswith("."):
                yield os.path.join(root, file)


def cut(path: str, name: str, documents: Documents, size: int) -> Iterator[Part]:
    """The parts of a file, of about `size` bytes where it can be cut."""
    stat = os.stat(path)
    kind, end = kind_of(path), stat.st_size
    packed = path.endswith(".gz")
    if kind == "parquet":
        for group, nbytes in enumerate(_row_group_sizes(path)):
            yield Part(path, name, group, group + 1, nbytes, stat.st_mtime_ns)
    elif packed or (kind == "text" and documents == "file"):
        yield Part(path, name, 0, sys.maxsize, end * (4 if packed else 1), stat.st_mtime_ns)
    else:
        for start in range(0, end, size):
            stop = min(start + size, end)
            yield Part(path, name, start, stop, stop - start, stat.st_mtime_ns)


def _row_group_sizes(path: str) -> list[int]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
    except (OSError, pa.ArrowException):
        return [0]  # for the damage to be met, and counted, when it is read
    return [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]


# --- reading ----------------------------------------------------------------------------------------------------------


def read_part(part: Part, documents: Documents, feature: str, skipped: Counter[str]) -> Iterator[tuple[str, bytes]]:
    """(name, text as UTF-8) of each document of a part. A name is the file's, with where in it the document begins.

    skipped: counts what is left out or mended: `too_long`, `empty`, `damaged_utf8` (kept, mended), `not_json`,
        `no_feature` (a line or row without text of that name), `damaged_files` (read as far as they can be).
    """
    raw = _rows(part, feature, skipped) if part.kind == "parquet" else _from_bytes(part, documents, feature, skipped)
    whole = part.kind == "text" and documents == "file"
    for place, value in raw:
        text, mended = _encode(value if isinstance(value, str) else value.decode("utf-8", "surrogateescape"))
        if len(text) > LIMIT:
            skipped["too_long"] += 1
        elif not text or text.isspace():
            skipped["empty"] += 1
        else:
            skipped["damaged_utf8"] += mended
            yield part.name if whole else f"{part.name}@{place}", text


def _encode(text: str) -> tuple[bytes, bool]:
    """UTF-8, and whether U+FFFD had to stand for something: a byte that was no UTF-8, or half of a surrogate pair."""
    try:
        return text.encode(), False
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode(), True


def _from_bytes(part: Part, documents: Documents, feature: str, skipped: Counter[str]) -> Iterator[tuple[int, Any]]:
    """(offset, text) of the documents of a text or JSON lines file. Offsets count decompressed bytes."""
    try:
        with _open(part.path) as file:
            if part.kind == "json":
                yield from _json_values(_lines(file, part.start, part.stop), feature, skipped)
            elif documents == "line":
                for offset, line in _lines(file, part.start, part.stop):
                    if line:
                        yield offset, line.rstrip(b"\r\n")
                    else:
                        skipped["too_long"] += 1
            elif documents == "paragraph":
                yield from _paragraphs(file, part.start, part.stop, skipped)
            else:
                yield 0, file.read(LIMIT + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        skipped["damaged_files"] += 1


def _open(path: str) -> Any:
    """Of bytes, read ahead by large buffers: lines can be long."""
    return io.BufferedReader(gzip.open(path), 1 << 16) if path.endswith(".gz") else open(path, "rb", 1 << 20)


def _lines(file: IO[bytes], start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of every line that begins in start .. stop - 1; one that is too long comes as b""."""
    offset = start
    if start:  # to the end of the line that began before it
        file.seek(start - 1)
        offset = start - 1 + _skip_line(file, stop - start + 1)
    while offset < stop and (line := file.readline(LIMIT + 1)):
        if len(line) <= LIMIT or line.endswith(b"\n"):
            yield offset, line
            offset += len(line)
        else:
            yield offset, b""
            offset += len(line) + _skip_line(file, stop - offset - len(line))


def _skip_line(file: IO[bytes], limit: int) -> int:
    """Reads to the end of a line, or just past `limit` bytes; how far that was."""
    length = 0
    while length <= limit and (chunk := file.readline(1 << 20)):
        length += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return length


def _paragraphs(file: IO[bytes], start: int, stop: int, skipped: Counter[str]) -> Iterator[tuple[int, bytes]]:
    """(offset, text) of the paragraphs, between blank lines; each counts to where the blank line before it begins."""
    held: list[bytes] = []
    first, size, mine = 0, 0, start == 0
    for offset, line in _lines(file, start, sys.maxsize):
        if line.isspace():
            if held:
                yield first, b"".join(held).rstrip(b"\r\n")
            held, size, mine = [], 0, True
        if offset >= stop and (line.isspace() or not mine):
            return
        if mine and not line.isspace():
            first = first if size else offset
            size += len(line)
            held.append(line)
            if not line or size > LIMIT >= size - len(line):
                skipped["too_long"] += 1
            if size > LIMIT:
                held.clear()
    if held:
        yield first, b"".join(held).rstrip(b"\r\n")


def _json_values(lines: Iterator[tuple[int, bytes]], feature: str, skipped: Counter[str]) -> Iterator[tuple[int, str]]:
    for offset, line in lines:
        if line.isspace():
            continue
        if not line:
            skipped["too_long"] += 1
            continue
        try:
            record = json.loads(line.decode("utf-8", "surrogateescape").lstrip("\ufeff"))
        except (ValueError, RecursionError):
            skipped["not_json"] += 1
            continue
        value = record.get(feature) if isinstance(record, dict) else None
        if isinstance(value, str):
            yield offset, value
        else:
            skipped["no_feature"] += 1


def _rows(part: Part, feature: str, skipped: Counter[str]) -> Iterator[tuple[int, bytes]]:
    """(row, text) of the row groups of a part."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(part.path, buffer_size=1 << 20, pre_buffer=False) as file:
            row = sum(file.metadata.row_group(group).num_rows for group in range(part.start))
            if feature not in file.schema_arrow.names:
                skipped["no_feature"] += sum(file.metadata.row_group(g).num_rows for g in range(part.start, part.stop))
                return
            for batch in file.iter_batches(64, row_groups=range(part.start, part.stop), columns=[feature]):
                column = batch.column(0)
                if pa.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
                if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
                    column = pa.nulls(len(column), pa.string())
                for value in column.cast(pa.large_binary()).to_pylist():
                    if value is None:
                        skipped["no_feature"] += 1
                    else:
                        yield row, value
                    row += 1
    except (OSError, pa.ArrowException):
        skipped["damaged_files"] += 1
