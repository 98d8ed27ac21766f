"""The files that users have, through `mot data build`: each document is read once, or its file is named with a reason.

A case is the content of one file, built next to a good file, and the documents that it must give, or the words of its
line in the report. A build of nothing but a file without documents fails with the same words.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import errno
import gzip
import io
import json
import lzma
import os
import socket
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds

from mot_jax.cli import main
from mot_jax.data import files
from mot_jax.data.build import build as build_corpus
from mot_jax.data.build import spec_from_files
from mot_jax.data.files import find_files, read_part, split_file
from mot_jax.data.formats import ReadReport
from mot_jax.errors import UserError

TEXTS = ["one", "zweites: äöü €, 漢字", 'a "quoted"\nline, and\n\na gap']
LINES = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)).encode()
ARRAY = [{"text": text, "meta": {"nested": [1, {"text": "no"}]}} for text in TEXTS]
CSV = 'label,text\r\n1,one\r\n2,"zweites: äöü €, 漢字"\r\n3,"a ""quoted""\nline, and\n\na gap"\r\n'.encode()
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
OPEN_QUOTE = b'label\ttext\n0\t"Hello you\n' + b"".join(b"%d\ttext %d\n" % (i, i) for i in range(1, 999))
ARCHIVE = io.BytesIO()
with zipfile.ZipFile(ARCHIVE, "w") as archive:
    archive.writestr("a.txt", "text in the archive")
TAR = io.BytesIO()
with tarfile.open(fileobj=TAR, mode="w") as archive_of_one:
    archive_of_one.addfile(tarfile.TarInfo("a.txt"))


def arrow_compressed(content: bytes, codec: str) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def zstd(content: bytes) -> bytes:
    return arrow_compressed(content, "zstd")


def parquet(**columns: pa.Array) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


def text_column(kind: pa.DataType) -> bytes:
    return parquet(id=pa.array([1, 2, 3]), text=pa.array([t.encode() for t in TEXTS]).cast(pa.string()).cast(kind))


def build(directory: Path, *arguments: str) -> tuple[list[str], list[str]]:
    """Run `mot data build`: the documents of the corpus in order, and the lines printed. SystemExit if it fails."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            main(["data", "build", "mine", *arguments, "--directory", str(directory), "--validation", "0"])
        except SystemExit as error:
            error.args = (error.code, output.getvalue())
            raise
    source = tfds.builder_from_directory(directory / "corpora/mine/1.0.0").as_data_source("train")
    return [record["text"].decode() for record in source], output.getvalue().splitlines()


def refusal(directory: Path, *arguments: str) -> str:
    """The error of a build, which must be one line with exit code 2, and must leave no corpus behind."""
    with pytest.raises(SystemExit) as error:
        build(directory, *arguments)
    code, output = error.value.args
    assert code == 2
    assert not list(directory.glob("corpora/*/1.0.0*"))
    (line,) = (line for line in output.splitlines() if line.startswith("error: "))
    return line


