"""Documents in text, JSON, tables (CSV and TSV) and Parquet: each reader yields (offset, text), and counts the rest.

Memory is bounded by the longest document (at most `MAX_DOCUMENT_BYTES`), by 64 rows for Parquet.
"""

from __future__ import annotations

import codecs
import csv
import dataclasses
import difflib
import itertools
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any, Literal

from mot_jax.data.content import JSON

MAX_DOCUMENT_BYTES = 1 << 26  # longer lines and documents are skipped
DocumentUnit = Literal["file", "line", "paragraph"]
REASONS = {  # for skipped files and documents, with the words of the report
    "other_files": "files of other types skipped",
    "special_files": "pipes, sockets, devices and broken links skipped",
    "git_lfs": "Git LFS pointers skipped; try git lfs pull",
    "not_text": "files or documents skipped that are not text, or text in an unknown encoding",
    "damaged_files": "damaged files, read up to the damage",
    "too_long": "documents or lines of more than 64 MiB skipped",
    "not_json": "lines skipped that are not valid JSON",
    "bad_rows": "lines of tables skipped, in rows that are not valid CSV or have more fields than the header",
    "no_feature": "lines or rows skipped that have no text in the field --text-feature",
    "empty": "empty documents skipped",
    "damaged_utf8": "documents with invalid UTF-8, replaced by U+FFFD",
}
_LOSSES = ("damaged_files", "bad_rows")  # an unknown amount of text: such files are named
_SHOWN_FIELDS = 20
_TEXT_TYPES = "string large_string string_view binary large_binary binary_view fixed_size_binary".split()
_SEPARATORS = re.compile(r"[\s,]*")  # between JSON values
_REST_OF_NUMBER = re.compile(r"[-+.eE\d]*")
_JSON_TYPES = {str: "string", bool: "boolean", int: "number", float: "number", list: "array", dict: "object"}


@dataclasses.dataclass
class ReadReport:
    """The result of reading a file, or a part of it.

    Attributes:
        documents: How many were read.
        skipped: Counts, by the keys of `REASONS`.
        reason: Why there are none, or not all, if the counts do not explain it.
    """

    documents: int = 0
    skipped: Counter[str] = dataclasses.field(default_factory=Counter)
    reason: str = ""

    def __add__(self, other: ReadReport) -> ReadReport:
        skipped = self.skipped + other.skipped
        return ReadReport(self.documents + other.documents, skipped, self.reason or other.reason)

    @property
    def incomplete(self) -> bool:
        """Whether there are no documents, or damage has hidden an unknown number of them."""
        return not self.documents or any(self.skipped[key] for key in _LOSSES)

    def why_incomplete(self) -> str:
        """The reason why there are no documents, or not all, in words."""
        counts = [f"{count:,} {REASONS[key]}" for key, count in self.skipped.items()]
        return self.reason or ("empty" if set(self.skipped) <= {"empty"} else "; ".join(counts))


# --- text -------------------------------------------------------------------------------------------------------------


def text_documents(
    stream: IO[bytes], unit: DocumentUnit, start: int, stop: int, report: ReadReport
) -> Iterator[tuple[int, bytes]]:
    """The documents of plain text that begin in bytes start .. stop - 1."""
    if unit == "line":
        for offset, line in lines_between(stream, start, stop):
            if line:
                yield offset, line.rstrip(b"\r\n")
            else:
                report.skipped["too_long"] += 1
    elif unit == "paragraph":
        yield from _paragraphs(stream, start, stop, report)
    else:
        yield 0, stream.read(MAX_DOCUMENT_BYTES + 1)


