"""Read documents from the user's files: .jsonl, .parquet and text, plain or compressed with gzip.

Files are split into parts that can be read independently: byte ranges of text and JSON lines files, row groups of
parquet files, compressed files as a whole. Texts are returned as valid UTF-8: invalid bytes become U+FFFD, and are
counted. Memory is bounded by the longest document (at most `MAX_DOCUMENT_BYTES`); for parquet, by the text of one row
group.
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

MAX_DOCUMENT_BYTES = 1 << 26  # longer lines and documents are skipped
DocumentUnit = Literal["file", "line", "paragraph"]

_JSON = frozenset([".jsonl", ".ndjson", ".json"])
_TEXT = frozenset(
    ".c .cc .cpp .css .csv .cu .go .h .hpp .htm .html .java .js .kt .log .lua .md .org .php .py .pyi .r .rb .rs .rst "
    ".scala .sh .sql .swift .tex .text .toml .ts .tsv .txt .xml .yaml .yml".split()
)


@dataclasses.dataclass(frozen=True, slots=True)
class FilePart:
    """The part of a file that one worker reads.

    Attributes:
        name: Of the file; prefix of the names of its documents.
        start, stop: In bytes, or row groups of a parquet file.
        size: Approximate bytes of text.
        modified: Modification time of the file, in ns.
        split: Of its documents; None assigns each by its hash.
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
    """`text`, `json` (lines of JSON) or `parquet`, by the file's suffix before any `.gz`; None for other types."""
    suffix = os.path.splitext(path.removesuffix(".gz"))[1].lower()
    if suffix == ".parquet":
        return None if path.endswith(".gz") else "parquet"
    return "json" if suffix in _JSON else "text" if suffix in _TEXT else None


def find_files(arguments: Iterable[str]) -> tuple[dict[str, str], int]:
    """Expand files, glob patterns and directories.

    Directories are searched recursively; hidden files are ignored.

    Returns:
        {path: name} of the readable files, in order, and the number of files of other types that were skipped.

    Raises:
        UserError: An argument matches no file, or a file cannot be read.
    """
    names: dict[str, str] = {}
    other_files = 0
    for argument in arguments:
        expanded = os.path.expanduser(argument)
        paths = [expanded] if os.path.exists(expanded) else sorted(glob.glob(expanded, recursive=True))
        if not paths:
            raise UserError(f"FILE = {argument!r}: no such file, and as a pattern it matches no file")
        for path in map(os.path.abspath, paths):
            if os.path.isdir(path):
                inside = {file: os.path.relpath(file, path) for file in _walk(path)}
                readable = {file: name for file, name in inside.items() if kind_of(file)}
                other_files += len(inside) - len(readable)
                names |= readable
            elif kind_of(path):
                names[path] = os.path.basename(path)
            else:
                raise UserError(
                    f"FILE = {path!r}: unsupported file type; must be .parquet, or end, before any .gz, in "
                    f"one of {' '.join(sorted(_JSON | _TEXT))}; try renaming it to .txt or .jsonl"
                )
    unreadable = next((path for path in names if not os.access(path, os.R_OK)), None)
    if unreadable is not None:
        raise UserError(f"FILE = {unreadable!r}: permission to read is missing; try chmod +r")
    return names, other_files


def _walk(directory: str) -> Iterator[str]:
    for root, directories, files in os.walk(directory):
        directories[:] = sorted(d for d in directories if not d.startswith("."))
        for file in sorted(files):
            if not file.startswith("."):
                yield os.path.join(root, file)


def split_file(path: str, name: str, documents: DocumentUnit, size: int) -> Iterator[FilePart]:
    """Split a file into parts of about `size` bytes, where its type allows it."""
    stat = os.stat(path)
    kind, end = kind_of(path), stat.st_size
    compressed = path.endswith(".gz")
    if kind == "parquet":
        for group, nbytes in enumerate(_row_group_sizes(path)):
            yield FilePart(path, name, group, group + 1, nbytes, stat.st_mtime_ns)
    elif compressed or (kind == "text" and documents == "file"):
        yield FilePart(path, name, 0, sys.maxsize, end * (4 if compressed else 1), stat.st_mtime_ns)
    else:
        for start in range(0, end, size):
            stop = min(start + size, end)
            yield FilePart(path, name, start, stop, stop - start, stat.st_mtime_ns)