READ: dict[str, tuple[bytes, list[str]]] = {
    # JSON in any layout
    "lines.jsonl": (LINES, TEXTS),
    "upper.JSONL": (LINES, TEXTS),
    "mark.jsonl": (codecs.BOM_UTF8 + LINES, TEXTS),
    "crlf.jsonl": (LINES.replace(b"\n", b"\r\n"), TEXTS),
    "long_lines.jsonl": (b'{"list": [%s], "text": "one"}\n' % b",".join([b"1"] * 50_000), ["one"]),
    "long_number.jsonl": (b'{"n": %s, "text": "one"}\n{"text": "two"}\n' % (b"9" * 5000), ["one", "two"]),
    "long_number.json": (b'[{"text": "one", "n": -%s}, {"text": "two"}]' % (b"9" * 5000), ["one", "two"]),
    "nan.jsonl": (b'{"n": NaN, "text": "one"}\n{"n": -Infinity, "text": "two"}\n', ["one", "two"]),
    "surrogate_pair.jsonl": (b'{"text": "\\ud83d\\ude00"}\n', ["\U0001f600"]),
    "commas.jsonl": (b'{"text": "one"},\n{"text": "two"},\n', ["one", "two"]),
    "one_object.json": (b'{"text": "one"}', ["one"]),
    "array.json": (json.dumps(ARRAY).encode(), TEXTS),
    "array.jsonl": (json.dumps(ARRAY).encode(), TEXTS),
    "array_mark.json": (codecs.BOM_UTF8 + json.dumps(ARRAY).encode(), TEXTS),
    "array_lines.json": (b"[" + b",\n".join(LINES.splitlines()) + b"]\n", TEXTS),
    "indented_array.json": (json.dumps(ARRAY, indent=2).encode(), TEXTS),
    "indented_values.json": ("\n".join(json.dumps(entry, indent=4) for entry in ARRAY).encode(), TEXTS),
    "two_arrays.json": (json.dumps(ARRAY[:1]).encode() + b"\n" + json.dumps(ARRAY[1:]).encode(), TEXTS),
    "strings.json": (json.dumps(TEXTS, indent=1).encode(), TEXTS),
    "utf16.json": (json.dumps(ARRAY, indent=2, ensure_ascii=False).encode("utf-16"), TEXTS),
    # compression by content, whatever the suffix
    "gzip.jsonl": (gzip.compress(LINES), TEXTS),
    "gzip.jsonl.GZ": (gzip.compress(LINES), TEXTS),
    "members.jsonl.gz": (gzip.compress(LINES[:20]) + gzip.compress(LINES[20:]), TEXTS),
    "twice.jsonl.gz": (gzip.compress(gzip.compress(LINES)), TEXTS),
    "not_compressed.jsonl.gz": (LINES, TEXTS),
    "zstd.jsonl.zst": (zstd(LINES), TEXTS),
    "frames.jsonl.zst": (zstd(LINES[:20]) + b"\x50\x2a\x4d\x18\x02\0\0\0ab" + zstd(LINES[20:]), TEXTS),
    "bz2.jsonl.bz2": (bz2.compress(LINES[:20]) + bz2.compress(LINES[20:]), TEXTS),
    "xz.jsonl.xz": (lzma.compress(LINES[:20]) + lzma.compress(LINES[20:]), TEXTS),
    "lz4.jsonl.lz4": (arrow_compressed(LINES, "lz4"), TEXTS),
    "zstd_as.txt": (zstd(b"text"), ["text"]),
    "utf16.txt.gz": (gzip.compress("text é".encode("utf-16")), ["text é"]),
    "csv.csv.xz": (lzma.compress(CSV), TEXTS),
    # encodings with a mark
    "mark.txt": (codecs.BOM_UTF8 + b"text", ["text"]),
    "utf16.txt": ("text é 漢字\n".encode("utf-16"), ["text é 漢字\n"]),
    "utf16be.txt": (codecs.BOM_UTF16_BE + "text é".encode("utf-16-be"), ["text é"]),
    "utf32.txt": ("text é".encode("utf-32"), ["text é"]),
    "utf32be.txt": (codecs.BOM_UTF32_BE + "text é".encode("utf-32-be"), ["text é"]),
    "utf16.jsonl": (LINES.decode().encode("utf-16"), TEXTS),
    "long_utf16.txt": (("漢字 and more " * 20_000).encode("utf-16"), ["漢字 and more " * 20_000]),
    # tables
    "table.csv": (CSV, TEXTS),
    "table.CSV": (CSV, TEXTS),
    "mark.csv": (codecs.BOM_UTF8 + b"text,label\none,1\n", ["one"]),
    "utf16.csv": (CSV.decode().encode("utf-16"), TEXTS),
    "long_field.csv": (b"text,label\n%s,1\ntwo,2\n" % (b"x" * 200_000), ["x" * 200_000, "two"]),
    "semicolon.csv": (b"label;text\n1;one, two\n", ["one, two"]),
    "tab.tsv": (b"text\tlabel\none, two\t1\n", ["one, two"]),
    "quoted.tsv": (CSV.replace(b",", b"\t", 2).replace(b"3,", b"3\t").replace(b"2,", b"2\t"), TEXTS),
    "indented.tsv": (b'label\ttext\n1\t"all:\n\tmake"\n', ["all:\n\tmake"]),
    "quoted_header.tsv": (b'"label"\t"text"\n"1"\t"a\n2\tb"\n', ["a\n2\tb"]),
    # quotes that are text: never closed, closed in a later row, in the middle of the field
    "open_quote.tsv": (OPEN_QUOTE, ['"Hello you', *(f"text {i}" for i in range(1, 999))]),
    "open_column.tsv": (b'text\n"Hello you\none\n\ntwo\n', ['"Hello you', "one", "two"]),
    "closed_quote.tsv": (
        b'label\ttext\n1\tone\n2\t"Hello\n3\tthree\n4\tgoodbye"\n5\tfive\n',
        ["one", '"Hello', "three", 'goodbye"', "five"],
    ),
    "inner_quote.tsv": (b'label\ttext\n1\t"Bye" for now\n2\t"two"\n', ['"Bye" for now', "two"]),
    "one_column.tsv": (b"text\none, two\n", ["one, two"]),
    "quoted_header.csv": (b'"a\nname","text"\n1,one\n', ["one"]),
    "blank_lines.csv": (b"\n\nlabel,text\n\n1,one\n", ["one"]),
    "short_rows.csv": (b"text,label\none\n", ["one"]),
    # Parquet
    "string.parquet": (text_column(pa.string()), TEXTS),
    "large.parquet": (text_column(pa.large_string()), TEXTS),
    "view.parquet": (text_column(pa.string_view()), TEXTS),
    "binary.parquet": (text_column(pa.binary()), TEXTS),
    "binary_view.parquet": (text_column(pa.binary_view()), TEXTS),
    "dictionary.parquet": (text_column(pa.dictionary(pa.int32(), pa.string())), TEXTS),
    "parquet_as.txt": (text_column(pa.string()), TEXTS),
    # text that begins like other formats, and long ASCII with colors
    "pdf.txt": (b"%PDF- begins a PDF, as in %PDF-1.7", ["%PDF- begins a PDF, as in %PDF-1.7"]),
    "pdf_version.txt": (b"%PDF-1.7 is newer than 1.4", ["%PDF-1.7 is newer than 1.4"]),
    "zip.md": (
        b"PK\3\4 begins a zip archive" + b", and text" * 20,
        ["PK\3\4 begins a zip archive" + ", and text" * 20],
    ),
    "tar.txt": (b"x" * 257 + b"ustar is at byte 257", ["x" * 257 + "ustar is at byte 257"]),
    "pointers.md": (POINTER[:43] + b" begins a pointer", [POINTER[:43].decode() + " begins a pointer"]),
    "orc.txt": (b"PAR12 is a code; ORC too", ["PAR12 is a code; ORC too"]),
    "json_as.txt": (LINES, [LINES.decode()]),
    "colors.log": (b"\x1b[31mred\x1b[0m text " * 10, ["\x1b[31mred\x1b[0m text " * 10]),
}