def lines_between(stream: IO[bytes], start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, line) of every line that starts in start .. stop - 1; b"" replaces a line that is too long."""
    offset = start
    if start:  # skip the line that started before
        stream.seek(start - 1)
        offset = start - 1 + _skip_line(stream, stop - start + 1)
    while offset < stop and (line := stream.readline(MAX_DOCUMENT_BYTES + 1)):
        if len(line) <= MAX_DOCUMENT_BYTES or line.endswith(b"\n"):
            yield offset, line
            offset += len(line)
        else:
            yield offset, b""
            offset += len(line) + _skip_line(stream, stop - offset - len(line))


def _skip_line(stream: IO[bytes], limit: int) -> int:
    """Read to the end of a line, or just past `limit` bytes. Returns the number of bytes read."""
    length = 0
    while length <= limit and (chunk := stream.readline(1 << 20)):
        length += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return length


def _paragraphs(stream: IO[bytes], start: int, stop: int, report: ReadReport) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, text) of the paragraphs, which blank lines separate.

    A paragraph belongs to the part in which the blank line before it starts.
    """
    lines: list[bytes] = []
    first, size, in_part = 0, 0, start == 0
    for offset, line in lines_between(stream, start, sys.maxsize):
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
                report.skipped["too_long"] += 1
            if size > MAX_DOCUMENT_BYTES:
                lines.clear()
    if lines:
        yield first, b"".join(lines).rstrip(b"\r\n")


# --- JSON -------------------------------------------------------------------------------------------------------------


def json_documents(records: Iterable[tuple[int, Any]], feature: str, report: ReadReport) -> Iterator[tuple[int, str]]:
    """The texts of JSON values: objects with text in the field `feature`; strings, if it has the default name."""
    fields: dict[str, str] = {}
    other_types: set[str] = set()
    for offset, record in records:
        value = record.get(feature) if isinstance(record, dict) else record if feature == "text" else None
        if isinstance(value, str):
            yield offset, value
            continue
        report.skipped["no_feature"] += 1
        if not isinstance(record, dict):
            other_types.add(_JSON_TYPES.get(type(record), "null"))
        elif not report.documents and len(fields) < 1000:
            types = {name: _JSON_TYPES.get(type(item), "null") for name, item in record.items()}
            fields |= {name: kind for name, kind in types.items() if fields.get(name, "null") == "null"}
    if fields:
        report.reason = report.reason or _no_text("field", feature, fields, "string")
    elif other_types:
        report.reason = report.reason or f"values of the type {' or '.join(sorted(other_types))}, not objects"


def json_lines(stream: IO[bytes], start: int, stop: int, report: ReadReport) -> Iterator[tuple[int, Any]]:
    """Yield (offset, value) of the lines of JSON that start in start .. stop - 1."""
    for offset, line in lines_between(stream, start, stop):
        if line.isspace():
            continue
        if not line:
            report.skipped["too_long"] += 1
            continue
        try:
            yield offset, JSON.decode(line.decode("utf-8", "surrogateescape").lstrip("\ufeff"))
        except (ValueError, RecursionError):
            report.skipped["not_json"] += 1


