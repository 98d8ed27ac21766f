"""Find the user's files, split them into parts that can be read independently, and read their documents.

A part is a byte range of text or JSON lines, a row group of Parquet, or a whole file, as compressed ones are. Texts are
valid UTF-8: invalid bytes become U+FFFD, and are counted.
"""

from __future__ import annotations

import dataclasses
import errno
import glob
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mot_jax.data import formats
from mot_jax.data.content import Content, detect, family_of, is_damage, open_content
from mot_jax.data.formats import DocumentUnit, ReadReport
from mot_jax.errors import UserError

_NUL = 0.1  # documents with a larger share of NULs are no text: the end of a file after a power loss, for example


class SourceFile(NamedTuple):
    """A file of the user.

    Attributes:
        name: Prefix of the names of its documents.
        size: In bytes; modified: time of modification, in ns.
    """

    path: str
    name: str
    content: Content
    size: int = 0
    modified: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class FilePart:
    """The part of a file that one worker reads.

    Attributes:
        name: Of the file; prefix of the names of its documents.
        start, stop: In bytes, or row groups of a Parquet file.
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
    content: Content = Content()


# --- finding files ----------------------------------------------------------------------------------------------------


def find_files(arguments: Sequence[str]) -> list[SourceFile]:
    """Expand files, glob patterns and directories, and examine the files.

    Directories are searched recursively, through links as well; hidden files are ignored. Of a directory, files with
    the suffix of another type are excluded; the type of a file that is an argument is detected whatever its suffix.

    Returns:
        The files in order, those from which nothing can be read included: `content.excluded` has the reason.

    Raises:
        UserError: An argument matches no file, or is not a file of documents; or a file cannot be read.
    """
    files: dict[str, SourceFile] = {}
    for argument in arguments:
        expanded = os.path.expanduser(argument)
        paths = [expanded] if os.path.lexists(expanded) else sorted(glob.glob(expanded, recursive=True))
        if not paths:
            raise UserError(f"FILE = {argument!r}: no such file, and as a pattern it matches no file")
        for path in map(os.path.abspath, paths):
            if os.path.isdir(path):
                for inside in _walk(path):
                    files.setdefault(inside, _examine(inside, os.path.relpath(inside, path), by_suffix=True))
            else:
                files.setdefault(path, file := _examine(path, os.path.basename(path), by_suffix=False))
                reason = file.content.excluded
                if reason and os.path.lexists(expanded) and (family_of(path) is None or reason[0] == "special_files"):
                    rule = "must be a file of text, JSON, CSV or Parquet"
                    raise UserError(f"FILE = {path!r}: {reason[1]}; {rule}")
    if not files:
        raise UserError(f"FILE = {', '.join(map(repr, arguments))}: no files in it; hidden files are ignored")
    return list(files.values())


def _walk(directory: str) -> Iterator[str]:
    """The files below a directory, which is entered once, however many links lead to it."""
    visited = set()

    def fail(error: OSError) -> None:
        raise _cannot_be_read(error.filename, error)

    for root, directories, files in os.walk(directory, onerror=fail, followlinks=True):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in visited:
            directories.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        directories[:] = sorted(d for d in directories if not d.startswith("."))
        for file in sorted(files):
            if not file.startswith("."):
                yield os.path.join(root, file)


def _examine(path: str, name: str, by_suffix: bool) -> SourceFile:
    """Detect the content of a file, or exclude it if `by_suffix` it is of another type. Raises UserError."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            content = Content(excluded=("special_files", "a pipe, socket or device"))
        elif by_suffix and family_of(path) is None:
            content = Content(excluded=("other_files", "another type by its suffix; try it as an argument of its own"))
        else:
            content = detect(path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP):
            raise _cannot_be_read(path, error) from None
        content, status = Content(excluded=("special_files", "a broken link")), os.lstat(path)
    return SourceFile(path, name, content, 0 if content.excluded else status.st_size, status.st_mtime_ns)


def _cannot_be_read(path: str, error: OSError) -> UserError:
    advice = "try chmod +r" if isinstance(error, PermissionError) else "try other files"
    return UserError(f"FILE = {path!r}: cannot be read ({error.strerror}); {advice}")


