"""Files of prompts: one per line of text, or JSON with a text and optionally an id; plain or compressed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from mot_jax.data.content import JSON, Content, detect, family_of, is_damage, open_content
from mot_jax.data.formats import ReadReport, json_values, lines_between
from mot_jax.errors import RetryableError, UserError, error_words
from mot_jax.runtime.paths import is_passing, is_remote, store_errors, user_path

_FIELDS = ("prompt", "text")  # of JSON objects: the first one that an object has
_SAMPLE = 1 << 16  # bytes at the beginning of a file from which the share of readable lines is estimated
_FIRST_LINES = 8  # text is read as JSON lines if most of the first ones are objects with a prompt
_CHUNK = 1 << 20  # bytes that are copied from an object store at a time
EXAMPLE = 'try lines of JSON such as {"prompt": "def "}'


class PromptLine(NamedTuple):
    """A line of a file of prompts.

    Attributes:
        number: of the line, from 1; in an array of JSON, of the element.
        prompt: the text to continue; empty if there is a fault.
        id: the value of the field `id`; None without one.
        fault: the reason why the line has no prompt; empty if it has one.
        is_end: whether the fault hides all lines after it.
    """

    number: int
    prompt: str = ""
    id: Any = None
    fault: str = ""
    is_end: bool = False


@dataclasses.dataclass(frozen=True)
class PromptFile:
    """A file whose prompts can be read repeatedly, in the memory of one line at a time.

    Attributes:
        name: the path as the user gave it.
        path: on a local file system.
        content: format, compression and encoding.
        flag: the option that has the name.
        count: the number of prompts, lines with faults included.
        lines: the number of the last one; blank lines of JSON have a number and no prompt.
        digest: of all prompts and ids.
        damage: the number and the fault of a last line that hides those after it; empty without one.
    """

    name: str
    path: str
    content: Content
    flag: str = "--prompts"
    count: int = 0
    lines: int = 0
    digest: str = ""
    damage: str = ""

    def __iter__(self) -> Iterator[PromptLine]:
        """Yield the lines that `open_prompts` has counted, without those that were added since."""
        with _read_errors(self.flag, self.name):
            for line in islice(self._read(), self.count):
                if line.number > self.lines:
                    return
                yield line

    def has_changed(self) -> bool:
        """Whether the file no longer has the lines that `open_prompts` has counted."""
        try:
            return self._counted() != self
        except OSError:
            return True

    def _counted(self) -> PromptFile:
        """Read the file, and fill in the attributes about its lines."""
        line, digest, count = PromptLine(0), hashlib.sha256(), 0
        for line in self._read():
            digest.update(f"{line!r}\n".encode(errors="surrogatepass"))
            count += 1
        damage = f"line {line.number} {line.fault}" if line.is_end else ""
        return dataclasses.replace(self, count=count, lines=line.number, digest=digest.hexdigest()[:16], damage=damage)

    def _read(self) -> Iterator[PromptLine]:
        number = 0
        try:
            with open_content(self.path, self.content) as stream:
                if self.content.format == "json":
                    report = ReadReport()
                    for index, value in json_values(stream, report):
                        number = index + 1
                        yield _from_json(number, value)
                    if report.reason:
                        fault = f"is not valid JSON, and nothing after it can be read ({report.reason})"
                        yield PromptLine(number + 1, fault=fault, is_end=True)
                    return
                is_json = self.content.format == "json_lines"
                for number, (_, line) in enumerate(lines_between(stream, 0, sys.maxsize), 1):
                    if not (is_json and line.isspace()):
                        yield _from_line(number, line, is_json)
        except Exception as error:
            if not is_damage(error):
                raise
            fault = f"cannot be read: the file is damaged from here on ({error_words(error)})"
            yield PromptLine(number + 1, fault=fault, is_end=True)


@contextlib.contextmanager
def open_prompts(name: str, flag: str = "--prompts") -> Iterator[PromptFile]:
    """Open a file of prompts, local or on an object store, and read it once to count them.

    Raises:
        UserError: the file cannot be read, is of another format, or has no prompts.
        RetryableError: the disk or store does not respond.
    """
    with contextlib.ExitStack() as stack:
        with _read_errors(flag, name):
            path = user_path(flag, name)
            is_pipe = not is_remote(path) and path.exists() and not (path.is_dir() or Path(path).is_file())
            if is_remote(path) or is_pipe:  # files are read more than once
                local = os.path.join(stack.enter_context(tempfile.TemporaryDirectory()), path.name)
                _copy(flag, name, path, local)
            elif path.is_dir():
                raise UserError(f"{flag} = {name}: must be a file, not a directory; try {flag.strip('-')}.txt")
            else:
                local = os.fspath(path)
            file = PromptFile(name, local, _content(flag, name, local), flag)._counted()
        if not file.count:
            raise UserError(f"{flag} = {name}: has no {flag.strip('-')}; {EXAMPLE}")
        yield file


@contextlib.contextmanager
def _read_errors(flag: str, name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        words = f"{flag} = {name}: cannot be read ({error_words(error)})"
        if is_passing(error):
            raise RetryableError(words) from None
        raise UserError(f"{words}; try {flag.removesuffix('s')} TEXT") from None


def _copy(flag: str, name: str, path: epath.Path, local: str) -> None:
    """Copy a file from an object store, or a pipe. Errors of the store and of the local disk are reported as such."""

    def chunks() -> Iterator[bytes]:
        with store_errors(flag, name):
            if not path.exists():
                raise UserError(f"{flag} = {name}: does not exist; try {flag.removesuffix('s')} TEXT")
            with path.open("rb") as source:
                while chunk := source.read(_CHUNK):
                    yield chunk

    try:
        with open(local, "wb") as target:
            target.writelines(chunks())
    except OSError as error:
        words = f"its copy in {os.path.dirname(local)} cannot be written ({error_words(error)})"
        raise UserError(f"{flag} = {name}: {words}; free some space, or set TMPDIR") from None


def _content(flag: str, name: str, path: str) -> Content:
    """Examine a file. Unlike for documents, lines that are not text do not exclude the others."""
    content = detect(path)
    if content.excluded is None and content.format in ("text", "json_lines", "json"):
        is_json = content.format == "text" and _has_json_lines(path, content)
        return dataclasses.replace(content, format="json_lines") if is_json else content
    reason, words = content.excluded or ("", f"is of the format {content.format}")
    if reason == "not_text" and not content.mark:
        with open_content(path, content) as stream:
            lines = stream.read(_SAMPLE).split(b"\n")
        if 2 * sum(map(_is_text, lines)) >= len(lines):
            is_json = family_of(path) == "json" or lines[0].startswith(b"{")
            return dataclasses.replace(content, format="json_lines" if is_json else "text", excluded=None)
    raise UserError(f"{flag} = {name}: {words}" + ("" if "; try " in words else f"; {EXAMPLE}"))


def _has_json_lines(path: str, content: Content) -> bool:
    """Whether most of the first lines of a text, blank ones aside, are JSON objects with one of the fields."""
    objects: list[bool] = []
    try:
        with open_content(path, content) as stream:
            lines = (line for _, line in lines_between(stream, 0, sys.maxsize) if not line.isspace())
            for line in islice(lines, _FIRST_LINES):
                objects.append(_is_object(line))
    except Exception as error:
        if not is_damage(error):  # damage is reported when the lines are read
            raise
    return 2 * sum(objects) > len(objects)


def _is_object(line: bytes) -> bool:
    try:
        value = JSON.decode(line.decode())
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and any(name in value for name in _FIELDS)


def _is_text(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in line


def _from_line(number: int, line: bytes, is_json: bool) -> PromptLine:
    if not line:
        return PromptLine(number, fault="is longer than 64 MiB")
    try:
        text = line.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        return PromptLine(number, fault=f"is not UTF-8 at byte {error.start + 1}")
    if not is_json:
        return PromptLine(number, text)
    try:
        return _from_json(number, JSON.decode(text))
    except (ValueError, RecursionError) as error:
        return PromptLine(number, fault=f"is not valid JSON ({error_words(error)})")


def _from_json(number: int, value: Any) -> PromptLine:
    """The prompt of an object, or of a string."""
    if not isinstance(value, (dict, str)):
        return PromptLine(number, fault=f"is neither an object with the field {_FIELDS[0]!r} nor a text")
    fields = value if isinstance(value, dict) else {_FIELDS[0]: value}
    name = next((name for name in _FIELDS if name in fields), _FIELDS[0])
    text, label = fields.get(name), fields.get("id")
    if name not in fields:
        listed = ", ".join(f"{field!r:.40}" for field in list(fields)[:5]) or "none"
        return PromptLine(number, id=label, fault=f"has no field {name!r}; its fields: {listed}")
    if not isinstance(text, str):
        return PromptLine(number, id=label, fault=f"has no text in the field {name!r}")
    try:
        text.encode()
    except UnicodeEncodeError:  # a half of a surrogate pair, or invalid UTF-8 in an array
        return PromptLine(number, id=label, fault=f"has invalid characters in the field {name!r}")
    return PromptLine(number, text, label)
