"""Windows: every token is predicted once, and interrupted or concurrent builds are safe."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from mot_jax.data import windows as windows_module
from mot_jax.data.corpora import Corpus
from mot_jax.data.tokenizers import ByteTokenizer
from mot_jax.data.windows import Windows, open_windows, pack
from mot_jax.errors import UserError

TOKENIZER = ByteTokenizer()
EOT = TOKENIZER.end_of_text
TEXTS = [b"def f(x):\n", b"", b"    return x + 1\n" * 20, b"x", b"\x00\xff" * 9]


def stream_of(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The stream of tokens and the document of each token, computed directly."""
    tokens, document_of = [], []
    for i, text in enumerate(texts):
        tokens += [EOT, *text]
        document_of += [i] * (1 + len(text))
    return np.array([*tokens, EOT]), np.array([*document_of, len(texts) - 1])


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=8), st.integers(1, 12))
def test_packing_covers_the_stream(texts: list[bytes], context_length: int) -> None:
    stream, document_of = stream_of(texts)
    windows = list(pack((TOKENIZER.encode(text) for text in texts), context_length, EOT))
    assert len(windows) == -(-(len(stream) - 1) // context_length)
    for i, (tokens, first, last) in enumerate(windows):
        begin, end = i * context_length, i * context_length + context_length + 1
        np.testing.assert_array_equal(tokens, stream[begin:end])
        assert (first, last) == (document_of[begin:end][0], document_of[begin:end][-1])


@settings(max_examples=10)
@given(st.lists(st.binary(max_size=40), min_size=2, max_size=8), st.integers(1, 3))
def test_every_token_is_predicted_once(
    tmp_path_factory: pytest.TempPathFactory,
    toy_corpus: Callable[..., Corpus],
    texts: list[bytes],
    context_length: int,
) -> None:
    windows = open_windows(toy_corpus(*texts), "train", TOKENIZER, context_length, tmp_path_factory.mktemp("windows"))
    stream, _ = stream_of(texts)
    tokens, mask = windows.read(range(len(windows)))
    np.testing.assert_array_equal(tokens[:, 1:][mask], stream[1:])
    np.testing.assert_array_equal(tokens[:, :-1][mask], stream[:-1])
    assert (tokens[:, 1:][~mask] == EOT).all()
    assert windows.info["tokens"] == len(stream)
    assert windows.info["bytes"] == sum(map(len, texts))
    assert windows.info["documents"] == len(texts)


def test_reading(tmp_path: Path, toy_corpus: Callable[..., Corpus]) -> None:
    windows = open_windows(toy_corpus(*TEXTS), "train", TOKENIZER, 16, tmp_path)
    assert windows.context_length == 16
    assert len(windows) == len(windows.documents) == windows.info["windows"]
    assert windows.documents.dtype == np.int32 and windows.documents.shape == (len(windows), 2)
    assert isinstance(windows.documents, np.memmap)
    ids = np.array([3, -1, len(windows) - 1, 3, 0])
    tokens, mask = windows.read(ids)
    assert tokens.dtype == np.int32 and tokens.shape == (5, 17)
    assert mask.dtype == np.bool_ and mask.shape == (5, 16)
    np.testing.assert_array_equal(tokens[0], tokens[3])
    assert (tokens[1] == EOT).all() and not mask[1].any()
    assert mask[0].all() and not mask[2].all()
    assert windows.read([-1]).tokens.tolist() == [[EOT] * 17]
    with pytest.raises(IndexError):
        windows.read([len(windows)])


def test_threads_may_share_windows(tmp_path: Path, toy_corpus: Callable[..., Corpus]) -> None:
    windows = open_windows(toy_corpus(bytes(range(256)) * 64), "train", TOKENIZER, 8, tmp_path)
    whole, _ = windows.read(range(len(windows)))
    id_lists = [np.random.default_rng(i).integers(0, len(windows), 50) for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        for ids, (tokens, _) in zip(id_lists, pool.map(windows.read, id_lists), strict=True):
            np.testing.assert_array_equal(tokens, whole[ids])


def test_large_vocabularies_are_stored_in_int32(tmp_path: Path, toy_corpus: Callable[..., Corpus]) -> None:
    class Wide(ByteTokenizer):
        vocab_size = 100_001
        end_of_text = 100_000
        fingerprint = "wide"
        token_bytes = np.ones(100_001, np.int32)

        def encode(self, text: bytes) -> np.ndarray:
            return super().encode(text).astype(np.int32) + 99_000

    tokens, _ = open_windows(toy_corpus(b"abc"), "train", Wide(), 4, tmp_path).read([0])
    assert tokens.tolist() == [[100_000, 99_097, 99_098, 99_099, 100_000]]


def test_the_fingerprint_changes_with_every_input(
    tmp_path: Path, toy_corpus: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(ByteTokenizer):
        fingerprint = "other"

    def fingerprint(
        text: bytes = b"abcdefgh", tokenizer: ByteTokenizer = TOKENIZER, context_length: int = 4, **names: Any
    ) -> str:
        corpus = toy_corpus(text, **names)
        return open_windows(corpus, corpus.split, tokenizer, context_length, tmp_path).fingerprint

    seen = [fingerprint(), fingerprint(b"abcdefgH"), fingerprint(name="other"), fingerprint(split="validation")]
    seen += [fingerprint(tokenizer=Other()), fingerprint(context_length=5)]
    monkeypatch.setattr(windows_module, "FORMAT_VERSION", 0)
    seen += [fingerprint()]
    monkeypatch.undo()
    monkeypatch.setattr(windows_module, "PACKING", "other")
    seen += [fingerprint()]
    assert len(set(seen)) == len(seen)
    monkeypatch.undo()
    assert fingerprint() == seen[0]


def test_a_split_shorter_than_a_window_is_refused(tmp_path: Path, toy_corpus: Callable[..., Corpus]) -> None:
    with pytest.raises(UserError, match=r"model.context_length = 12: .*data.corpus = 'toy'.* 12 tokens.* try 11 ") as e:
        open_windows(toy_corpus(b"0123456789"), "train", TOKENIZER, 12, tmp_path)
    assert "\n" not in str(e.value)
    assert not any((tmp_path / "windows").iterdir())
    assert len(open_windows(toy_corpus(b"0123456789"), "train", TOKENIZER, 11, tmp_path)) == 1
    with pytest.raises(UserError, match="its train split has no documents"):
        open_windows(toy_corpus(), "train", TOKENIZER, 12, tmp_path)


# --- building once, in spite of interruptions -------------------------------------------------------------------------


def directories(path: Path) -> list[str]:
    return sorted(entry.name for entry in (path / "windows").iterdir())


def test_a_second_opening_builds_nothing(
    tmp_path: Path, toy_corpus: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_windows(toy_corpus(*TEXTS), "train", TOKENIZER, 16, tmp_path)
    monkeypatch.setattr(windows_module, "_write_windows", None)
    second = open_windows(toy_corpus(*TEXTS), "train", TOKENIZER, 16, tmp_path)
    np.testing.assert_array_equal(first.read(range(len(first))).tokens, second.read(range(len(first))).tokens)
    assert directories(tmp_path) == [first.fingerprint]


def test_a_build_that_fails_leaves_nothing(tmp_path: Path, toy_corpus: Callable[..., Corpus]) -> None:
    class Failing(ByteTokenizer):
        def encode(self, text: bytes) -> np.ndarray:
            if text == TEXTS[3]:
                raise KeyboardInterrupt
            return super().encode(text)

    with pytest.raises(KeyboardInterrupt):
        open_windows(toy_corpus(*TEXTS), "train", Failing(), 16, tmp_path)
    assert directories(tmp_path) == []
    assert len(open_windows(toy_corpus(*TEXTS), "train", TOKENIZER, 16, tmp_path)) > 1


@pytest.mark.parametrize("damage", ["no info", "half an info", "short documents", "no tokens", "short tokens", "empty"])
def test_incomplete_and_damaged_windows_are_rebuilt(
    tmp_path: Path, toy_corpus: Callable[..., Corpus], damage: str
) -> None:
    windows = open_windows(toy_corpus(*TEXTS), "train", TOKENIZER, 16, tmp_path)
    expected = windows.read(range(len(windows))).tokens
    directory = tmp_path / "windows" / windows.fingerprint
    if damage == "no info":
        (directory / "windows.json").unlink()
    elif damage == "no tokens":
        (directory / "tokens.array_record").unlink()
    elif damage == "empty":
        shutil.rmtree(directory)
        directory.mkdir()
    else:
        names = {"half an info": "windows.json", "short documents": "documents.npy"}
        file = directory / names.get(damage, "tokens.array_record")
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    again = open_windows(toy_corpus(*TEXTS), "train", TOKENIZER, 16, tmp_path)
    np.testing.assert_array_equal(again.read(range(len(again))).tokens, expected)
    assert directories(tmp_path) == [windows.fingerprint]


def test_a_flipped_bit_is_detected(tmp_path: Path, toy_corpus: Callable[..., Corpus]) -> None:
    windows = open_windows(toy_corpus(np.random.default_rng(0).bytes(100_000)), "train", TOKENIZER, 16, tmp_path)
    file = tmp_path / "windows" / windows.fingerprint / "tokens.array_record"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    damaged = Windows(file.parent)
    with pytest.raises(UserError, match=r"tokens.array_record: is damaged \(.*\); try rm -r .* replaces it"):
        damaged.read(range(len(damaged)))


@pytest.mark.parametrize("at", [0, 9, 20, 24])  # the magic number, the size of the header, its keys, the dtype
def test_a_changed_header_of_the_documents_is_rebuilt(
    tmp_path: Path, toy_corpus: Callable[..., Corpus], at: int
) -> None:
    windows = open_windows(toy_corpus(*TEXTS), "train", TOKENIZER, 16, tmp_path)
    file = tmp_path / "windows" / windows.fingerprint / "documents.npy"
    content = file.read_bytes()
    for damaged in (b"", content[:at] + bytes([content[at] ^ 2]) + content[at + 1 :]):
        file.write_bytes(damaged)
        open_windows(toy_corpus(*TEXTS), "train", TOKENIZER, 16, tmp_path)
        assert file.read_bytes() == content


def test_windows_from_before_the_checksum_of_the_file_are_checked_by_that_of_the_data(
    tmp_path: Path, toy_corpus: Callable[..., Corpus]
) -> None:
    windows = open_windows(toy_corpus(*TEXTS), "train", TOKENIZER, 16, tmp_path)
    directory = tmp_path / "windows" / windows.fingerprint
    info = json.loads((directory / "windows.json").read_text())
    del info["documents_file_crc32"], info["checksum"]
    info["documents_crc32"] = zlib.crc32(np.load(directory / "documents.npy"))
    info["checksum"] = zlib.crc32(json.dumps(info, sort_keys=True).encode())
    (directory / "windows.json").write_text(json.dumps(info))
    assert len(Windows(directory)) == len(windows)
    for content in (b"", (directory / "documents.npy").read_bytes()[:-1] + b"x"):
        (directory / "documents.npy").write_bytes(content)
        with pytest.raises(windows_module.DamagedError):
            Windows(directory)


@pytest.mark.parametrize("name", ["windows.json", "documents.npy"])
def test_a_changed_byte_of_the_metadata_is_rebuilt(
    tmp_path: Path, toy_corpus: Callable[..., Corpus], name: str
) -> None:
    windows = open_windows(toy_corpus(*TEXTS), "train", TOKENIZER, 16, tmp_path)
    file = tmp_path / "windows" / windows.fingerprint / name
    content = file.read_bytes()
    at = content.index(b'"end_of_text": 256') + 15 if name == "windows.json" else len(content) - 4
    file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    again = open_windows(toy_corpus(*TEXTS), "train", TOKENIZER, 16, tmp_path)
    assert file.read_bytes() == content and again.info["end_of_text"] == 256


def test_a_full_disk_is_one_line(
    tmp_path: Path, toy_corpus: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        windows_module, "ArrayRecordWriter", lambda path, options: ArrayRecordWriter("/dev/full", options)
    )
    with pytest.raises(UserError, match=r"^data.directory = .*: No space left on device; free some") as error:
        open_windows(toy_corpus(*TEXTS), "train", TOKENIZER, 16, tmp_path)
    assert "\n" not in str(error.value) and directories(tmp_path) == []


SLOW_BUILD = """
import sys
from mot_jax.data.corpora import Corpus
from mot_jax.data.tokenizers import ByteTokenizer
from mot_jax.data.windows import open_windows

class Slow(ByteTokenizer):
    def encode(self, text):
        if text == b"stop":
            print("building", flush=True)
            sys.stdin.readline()
        return super().encode(text)

records = [{"name": b"a", "text": text} for text in (b"x" * 5000, b"stop", b"y" * 5000)]
print(len(open_windows(Corpus("toy", "train", "1", "f", records), "train", Slow(), 16, sys.argv[1])))
"""


@pytest.fixture
def slow_build() -> Iterator[Callable[[Path], subprocess.Popen[bytes]]]:
    """Starts builds in separate processes; returns when a build is half done and waits for a line of input."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    started = []

    def start(directory: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", SLOW_BUILD, str(directory)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        started.append(subprocess.Popen(command, env=environment, **pipes))
        output = started[-1].stdout
        assert output is not None and output.readline() == b"building\n"
        return started[-1]

    yield start
    for process in started:
        with process:
            process.kill()


def test_a_killed_build_leaves_no_incomplete_windows(
    tmp_path: Path, slow_build: Callable[[Path], subprocess.Popen[bytes]]
) -> None:
    killed = slow_build(tmp_path)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    (leftover,) = directories(tmp_path)
    assert leftover.endswith(".building") and socket.gethostname() in leftover
    # Of another host, whose lock this one may be granted although it is held there.
    (directory,) = tmp_path.rglob(leftover)
    other = directory.with_name(leftover.replace(socket.gethostname(), "elsewhere"))
    shutil.copytree(directory, other)
    output, _ = slow_build(tmp_path).communicate(b"\n")
    assert output == b"626\n" and other.exists()
    shutil.rmtree(other)
    (left,) = directories(tmp_path)
    assert not left.endswith(".building")


def test_a_directory_that_another_process_removes_before_it_is_locked_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that looks for leftovers may lock a new directory first, and removes it."""
    flock, calls = windows_module.fcntl.flock, []

    def remove_first(lock: int, operation: int) -> None:
        flock(lock, operation)
        calls.append(lock)
        if len(calls) == 1:
            shutil.rmtree(next(tmp_path.glob("*.building")))

    monkeypatch.setattr(windows_module.fcntl, "flock", remove_first)
    with windows_module._temporary_directory(tmp_path / "windows") as directory:
        (directory / "content").write_text("complete")
        windows_module._remove_if_dead(directory)
    assert [path.name for path in (tmp_path / "windows").iterdir()] == ["content"]
    assert len(calls) == 2


def test_two_processes_build_concurrently(
    tmp_path: Path, slow_build: Callable[[Path], subprocess.Popen[bytes]]
) -> None:
    slow = slow_build(tmp_path)
    fast = slow_build(tmp_path)
    assert fast.communicate(b"\n")[0] == b"626\n", "the fast build does not touch the directory of the slow build"
    assert slow.communicate(b"\n")[0] == b"626\n"
    assert slow.returncode == fast.returncode == 0
    (left,) = directories(tmp_path)
    info = json.loads((tmp_path / "windows" / left / "windows.json").read_text())
    assert info["windows"] == 626
