"""The content of a user's file: compression, encoding and format, as its first bytes show them.

`detect` examines a file, and `open_content` opens it as a stream of UTF-8. The suffix of a file matters only where its
bytes leave a choice: JSON or a table in a .txt file is text, and a .csv file is a table.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import dataclasses
import functools
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, Literal

Format = Literal["text", "json_lines", "json", "table", "parquet"]


def _integer(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:  # Python's int refuses numbers of more than 4300 digits, which are valid JSON
        return float(digits)


JSON = json.JSONDecoder(parse_int=_integer)

_SAMPLE = 1 << 16  # bytes of a file that are examined
_MAX_LAYERS = 3  # of compression: some servers compress compressed files again
_UNDECODABLE = 0.1  # a larger share of invalid bytes: another encoding, or no text; Latin-1 text has about 0.04
_CONTROL = 0.02  # a larger share of control characters: no text; UTF-16 without a mark has 0.5

_MAGIC = {
    "gzip": rb"\x1f\x8b\x08",
    "bz2": rb"BZh[1-9](1AY&SY|\x17rE8P\x90)",
    "xz": rb"\xfd7zXZ\0",
    "zstd": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",  # a frame, or a skippable one
    "lz4": rb"\x04\x22\x4d\x18",
}
_MARKS = {  # UTF-32 first: its mark in little-endian order begins with that of UTF-16
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-8": codecs.BOM_UTF8,
}
_OTHER_FORMATS = {  # with enough of each to exclude text that begins with the same characters
    rb"(?s)PK\x03\x04.\0": "a zip archive; try the files in it (unzip)",
    rb"7z\xbc\xaf": "a 7z archive; try the files in it",
    rb"(?s).{257}ustar(\0|  \0)": "a tar archive; try the files in it (tar -xf)",
    rb"\x1f\x9d": "compressed by compress; try uncompress",
    rb"(?s)%PDF-\d\.\d\s.{,2000}?\d \d+ obj\b": "a PDF document; try pdftotext",
    rb"ARROW1\0\0": "an Arrow file; try Parquet",
    rb"(?s)Obj\x01.{,99}avro\.": "an Avro file; try Parquet",
    rb"SQLite format 3\0": "an SQLite database; try an export as CSV",
}
_CONTROL_CHARACTERS = "".join(map(chr, {*range(32), 127} - set(b"\t\n\v\f\r\x1b")))
_GIT_LFS = rb"version https://git-lfs\.github\.com/spec/\S+\s+(ext-.*\n)*oid \w+:"

_COMPRESSED = frozenset([".gz", ".gzip", ".bz2", ".xz", ".zst", ".zstd", ".lz4"])
_SUFFIXES = {
    "parquet": frozenset([".parquet", ".pq"]),
    "json": frozenset([".jsonl", ".ndjson", ".json"]),
    "table": frozenset([".csv", ".tsv"]),
    "text": frozenset(
        ".c .cc .cpp .css .cu .go .h .hpp .htm .html .java .js .kt .log .lua .md .org .php .py .pyi .r .rb .rs .rst "
        ".scala .sh .sql .swift .tex .text .toml .ts .txt .xml .yaml .yml".split()
    ),
}


_DAMAGED = "mot_jax.damaged"  # a handler of decoding errors: an invalid byte becomes a character that UTF-8 lacks
_DAMAGED_CHARACTER = "\udcff"
codecs.register_error(_DAMAGED, lambda error: (_DAMAGED_CHARACTER, error.end))  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True, slots=True)
class Content:
    """Format, compression and encoding of a file. The default is uncompressed text in UTF-8.

    Attributes:
        compressions: Codecs, the outermost first.
        mark: Whether the text begins with a byte order mark.
        excluded: Why nothing is read from the file: a key of `mot_jax.data.files.REASONS`, and words for the user.
    """

    format: Format = "text"
    compressions: tuple[str, ...] = ()
    encoding: str = "utf-8"
    mark: bool = False
    excluded: tuple[str, str] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether bytes of the file are bytes of its text, so that reading can begin anywhere."""
        return not self.compressions and self.encoding == "utf-8" and not self.mark