def _row_group_sizes(path: str) -> list[int]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
    except (OSError, pa.ArrowException):
        return [0]  # the damage is counted when the file is read
    return [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]


# --- reading ----------------------------------------------------------------------------------------------------------


def read_part(
    part: FilePart, documents: DocumentUnit, feature: str, skipped: Counter[str]
) -> Iterator[tuple[str, bytes]]:
    """Yield (name, text as UTF-8) of each document of a part. The name is that of the file, with the document's offset.

    Args:
        skipped: Is updated with the counts of `too_long`, `empty`, `damaged_utf8` (repaired, not skipped), `not_json`,
            `no_feature` (lines or rows without text in that field) and `damaged_files` (read up to the damage).
    """
    texts = (
        _parquet_texts(part, feature, skipped)
        if part.kind == "parquet"
        else _texts_in_bytes(part, documents, feature, skipped)
    )
    whole_file = part.kind == "text" and documents == "file"
    for offset, value in texts:
        text, repaired = _encode(value if isinstance(value, str) else value.decode("utf-8", "surrogateescape"))
        if len(text) > MAX_DOCUMENT_BYTES:
            skipped["too_long"] += 1
        elif not text or text.isspace():
            skipped["empty"] += 1
        else:
            skipped["damaged_utf8"] += repaired
            yield part.name if whole_file else f"{part.name}@{offset}", text


def _encode(text: str) -> tuple[bytes, bool]:
    """UTF-8, and whether U+FFFD had to replace an invalid byte or half of a surrogate pair."""
    try:
        return text.encode(), False
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode(), True


def _texts_in_bytes(
    part: FilePart, documents: DocumentUnit, feature: str, skipped: Counter[str]
) -> Iterator[tuple[int, Any]]:
    """Yield (offset, text) of the documents of a text or JSON lines file. Offsets count decompressed bytes."""
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
                yield 0, file.read(MAX_DOCUMENT_BYTES + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        skipped["damaged_files"] += 1


def _open(path: str) -> Any:
    """Open a file for reading bytes, with large buffers because lines can be long."""
    return io.BufferedReader(gzip.open(path), 1 << 16) if path.endswith(".gz") else open(path, "rb", 1 << 20)


def _lines(file: IO[bytes], start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, line) of every line that starts in start .. stop - 1; b"" replaces a line that is too long."""
    offset = start
    if start:  # skip the line that started before
        file.seek(start - 1)
        offset = start - 1 + _skip_line(file, stop - start + 1)
    while offset < stop and (line := file.readline(MAX_DOCUMENT_BYTES + 1)):
        if len(line) <= MAX_DOCUMENT_BYTES or line.endswith(b"\n"):
            yield offset, line
            offset += len(line)
        else:
            yield offset, b""
            offset += len(line) + _skip_line(file, stop - offset - len(line))


def _skip_line(file: IO[bytes], limit: int) -> int:
    """Read to the end of a line, or just past `limit` bytes. Returns the number of bytes read."""
    length = 0
    while length <= limit and (chunk := file.readline(1 << 20)):
        length += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return length


def _paragraphs(file: IO[bytes], start: int, stop: int, skipped: Counter[str]) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, text) of the paragraphs, which blank lines separate.

    A paragraph belongs to the part in which the blank line before it starts.
    """
    lines: list[bytes] = []
    first, size, in_part = 0, 0, start == 0
    for offset, line in _lines(file, start, sys.maxsize):
        if line.isspace():
            if lines:
                yield first, b"".join(lines).rstrip(b"\r\n")
            lines, size, in_part = [], 0, True
        if offset >= stop and (line.isspace() or not in_part):
            return
        if in_part and not line.isspace():
            first = first if size else offset
            size += len(line)
            lines.append(line)
            if not line or size > MAX_DOCUMENT_BYTES >= size - len(line):
                skipped["too_long"] += 1
            if size > MAX_DOCUMENT_BYTES:
                lines.clear()
    if lines:
        yield first, b"".join(lines).rstrip(b"\r\n")


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


def _parquet_texts(part: FilePart, feature: str, skipped: Counter[str]) -> Iterator[tuple[int, bytes]]:
    """Yield (row number, text) of the row groups of a part."""
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