# --- parts ------------------------------------------------------------------------------------------------------------


def split_file(file: SourceFile, documents: DocumentUnit, size: int) -> Iterator[FilePart]:
    """Split a file into parts of about `size` bytes, where its content allows it."""
    content = file.content
    by_line = content.format == "json_lines" or (content.format == "text" and documents != "file")
    bounds: list[tuple[int, int, int]]  # start, stop, bytes
    if content.excluded:
        bounds = []
    elif content.format == "parquet":
        bounds = [(group, group + 1, nbytes) for group, nbytes in enumerate(formats.row_group_sizes(file.path))]
    elif content.is_plain and by_line:
        stops = [min(start + size, file.size) for start in range(0, file.size, size)]
        bounds = [(start, stop, stop - start) for start, stop in zip([0, *stops], stops, strict=False)]
    else:
        bounds = [(0, sys.maxsize, file.size * (4 if content.compressions else 1))]
    for start, stop, nbytes in bounds or [(0, sys.maxsize, 0)]:  # a file without content is reported, too
        yield FilePart(file.path, file.name, start, stop, nbytes, file.modified, content=content)


def read_part(part: FilePart, documents: DocumentUnit, feature: str, report: ReadReport) -> Iterator[tuple[str, bytes]]:
    """Yield (name, text as UTF-8) of each document of a part. The name is that of the file, with the document's offset.

    Args:
        report: Is updated with counts and reasons.

    Raises:
        UserError: The file cannot be read any more, or has changed since it was examined.
    """
    if part.content.excluded:
        reason, report.reason = part.content.excluded
        report.skipped[reason] += 1
        return
    whole_file = part.content.format == "text" and documents == "file"
    try:
        # Network file systems may round the time of a file just written.
        if part.modified and abs(os.stat(part.path).st_mtime_ns - part.modified) > 10**9:
            raise UserError(f"FILE = {part.path!r}: has changed since the build began; try the same command again")
        for offset, value in _texts(part, documents, feature, report):
            text, repaired = _encode(value if isinstance(value, str) else value.decode("utf-8", "surrogateescape"))
            if len(text) > formats.MAX_DOCUMENT_BYTES:
                report.skipped["too_long"] += 1
            elif not text or text.isspace():
                report.skipped["empty"] += 1
            elif text.count(0) > _NUL * len(text):
                report.skipped["not_text"] += 1
            else:
                report.documents += 1
                report.skipped["damaged_utf8"] += repaired
                yield part.name if whole_file else f"{part.name}@{offset}", text
    except Exception as error:
        if is_damage(error):
            report.skipped["damaged_files"] += 1
            report.reason = f"damaged: {error}"
        elif isinstance(error, OSError):
            raise _cannot_be_read(part.path, error) from error
        else:
            raise


def _texts(
    part: FilePart, documents: DocumentUnit, feature: str, report: ReadReport
) -> Iterator[tuple[int, str | bytes]]:
    """Yield (offset, text) of the documents of a part. Offsets count bytes of decompressed text, values or rows."""
    if part.content.format == "parquet":
        yield from formats.parquet_documents(part.path, part.start, part.stop, feature, report)
        return
    with open_content(part.path, part.content) as stream:
        if part.content.format == "json_lines":
            records = formats.json_lines(stream, part.start, part.stop, report)
            yield from formats.json_documents(records, feature, report)
        elif part.content.format == "json":
            yield from formats.json_documents(formats.json_values(stream, report), feature, report)
        elif part.content.format == "table":
            delimiters = "\t,;|" if ".tsv" in part.path.lower() else ",;\t|"
            yield from formats.table_documents(stream, feature, report, delimiters)
        else:
            yield from formats.text_documents(stream, documents, part.start, part.stop, report)


def _encode(text: str) -> tuple[bytes, bool]:
    """UTF-8, and whether U+FFFD had to replace an invalid byte or half of a surrogate pair."""
    try:
        return text.encode(), False
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode(), True
