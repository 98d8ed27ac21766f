"""Reading the user's files: every format, every way to split them, and damaged or invalid content."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mot_jax.data import formats
from mot_jax.data.files import FilePart, SourceFile, find_files, read_part, split_file
from mot_jax.data.formats import ReadReport
from mot_jax.errors import UserError

TEXTS = ["first\nwith two lines", "zweites: äöü €", "\ttabs and 'quotes' \"\n\nand a gap"]


def read(path: Path, documents="file", feature="text", size=1 << 20) -> tuple[list[tuple[str, bytes]], Counter]:
    report = ReadReport()
    parts = split_file(source(path), documents, size)
    return [document for part in parts for document in read_part(part, documents, feature, report)], +report.skipped


def source(path: Path) -> SourceFile:
    (file,) = find_files([str(path)])
    return file


def write_json(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"url": "x", "text": text}) + "\n" for text in texts))


def write_parquet(path: Path, texts: list[str]) -> None:
    pq.write_table(pa.table({"url": ["x"] * len(texts), "text": texts}), path, row_group_size=2)


def write_text(path: Path, texts: list[str]) -> None:
    path.write_text("\n\n\n".join(text.replace("\n\n", "\n") for text in texts))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("name", "documents", "write"),
    [("a.jsonl", "file", write_json), ("c4.json", "file", write_json), ("a.txt", "paragraph", write_text)],
)
def test_every_format_compressed_and_not(
    tmp_path: Path, name: str, documents: str, write: Callable[[Path, list[str]], None], compressed: bool
) -> None:
    path = tmp_path / name
    texts = [text.replace("\n\n", "\n") for text in TEXTS] if write is write_text else TEXTS
    write(path, texts)
    if compressed:
        path = tmp_path / f"{name}.gz"
        path.write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    documents_read, skipped = read(path, documents)
    assert [text.decode() for _, text in documents_read] == texts
    assert not skipped
    names = [name for name, _ in documents_read]
    assert names[0] == f"{path.name}@0" and len(set(names)) == len(names)


def test_plain_text_by_file_and_by_line(tmp_path: Path) -> None:
    for name, content in {"a.md": b"one\r\n\r\ntwo", "b.py.gz": gzip.compress(b"one\r\n\r\ntwo")}.items():
        path = tmp_path / name
        path.write_bytes(content)
        assert read(path) == ([(name, b"one\r\n\r\ntwo")], Counter())
        assert read(path, "line") == ([(f"{name}@0", b"one"), (f"{name}@7", b"two")], Counter(empty=1))


def test_parquet_by_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, TEXTS)
    assert [(part.start, part.stop) for part in split_file(source(path), "file", 1)] == [(0, 1), (1, 2)]
    documents_read, skipped = read(path)
    assert documents_read == [(f"a.parquet@{row}", text.encode()) for row, text in enumerate(TEXTS)] and not skipped

    table = {"text": ["x", None], "number": [1, 2], "kind": pa.array(["a", "b"]).dictionary_encode()}
    pq.write_table(pa.table(table), path)
    assert read(path) == ([("a.parquet@0", b"x")], Counter(no_feature=1))
    assert [text for _, text in read(path, feature="kind")[0]] == [b"a", b"b"]
    assert read(path, feature="number") == read(path, feature="nothing") == ([], Counter(no_feature=2))


@given(
    st.lists(st.sampled_from([b"a\n", b"bcd\n", b"\n", b" \r\n", b"long enough\n"]), max_size=12),
    st.sampled_from([b"", b"end"]),
    st.integers(1, 9),
    st.sampled_from(["line", "paragraph"]),
)
def test_every_split_of_a_file_reads_every_document_once(tmp_path_factory, lines, end, size, documents) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.txt"
    path.write_bytes(b"".join(lines) + end)
    assert read(path, documents, size=size) == read(path, documents)
    expected = [line.rstrip() for line in path.read_bytes().split(b"\n") if line.strip()]
    if documents == "line":
        assert [text for _, text in read(path, documents)[0]] == expected
    else:
        assert b"\n".join(text.replace(b"\r", b"") for _, text in read(path, documents)[0]).split(b"\n") == (
            expected or [b""]
        )


def test_invalid_lines_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [b'{"text": "kept"}', b"", b"{broken", b"[1, 2]", b'{"other": "x"}', b'{"text": 5}', b'{"text": " \\n"}']
    lines += [b'{"text": "caf\xe9"}', b'{"text": "half \\ud83d"}', b"[" * 100_000]
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    documents_read, skipped = read(path)
    assert [text.decode() for _, text in documents_read] == ["kept", "caf\ufffd", "half \ufffd"]
    assert skipped == Counter(not_json=2, no_feature=3, empty=1, damaged_utf8=2)


def test_documents_that_are_too_long_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_DOCUMENT_BYTES", 20)
    path = tmp_path / "a.txt"
    path.write_bytes(b"short\n\n" + b"x" * 100 + b"\n\n" + b"a line\n" * 4 + b"\n" + b"y" * 20 + b"\nlast")
    for size in (1000, 1, 7):
        assert [text for _, text in read(path, "line", size=size)[0]] == [
            b"short",
            *[b"a line"] * 4,
            b"y" * 20,
            b"last",
        ]
        assert read(path, "line", size=size)[1]["too_long"] == 1
        documents_read, skipped = read(path, "paragraph", size=size)
        assert [text for _, text in documents_read] == [b"short"] and skipped["too_long"] == 3
    assert read(path) == ([], Counter(too_long=1))
    write_json(tmp_path / "a.jsonl", ["fits", "x" * 50])
    assert read(tmp_path / "a.jsonl", feature="text")[1]["too_long"] == 2  # the lines, with all their fields


def test_a_long_line_is_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_DOCUMENT_BYTES", 1 << 20)
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as file:
        for _ in range(100):
            file.write(b"x" * 10**6)
        file.write(b'\n{"text": "kept"}\n')
    tracemalloc.start()
    documents_read, skipped = read(path, size=1 << 24)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [text for _, text in documents_read] == [b"kept"] and skipped == Counter(too_long=1)
    assert peak < 10e6


COMPRESS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda content: pa.Codec("zstd").compress(content, asbytes=True),
}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_damaged_files_are_read_up_to_the_damage(suffix: str, tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    write_json(lines, [f"text {i} {hashlib.sha256(b'%d' % i).hexdigest()}" for i in range(20_000)])
    complete = read(lines)[0]
    content = COMPRESS[suffix](lines.read_bytes())
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(content[:-2000])
    documents_read, skipped = read(path)
    assert (
        documents_read == [(name.replace("a.jsonl", path.name), text) for name, text in complete][: len(documents_read)]
    )
    assert 5000 < len(documents_read) < len(complete) and skipped == Counter(damaged_files=1)
    path.write_bytes(content[:12])
    assert read(path) == ([], Counter(damaged_files=1))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_damage_at_the_beginning_of_a_later_stream_is_counted(suffix: str, tmp_path: Path) -> None:
    """Also zeros between streams are allowed, as xz pads them; other bytes begin no stream."""
    streams = [COMPRESS[suffix](b'{"text": "%d"}\n' % i) for i in range(3)]
    path = tmp_path / f"a.jsonl.{suffix}"
    padding = b"\0" * 4 if suffix in ("bz2", "xz") else b""
    path.write_bytes(padding.join(streams) + padding)
    assert [text for _, text in read(path)[0]] == [b"0", b"1", b"2"]
    damaged = bytearray(b"".join(streams))
    damaged[len(streams[0]) + 1] ^= 1
    path.write_bytes(damaged)
    documents_read, skipped = read(path)
    # Of zstd, the last buffer before damage is lost.
    assert [text for _, text in documents_read] == ([] if suffix == "zst" else [b"0"])
    assert skipped == Counter(damaged_files=1)


def test_a_damaged_page_of_parquet_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": [f"document {i}" for i in range(100)]}),
        path,
        write_page_checksum=True,
        compression="none",
        use_dictionary=False,
    )
    assert len(read(path)[0]) == 100
    path.write_bytes(path.read_bytes().replace(b"document 50", b"dobument 50"))
    assert read(path)[1] == Counter(damaged_files=1)


def test_damaged_parquet_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing")
    assert read(tmp_path / "a.parquet") == ([], Counter(damaged_files=1))


def test_finding_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.txt", "a.jsonl.gz", "deep/c.md", "deep/picture.png", ".git/config.txt", "deep/.hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    files = find_files([str(tmp_path)])
    assert [file.name for file in files] == ["a.jsonl.gz", "b.txt", "deep/c.md", "deep/picture.png"]
    assert [file.content.excluded and file.content.excluded[0] for file in files] == [None, None, None, "other_files"]
    monkeypatch.chdir(tmp_path)
    paths = [(file.path, file.name) for file in find_files(["*.txt", "b.txt", "**/*.md"])]
    assert paths == [(str(tmp_path / "b.txt"), "b.txt"), (str(tmp_path / "deep/c.md"), "c.md")]
    with pytest.raises(UserError, match=r"FILE = 'nothing\*': no such file"):
        find_files(["nothing*"])
    (tmp_path / "deep/picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    with pytest.raises(UserError, match=r"picture.png': not text .* must be a file of text, JSON, CSV or Parquet"):
        find_files(["deep/picture.png"])


def test_parts_have_the_given_size(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"x" * 25)
    parts = list(split_file(source(path), "file", 10))
    assert [(part.start, part.stop, part.size) for part in parts] == [(0, 10, 10), (10, 20, 10), (20, 25, 5)]
    (whole,) = split_file(source(path.rename(tmp_path / "a.txt")), "file", 10)
    assert isinstance(whole, FilePart) and whole.size == 25