def family_of(path: str) -> str | None:
    """`parquet`, `json`, `table` or `text`, by the suffix before those of compression; None for any other suffix."""
    stem, suffix = os.path.splitext(path.lower())
    while suffix in _COMPRESSED:
        stem, suffix = os.path.splitext(stem)
    return next((family for family, suffixes in _SUFFIXES.items() if suffix in suffixes), None)


def detect(path: str) -> Content:
    """Examine the first bytes of a file.

    Raises:
        OSError: The file cannot be opened or read.
    """
    family, head = family_of(path), b""
    compressions: tuple[str, ...] = ()
    for _ in range(_MAX_LAYERS + 1):
        with open_content(path, Content(compressions=compressions)) as stream:
            head = _read_head(stream)
        codec = next((codec for codec, magic in _MAGIC.items() if re.match(magic, head)), None)
        if codec is None:
            break
        compressions = (*compressions, codec)
    encoding, mark = next(((name, mark) for name, mark in _MARKS.items() if head.startswith(mark)), ("utf-8", b""))
    text = codecs.getincrementaldecoder(encoding)(_DAMAGED).decode(head[len(mark) :])
    problem = _not_text(text, encoding if mark else None)
    content = Content("text", compressions, encoding, bool(mark))

    def exclude(reason: str, words: str) -> Content:
        return dataclasses.replace(content, excluded=(reason, words))

    if re.match(_GIT_LFS, head):
        return exclude("git_lfs", "a Git LFS pointer, not the file itself; try git lfs pull")
    if head.startswith(b"PAR1") and (family == "parquet" or problem):
        if compressions:
            return exclude("other_files", f"Parquet compressed by {compressions[0]}; try it decompressed")
        return dataclasses.replace(content, format="parquet")
    for magic, words in _OTHER_FORMATS.items():
        if re.match(magic, head):
            return exclude("other_files", words)
    if problem:
        return exclude("not_text", problem)
    if family == "parquet" and head:
        return exclude("damaged_files", "no Parquet file: its first bytes are not PAR1")
    if family == "json" or (family is None and re.match(r'\s*(\[\s*)?\{\s*"', text)):
        return dataclasses.replace(content, format=_json_format(text))
    return dataclasses.replace(content, format="table" if family == "table" else "text")


def _read_head(stream: BinaryIO) -> bytes:
    """The first `_SAMPLE` bytes of a stream, or those before a damage, which is reported when the file is read."""
    head = b""
    try:
        while len(head) < _SAMPLE and (chunk := stream.read1(_SAMPLE - len(head))):  # type: ignore[attr-defined]
            head += chunk
    except Exception as error:
        if not is_damage(error):
            raise
    return head


def _not_text(text: str, encoding: str | None) -> str:
    """The reason why a decoded sample is not text; empty if it is."""
    if sum(map(text.count, _CONTROL_CHARACTERS)) > _CONTROL * len(text):
        return "not text (NUL or control characters), or UTF-16 without a mark; try iconv -f UTF-16LE -t UTF-8"
    if text.count(_DAMAGED_CHARACTER) > _UNDECODABLE * len(text):
        if encoding:
            return f"not text in {encoding.upper()}, although it begins with the mark of this encoding"
        return "not UTF-8, and without a mark of another encoding; try iconv -t UTF-8"
    return ""


def _json_format(text: str) -> Format:
    """`json_lines` if each line is a value of its own, `json` for an array or indented values; from a sample.

    Each line is a value if the first of several lines is an array of anything but objects, such as ["id", "text"].
    """
    lines = [line for line in text.split("\n") if line.strip()]
    first = lines[0].strip() if lines else ""
    if first.startswith("["):
        array = _parse(first) if len(lines) > 1 else None
        is_value = isinstance(array, list) and not all(isinstance(element, dict) for element in array)
        return "json_lines" if is_value else "json"
    # A line of an indented document can be an object, but not at the start of the line.
    objects = (line for line in lines if line.startswith("{") or line is lines[0])
    if not first.startswith("{") or any(isinstance(_parse(line), dict) for line in objects):
        return "json_lines"
    return "json" if len(lines) > 1 and first.endswith(("{", "[", ",")) else "json_lines"