@pytest.mark.parametrize("name", READ)
def test_every_document_is_read_once(name: str, tmp_path: Path) -> None:
    content, expected = READ[name]
    (tmp_path / name).write_bytes(content)
    documents, lines = build(tmp_path, str(tmp_path / name))
    assert documents == expected
    assert not any("skipped" in line or "no documents" in line for line in lines), lines


# Content, documents that are read all the same, and words of the report.
PARTLY: dict[str, tuple[bytes, list[str], str]] = {
    "cut.jsonl.gz": (gzip.compress(LINES)[:-12], TEXTS[:2], "1 damaged files, read up to the damage"),
    "cut.json": (json.dumps(ARRAY).encode()[:-9], TEXTS[:2], "1 damaged files, read up to the damage"),
    "broken.json": (b'[{"text": "one"}, {"text": oops}]', ["one"], "1 damaged files"),
    "arrays.jsonl": (b'{"text": "one"}\n["id1", "t1"]\n', ["one"], "1 lines or rows skipped that have no text"),
    "some.jsonl": (
        b'{"text": "one"}\n{"other": 1}\n{"text": null}\n{"text": 5}\n[1]\n{"text": "two"}\n',
        ["one", "two"],
        "4 lines or rows skipped that have no text in the field --text-feature",
    ),
    "nested.jsonl": (
        b'{"text": "one"}\n{"n": %s}\n{"text": "two"}\n' % (b"[" * 100_000 + b"]" * 100_000),
        ["one", "two"],
        "1 lines skipped",
    ),
    "half_pair.jsonl": (b'{"text": "a \\ud83d b"}\n', ["a \ufffd b"], "1 documents with invalid UTF-8"),
    "some_broken.jsonl": (b'{"text": "one"}\n{"text": "tw\n', ["one"], "1 lines skipped that are not valid JSON"),
    "blank.csv": (b"text,label\none,1\n,2\n\n", ["one"], "1 empty documents skipped"),
    "ragged.csv": (b"label,text\n1,one\n2,two, three\n", ["one"], "1 lines of tables skipped, in rows that"),
    "open_quote.csv": (b"label,text\n1,one\n" + OPEN_QUOTE.replace(b"\t", b",")[11:], ["one"], "999 lines of tables"),
    "ragged.tsv": (b'label\ttext\n1\t"one\n2\ttwo\t3\n3\tthree\n', ['"one', "three"], "1 lines of tables skipped"),
    "nulls.parquet": (parquet(text=pa.array(["one", None, "two"])), ["one", "two"], "1 lines or rows skipped"),
    "bytes.parquet": (parquet(text=pa.array([b"one", b"\xff\xd8\xff"])), ["one"], "1 files or documents skipped"),
    "latin1.txt": ("es war einmal ein Käfer".encode("latin-1"), ["es war einmal ein K\ufffdfer"], "invalid UTF-8"),
    "odd.txt": ("text".encode("utf-16") + b"x", ["text\ufffd"], "1 documents with invalid UTF-8"),
}