def json_values(stream: IO[bytes], report: ReadReport) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) of JSON in any layout: the elements of an array, or values that follow each other.

    The text is parsed while it is read: an array of any length needs memory for its longest element.
    """
    scan, decode = JSON.raw_decode, codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
    text, at, number, in_array, ended = "", 0, 0, False, False
    while True:
        at = _SEPARATORS.match(text, at).end()  # type: ignore[union-attr]
        end, value = at, None
        if at < len(text):
            if text[at] == ("]" if in_array else "["):
                at, in_array = at + 1, not in_array
                continue
            try:
                value, end = scan(text, at)
            except (ValueError, RecursionError):
                end = at
        # Nothing yet, or perhaps the beginning of a longer value, as in 1e of 1e9.
        if end == at or _REST_OF_NUMBER.match(text, end).end() == len(text):  # type: ignore[union-attr]
            if not ended and len(text) - at <= MAX_DOCUMENT_BYTES:
                chunk = stream.read(max(len(text) - at, 1 << 16))
                text, at, ended = text[at:] + decode(chunk, final=not chunk), 0, not chunk
                continue
            if end == at:
                if at < len(text) or in_array:
                    report.skipped["damaged_files"] += 1
                    report.reason = f"no valid JSON after {number:,} values"
                return
        yield number, value
        at, number = end, number + 1


# --- tables -----------------------------------------------------------------------------------------------------------


def table_documents(
    stream: IO[bytes], feature: str, report: ReadReport, delimiters: str = ",;\t|"
) -> Iterator[tuple[int, str]]:
    """Yield (row, text) of the column `feature` of a table in CSV, whose first row has the names of the columns.

    Args:
        delimiters: Between fields: that with which the first row has this column, or the most columns.
    """
    csv.field_size_limit(MAX_DOCUMENT_BYTES)
    lines, line = _table_lines(stream, report), 1
    for first in lines:
        if not first.isspace():
            break
        line += 1
    else:
        return

    def fitness(delimiter: str) -> tuple[bool, int]:
        row, _ = next(_table_rows([first], delimiter, strict=False))
        names = [] if isinstance(row, str) else [name.strip() for name in row]
        return feature in names, len(names)

    delimiter = max(delimiters, key=fitness)
    rows = _table_rows(itertools.chain([first], lines), delimiter)
    header, header_lines = next(rows)
    if isinstance(header, str):
        report.skipped["bad_rows"] += len(header_lines)
        report.reason = "its first row, the header, is not valid CSV"
        return
    header = [name.strip() for name in header]
    if header.count(feature) != 1:
        if header:
            report.skipped["no_feature"] += 1
            report.reason = _no_text("column", feature, dict.fromkeys(header, ""), "")
        if feature in header:
            report.reason = f"{header.count(feature)} columns have the name {feature!r}"
        return
    if delimiter == "\t" and '"' not in first:
        rows = _rows_with_literal_quotes(rows, len(header))
    column, number = header.index(feature), -1
    line += len(header_lines)
    for number, (row, row_lines) in enumerate(rows):
        if isinstance(row, str) or len(row) > len(header):
            report.skipped["bad_rows"] += len(row_lines)
            place = f"line {line}" if len(row_lines) == 1 else f"lines {line} to {line + len(row_lines) - 1}"
            words = row if isinstance(row, str) else f"{len(row)} fields, the header has {len(header)}"
            report.reason = report.reason or f"bad rows, the first in {place} ({words})"
        elif column < len(row):
            yield number, row[column]
        elif row:
            report.skipped["no_feature"] += 1
        line += len(row_lines)
    if number < 0:
        report.reason = "a header without rows"


_Row = tuple[list[str] | str, list[str]]  # its fields, or why it is not valid, and its lines


def _table_rows(lines: Iterable[str], delimiter: str, strict: bool = True) -> Iterator[_Row]:
    """The rows of a table in CSV."""
    row_lines: list[str] = []

    def recorded() -> Iterator[str]:
        for line in lines:
            row_lines.append(line)
            yield line

    reader = csv.reader(recorded(), delimiter=delimiter, strict=strict)
    while True:
        try:
            row: list[str] | str = next(reader)
        except csv.Error as error:
            row = str(error)
        except StopIteration:
            return
        yield row, row_lines.copy()
        row_lines.clear()


def _rows_with_literal_quotes(rows: Iterable[_Row], width: int) -> Iterator[_Row]:
    """The rows of a table with tabs, in which quotes can be text: then each line of a row is a row of its own.

    Most programs that write tabs quote nothing, so that a text may begin with a quote and never close it. A row has
    such a text if it is not valid with quotes, or if each of its lines is a complete row without them.

    Args:
        width: Number of columns.
    """

    def fields_of(line: str) -> list[str]:
        text = line.rstrip("\r\n")
        return text.split("\t") if text else []

    def is_row(line: str) -> bool:
        return len(fields_of(line)) == width and not line.startswith("\t")  # lines of indented text begin with a tab

    for row, lines in rows:
        is_valid = not isinstance(row, str) and len(row) <= width
        if is_valid and (len(lines) == 1 or width == 1 or not all(map(is_row, lines))):
            yield row, lines
            continue
        for line in lines:
            fields = fields_of(line)
            is_complete = not fields or len(fields) == width
            yield fields if is_complete else f"{len(fields)} fields, the header has {width}", [line]


def _table_lines(stream: IO[bytes], report: ReadReport) -> Iterator[str]:
    """The lines of a table; "" replaces a line that is too long."""
    for _, line in lines_between(stream, 0, sys.maxsize):
        if not line:
            report.skipped["too_long"] += 1
        yield line.decode("utf-8", "surrogateescape")


# --- Parquet ----------------------------------------------------------------------------------------------------------


def row_group_sizes(path: str) -> list[int]:
    """Bytes of each row group of a Parquet file; [0] for a damaged file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
    except (OSError, pa.ArrowException, UnicodeDecodeError):
        return [0]  # the damage is counted when the file is read
    return [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]