def _parse(line: str) -> Any:
    try:
        return JSON.decode(line)
    except (ValueError, RecursionError):
        return None


# --- streams ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_content(path: str, content: Content) -> Iterator[BinaryIO]:
    """Open a file as a stream of its text: decompressed, without a mark, in UTF-8.

    Characters that are invalid in another encoding become bytes that are invalid in UTF-8.
    """
    with contextlib.ExitStack() as stack:
        stream: Any = stack.enter_context(open(path, "rb", 1 << 20))  # large buffers, because lines can be long
        for codec in content.compressions:
            stream = stack.enter_context(_decompressed(stream, codec))
        if content.mark:
            stream.read(len(_MARKS[content.encoding]))
        if content.encoding != "utf-8":
            stream = stack.enter_context(io.BufferedReader(_Recoded(stream, content.encoding), 1 << 16))
        yield stream


def is_damage(error: Exception) -> bool:
    """Whether an exception comes from damaged content, and not from the system."""
    if isinstance(error, OSError):
        return error.errno is None  # of gzip, bz2 and pyarrow
    return isinstance(error, (EOFError, zlib.error, lzma.LZMAError))


def _decompressed(stream: BinaryIO, codec: str) -> BinaryIO:
    if codec in ("zstd", "lz4"):
        import pyarrow as pa

        # Before damage, the last buffer is lost: hence a small one.
        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(stream, "r"), codec), 1 << 13)
    return io.BufferedReader(_Chunks(gzip.open(stream)) if codec == "gzip" else _Streams(stream, codec), 1 << 16)


class _Chunks(io.RawIOBase):
    """A stream that returns the data before damage: `read` of the decompressing streams raises instead."""

    def __init__(self, stream: Any):
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        chunk = self._stream.read1(len(buffer))
        buffer[: len(chunk)] = chunk
        return len(chunk)

    def close(self) -> None:
        self._stream.close()
        super().close()


class _Streams(io.RawIOBase):
    """The content of concatenated bz2 or xz streams, with zeros between them.

    Other bytes after a stream are damage. The readers of Python's library take them for the end of the file.
    """

    def __init__(self, stream: BinaryIO, codec: str):
        self._stream = stream
        self._new: Any = (
            bz2.BZ2Decompressor if codec == "bz2" else functools.partial(lzma.LZMADecompressor, lzma.FORMAT_XZ)
        )
        self._decompressor = self._new()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            compressed = b""
            if self._decompressor.eof:
                rest = self._decompressor.unused_data
                while not (compressed := rest.lstrip(b"\0")):
                    if not (rest := self._stream.read(1 << 16)):
                        return 0
                self._decompressor = self._new()
            elif self._decompressor.needs_input and not (compressed := self._stream.read(1 << 16)):
                raise EOFError("the compressed data end in the middle of a stream")
            if chunk := self._decompressor.decompress(compressed, len(buffer)):
                buffer[: len(chunk)] = chunk
                return len(chunk)


class _Recoded(io.RawIOBase):
    """A stream of text in some encoding as a stream of UTF-8."""

    def __init__(self, stream: BinaryIO, encoding: str):
        self._stream, self._decoder = stream, codecs.getincrementaldecoder(encoding)(_DAMAGED)
        self._pending, self._ended = b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending and not self._ended:
            chunk = self._stream.read1(1 << 16)  # type: ignore[attr-defined]
            self._ended = not chunk
            self._pending = self._decoder.decode(chunk, final=self._ended).encode("utf-8", "surrogateescape")
        size = min(len(buffer), len(self._pending))
        buffer[:size], self._pending = self._pending[:size], self._pending[size:]
        return size