@pytest.mark.parametrize("name", PARTLY)
def test_skipped_content_is_counted(name: str, tmp_path: Path) -> None:
    content, expected, words = PARTLY[name]
    (tmp_path / name).write_bytes(content)
    documents, lines = build(tmp_path, str(tmp_path / name))
    assert documents == expected
    assert any(words in line for line in lines), lines


# Of these files, those with an unknown number of missing documents, with words of the reason.
INCOMPLETE = {
    "cut.jsonl.gz": "damaged: Compressed file ended before the end-of-stream marker was reached",
    "cut.json": "no valid JSON after 2 values",
    "broken.json": "no valid JSON after 1 values",
    "ragged.csv": "bad rows, the first in line 3 (3 fields, the header has 2)",
    "open_quote.csv": "bad rows, the first in lines 3 to 1001 (unexpected end of data)",
    "ragged.tsv": "bad rows, the first in line 3 (3 fields, the header has 2)",
}


def test_files_with_missing_documents_are_named(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in PARTLY:
        (source / name).write_bytes(PARTLY[name][0])
    _, lines = build(tmp_path, str(source))
    words = "documents missing from "
    assert {line.removeprefix(words) for line in lines if line.startswith(words)} == {
        *(f"{name}: {reason}" for name, reason in INCOMPLETE.items() if "line 3" not in reason),
        f"ragged.csv, ragged.tsv: {INCOMPLETE['ragged.csv']}",
    }
    entries = map(json.loads, (tmp_path / "corpora/mine/1.0.0/left_out.jsonl").read_text().splitlines())
    assert sorted((entry["file"], entry["documents"], entry["reason"]) for entry in entries) == sorted(
        (str(source / name), len(PARTLY[name][1]), reason) for name, reason in INCOMPLETE.items()
    )


def test_many_reasons_are_listed_in_a_file(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for i in range(15):
        (source / f"{i:02}.csv").write_text("text\n" + "good\n" * i + "one, two\n" + "good\n")
    _, lines = build(tmp_path, str(source))
    named = [line for line in lines if line.startswith("documents missing from ")]
    assert len(named) == 11 and named[-1] == "documents missing from 5 more, for other reasons (left_out.jsonl)"
    assert len((tmp_path / "corpora/mine/1.0.0/left_out.jsonl").read_text().splitlines()) == 15


LEFT_OUT: dict[str, tuple[bytes, str]] = {
    "empty.txt": (b"", "empty"),
    "blank.txt": (b" \n\n", "empty"),
    "empty.jsonl": (b"", "empty"),
    "empty.json": (b"", "empty"),
    "empty.csv": (b"", "empty"),
    "empty.parquet": (b"", "empty"),
    "empty_array.json": (b"[]", "empty"),
    "only_mark.txt": (codecs.BOM_UTF8, "empty"),
    "empty.txt.gz": (gzip.compress(b""), "empty"),
    "utf16.txt": ("text without a mark".encode("utf-16-le"), "UTF-16 without a mark; try iconv -f UTF-16LE"),
    "utf16be.jsonl": (LINES.decode().encode("utf-16-be"), "UTF-16 without a mark"),
    "utf16.csv": (CSV.decode().encode("utf-16-le"), "UTF-16 without a mark"),
    "utf16_cyrillic.txt": ("Жил-был царь".encode("utf-16-le"), "UTF-16 without a mark"),
    "shift_jis.txt": ("吾輩は猫である。名前はまだ無い。".encode("shift-jis"), "not UTF-8, and without a mark"),
    "koi8.txt": ("Жил-был царь".encode("koi8-r"), "not UTF-8, and without a mark"),
    "zeros.txt": (bytes(5000), "not text"),
    "picture.txt": (b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01" + bytes(range(256)) * 9, "not text"),
    "archive.jsonl": (ARCHIVE.getvalue(), "a zip archive; try the files in it (unzip)"),
    "tar.jsonl.gz": (gzip.compress(TAR.getvalue()), "a tar archive; try the files in it (tar -xf)"),
    "paper.txt": (b"%PDF-1.7\n1 0 obj << >>", "a PDF document; try pdftotext"),
    "pointer.jsonl": (POINTER, "a Git LFS pointer, not the file itself; try git lfs pull"),
    "pointer.parquet": (POINTER, "try git lfs pull"),
    "pointer.txt": (POINTER, "try git lfs pull"),
    "pointer.jsonl.gz": (POINTER, "try git lfs pull"),
    "cut.jsonl.gz": (gzip.compress(LINES)[:8], "damaged: Compressed file ended"),
    "cut.jsonl.zst": (zstd(LINES)[:-9], "damaged: Truncated compressed stream"),
    "lines.jsonl": (b"no json\nat all\n", "2 lines skipped that are not valid JSON"),
    "page.parquet": (b"<html>Access denied</html>", "no Parquet file"),
    "cut.parquet": (text_column(pa.string())[:-30], "damaged Parquet"),
    "other_field.jsonl": (
        b'{"body": "one", "id": 1}\n',
        "no field 'text'; it has 'body' (string), 'id' (number); try --text-feature body",
    ),
    "numbers.jsonl": (b'{"text": 1}\n{"text": null}\n', "its field 'text' has the type number"),
    "list.jsonl": (b'{"text": ["one", "two"]}\n', "its field 'text' has the type array"),
    "nested.json": (b'{"data": [{"text": "one"}]}', "no field 'text'; it has 'data' (array)"),
    "deep.jsonl": (b'{"meta": {"text": "one"}}\n', "no field 'text'; it has 'meta' (object)"),
    "arrays.jsonl": (b'["id1", "t1"]\n["id2", "t2"]\n', "values of the type array, not objects"),
    "mixed.jsonl": (b'["id1", {"text": "t1"}]\n{"body": 1}\n', "no field 'text'; it has 'body' (number)"),
    "numbers.json": (b"[1, 2, 3]", "values of the type number, not objects"),
    "other_column.csv": (b"body,label\none,1\n", "no column 'text'; it has 'body', 'label'"),
    "no_header.csv": (b"some words,1\nothers,2\n", "no column 'text'; it has 'some words', '1'"),
    "twice.csv": (b"text,text\none,two\n", "2 columns have the name 'text'"),
    "macintosh.csv": (b"label,text\r1,one\r", "its first row, the header, is not valid CSV"),
    "header.csv": (b"label,text\n", "a header without rows"),
    "other_column.parquet": (
        parquet(body=pa.array(["one"]), id=pa.array([1])),
        "no column 'text'; it has 'body' (text), 'id' (int64); try --text-feature body",
    ),
    "list.parquet": (
        parquet(text=pa.array([["one"]])),
        "its column 'text' has the type list<element: string>; it has 'text' (list<element: string>); no other column",
    ),
    "number.parquet": (parquet(text=pa.array([1.5])), "its column 'text' has the type double"),
    "struct.parquet": (parquet(text=pa.array([{"text": "one"}])), "its column 'text' has the type struct"),
    "null.parquet": (parquet(text=pa.nulls(2)), "its column 'text' has the type null"),
    "no_rows.parquet": (text_column(pa.string()) and parquet(text=pa.array([], pa.string())), "a table without rows"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_file_without_documents_is_named(name: str, tmp_path: Path) -> None:
    content, words = LEFT_OUT[name]
    source = tmp_path / "source"
    source.mkdir()
    (source / name).write_bytes(content)
    line = refusal(tmp_path, str(source / name))
    assert "no document in the files" in line and name in line and words in line
    (source / "good.txt").write_text("good")
    documents, lines = build(tmp_path, str(source))
    assert documents == ["good"]
    (line,) = (line for line in lines if line.startswith("no documents in "))
    assert name in line and words in line
    entry = json.loads((tmp_path / "corpora/mine/1.0.0/left_out.jsonl").read_text())
    assert entry["file"] == str(source / name) and words in entry["reason"]


@pytest.mark.parametrize("documents", ["file", "line", "paragraph"])
def test_text_by_its_units(documents: str, tmp_path: Path) -> None:
    expected = {"file": ["a\nb\n\nc"], "line": ["a", "b", "c"], "paragraph": ["a\nb", "c"]}[documents]
    contents = {"a.txt": codecs.BOM_UTF8, "b.txt": b""}
    for name, mark in contents.items():
        (tmp_path / name).write_bytes(mark + b"a\nb\n\nc")
    (tmp_path / "c.txt").write_bytes("a\nb\n\nc".encode("utf-16"))
    (tmp_path / "d.md.zst").write_bytes(zstd(b"a\nb\n\nc"))
    read, _ = build(tmp_path, *(str(tmp_path / f"{name}*") for name in "abcd"), "--documents", documents)
    assert read == expected * 4


def test_another_field_of_every_format(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,body\nno,csv\n")
    (tmp_path / "b.json").write_text('[{"text": "no", "body": "json"}]')
    (tmp_path / "c.parquet").write_bytes(parquet(text=pa.array(["no"]), body=pa.array(["parquet"])))
    (tmp_path / "d.jsonl").write_text('{"text": "no", "body": "lines"}\n')
    assert build(tmp_path, str(tmp_path), "--text-feature", "body")[0] == ["csv", "json", "parquet", "lines"]


def test_files_without_a_suffix_are_read_as_arguments(tmp_path: Path) -> None:
    contents = {"part-00000": LINES, "part-00001": b"plain", "part-00002": text_column(pa.string())}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    assert build(tmp_path, *(str(tmp_path / name) for name in contents))[0] == [*TEXTS, "plain", *TEXTS]
    assert "part-00000" in refusal(tmp_path / "other", str(tmp_path))


# --- directories ------------------------------------------------------------------------------------------------------


@pytest.fixture
def special(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A function that makes a special file of a kind in a directory with a good file, and returns its path."""
    directory = tmp_path / "source"
    directory.mkdir()
    (directory / "good.txt").write_text("good")
    path = directory / "special.txt"
    with contextlib.ExitStack() as stack:

        def make(kind: str) -> Path:
            if kind == "pipe":
                os.mkfifo(path)
            elif kind == "socket":
                listener = stack.enter_context(socket.socket(socket.AF_UNIX))
                listener.bind(os.path.relpath(path))  # the length of a socket's path is limited
            else:
                path.symlink_to({"device": "/dev/zero", "broken link": "nowhere", "loop": "special.txt"}[kind])
            return path

        yield make


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "broken link", "loop"])
def test_special_files_are_left_out_and_counted(kind: str, special: Callable[[str], Path], tmp_path: Path) -> None:
    path = special(kind)
    documents, lines = build(tmp_path, str(path.parent))
    assert documents == ["good"]
    assert "1 pipes, sockets, devices and broken links skipped" in lines
    assert any(line.startswith("no documents in special.txt: ") for line in lines)
    line = refusal(tmp_path / "other", str(path))
    assert "special.txt" in line and ("a broken link" in line or "a pipe, socket or device" in line)


def test_links_to_directories_are_followed_once(tmp_path: Path) -> None:
    source, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    for directory in (source / "inside", elsewhere):
        directory.mkdir(parents=True)
    (source / "inside/a.txt").write_text("a")
    (elsewhere / "b.txt").write_text("b")
    (source / "linked").symlink_to(elsewhere)
    (source / "parent").symlink_to(source)
    (elsewhere / "back").symlink_to(source / "inside")
    (source / "to_file.txt").symlink_to(elsewhere / "b.txt")
    assert build(tmp_path, str(source))[0] == ["b", "a", "b"]


@pytest.mark.parametrize("name", ["with\nnewline.txt", b"caf\xe9.txt", "[1] *?.txt", "Ünï cödé.txt", "-n.txt"])
def test_any_file_name(name: str | bytes, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    path = os.path.join(os.fsencode(source), os.fsencode(name))
    with open(path, "wb") as file:
        file.write(b"text")
    assert build(tmp_path / "a", str(source))[0] == build(tmp_path / "b", os.fsdecode(path))[0] == ["text"]
    with open(path, "wb"):
        pass
    assert "empty" in refusal(tmp_path / "c", str(source))


def test_a_directory_without_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "source/.git").mkdir(parents=True)
    (tmp_path / "source/.git/config.txt").write_text("hidden")
    assert "source': no files in it; hidden files are ignored" in refusal(tmp_path, str(tmp_path / "source"))


def test_many_files_without_documents_are_named_in_a_file(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for i in range(15):
        (source / f"{i:02}.txt").touch()
    (source / "good.txt").write_text("good")
    _, lines = build(tmp_path, str(source))
    (line,) = (line for line in lines if line.startswith("no documents in "))
    assert "09.txt and 5 more (left_out.jsonl): empty" in line and "10.txt" not in line
    entries = (tmp_path / "corpora/mine/1.0.0/left_out.jsonl").read_text().splitlines()
    assert [json.loads(entry)["file"] for entry in entries] == [str(source / f"{i:02}.txt") for i in range(15)]


def test_a_file_that_vanishes_or_changes_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("text")
    spec = spec_from_files("mine", [str(path)])
    os.utime(path, (1, 1))
    with pytest.raises(UserError, match=r"a.txt': has changed since the build began; try the same command again"):
        build_corpus(spec, tmp_path / "corpora", 1)
    path.unlink()
    with pytest.raises(UserError, match=r"a.txt': cannot be read \(No such file or directory\)"):
        build_corpus(spec, tmp_path / "corpora", 1)


def test_a_file_without_permission_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root, the tests may read every file."""

    def refuse(path: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setattr(files, "detect", refuse)
    assert "a.txt': cannot be read (Permission denied); try chmod +r" in refusal(tmp_path, str(tmp_path))


def test_an_array_is_parsed_while_it_is_read(tmp_path: Path) -> None:
    with open(tmp_path / "a.json", "w") as file:
        file.write("[\n" + ",\n".join(json.dumps({"text": "x" * 1000, "i": i}) for i in range(30_000)) + "\n]")
    (source,) = find_files([str(tmp_path / "a.json")])
    (part,) = split_file(source, "file", 1 << 20)
    tracemalloc.start()
    count = sum(1 for _ in read_part(part, "file", "text", ReadReport()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 30_000 and peak < 5e6