def parquet_documents(
    path: str, start: int, stop: int, feature: str, report: ReadReport
) -> Iterator[tuple[int, bytes]]:
    """Yield (row, text) of the column `feature` of row groups start .. stop - 1.

    The column may have any type of strings, dictionary-encoded or not, or of bytes that are UTF-8.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True) as file:
            groups = range(start, min(stop, file.metadata.num_row_groups))
            row = sum(file.metadata.row_group(group).num_rows for group in range(start))
            rows = sum(file.metadata.row_group(group).num_rows for group in groups)
            if not rows:
                report.reason = "a table without rows"
                return
            report.reason = _why_no_text(file.schema_arrow, feature)
            if report.reason:
                report.skipped["no_feature"] += rows
                return
            of_bytes = "binary" in str(file.schema_arrow.field(feature).type)
            for batch in file.iter_batches(64, row_groups=groups, columns=[feature]):
                for value in batch.column(0).cast(pa.large_binary()).to_pylist():
                    if value is None:
                        report.skipped["no_feature"] += 1
                    elif of_bytes and not _is_utf8(value):
                        report.skipped["not_text"] += 1
                    else:
                        yield row, value
                    row += 1
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        report.skipped["damaged_files"] += 1
        report.reason = "damaged Parquet"


def _why_no_text(schema: Any, feature: str) -> str:
    """The reason why a Parquet file has no text in the column `feature`; empty if it has."""
    import pyarrow as pa

    def is_text(kind: Any) -> bool:
        kind = getattr(kind, "storage_type", kind)  # of an extension type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        return any(getattr(pa.types, f"is_{name}")(kind) for name in _TEXT_TYPES)

    if schema.names.count(feature) > 1:
        return f"{schema.names.count(feature)} columns have the name {feature!r}"
    if feature in schema.names and is_text(schema.field(feature).type):
        return ""
    types = {field.name: "text" if is_text(field.type) else str(field.type) for field in schema}
    return _no_text("column", feature, types, "text")


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


# --- errors -----------------------------------------------------------------------------------------------------------


def _no_text(noun: str, feature: str, types: Mapping[str, str], text: str) -> str:
    """Words for a file without the field or column `feature`.

    Args:
        types: Of all fields, by name.
        text: The type of those with text.
    """
    problem = f"its {noun} {feature!r} has the type {types[feature]}" if feature in types else f"no {noun} {feature!r}"
    listed = ", ".join(f"{n!r} ({t})" if t else repr(n) for n, t in list(types.items())[:_SHOWN_FIELDS])
    more = f" and {len(types) - _SHOWN_FIELDS} more" if len(types) > _SHOWN_FIELDS else ""
    texts = [name for name, kind in types.items() if kind == text and name != feature]
    close = difflib.get_close_matches(feature, texts, 1, 0) if texts else []
    advice = f"try --text-feature {close[0]}" if close else f"no other {noun} has text"
    return f"{problem}; it has {listed}{more}; {advice}"
