"""Building a corpus from files: its content, resuming, and refused input."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from mot_jax.data import build as module
from mot_jax.data import pool
from mot_jax.data.build import build, spec_from_files
from mot_jax.errors import UserError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """300 documents in three kinds of files, some of them equal."""
    directory = tmp_path / "source"
    directory.mkdir()
    texts = [f"document {i % 200} " + "word " * (i % 200 % 7) for i in range(300)]
    (directory / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:150]))
    (directory / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[150:290]))
    for i, text in enumerate(texts[290:]):
        (directory / f"c{i}.txt").write_text(text)
    return directory


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 2000)


def contents(path: Path) -> dict[str, list[tuple[bytes, bytes]]]:
    """The documents of each split, read with plain TFDS."""
    builder = tfds.builder_from_directory(path)
    return {
        split: [(record["name"], record["text"]) for record in builder.as_data_source(split)]
        for split in builder.info.splits
    }


def metadata(path: Path) -> dict:
    return json.loads((path / "metadata.json").read_text())


def test_plain_tfds_reads_every_document_once(source: Path, tmp_path: Path, small_pieces: None) -> None:
    logged: list[str] = []
    path = build(spec_from_files("mine", [str(source)], validation=0.2), tmp_path, 1, logged.append)
    assert path == tmp_path / "mine" / "1.0.0"
    assert sorted(p.suffix for p in path.iterdir() if "array_record" not in p.name) == [".json"] * 4
    splits = contents(path)
    assert len(splits["train"] + splits["validation"]) == 300
    assert [name for name, _ in splits["train"] if name.endswith(b".txt")] == sorted(
        name for name, _ in splits["train"] if name.endswith(b".txt")
    )
    texts = {split: {text for _, text in records} for split, records in splits.items()}
    assert not texts["train"] & texts["validation"], "equal documents are in the same split"
    assert 20 < len(texts["validation"]) < 60
    info = tfds.builder_from_directory(path).info
    assert info.splits["train"].num_shards > 3 and info.full_name == "mine/1.0.0"
    assert info.splits["train"].num_examples == len(splits["train"])
    assert tfds.builder("mine", data_dir=tmp_path).info.full_name == "mine/1.0.0"

    counts = metadata(path)["counts"]["train"]
    lengths = [len(text) for _, text in splits["train"]]
    assert counts == {"documents": len(lengths), "bytes": sum(lengths), "longest": max(lengths)}
    assert logged[-1] == f"corpus directory: {path}"
    assert logged[-3].startswith(f"train: {len(lengths)} documents, {sum(lengths):,} bytes, the longest {max(lengths)}")


def test_an_interrupted_build_resumes(
    source: Path, tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_from_files("mine", [str(source)], validation=0.2)
    expected = metadata(build(spec, tmp_path / "at_once", 1))
    write, written = module._write_piece, []

    def failing(directory: Path, piece: module.BuildPiece, advance: pool.Advance) -> None:
        if len(written) == 2:
            (directory / "mine-train.array_record-00002-of-00008").write_bytes(b"half a shard")
            raise RuntimeError("stop")
        written.append(piece.number)
        write(directory, piece, advance)

    monkeypatch.setattr(module, "_write_piece", failing)
    with pytest.raises(RuntimeError, match="stop"):
        build(spec, tmp_path / "twice", 1)
    assert not (tmp_path / "twice/mine/1.0.0").exists()
    monkeypatch.setattr(module, "_write_piece", lambda *args: (written.append(args[1].number), write(*args)))
    logged: list[str] = []
    path = build(spec, tmp_path / "twice", 1, logged.append)
    assert sorted(written) == list(range(len(written))) and len(written) > 4, "every piece once"
    assert metadata(path) == expected and contents(path) == contents(tmp_path / "at_once/mine/1.0.0")
    assert logged[0] == f"mine: 2 of {len(written)} pieces were finished by an earlier build"


def test_pieces_of_another_spec_are_not_used(source: Path, tmp_path: Path, small_pieces: None) -> None:
    spec = spec_from_files("mine", [str(source)])
    building = tmp_path / "corpora/mine/1.0.0.building"
    building.mkdir(parents=True)
    (building / "plan").write_text("another")
    (building / "piece-00000.json").write_text("{}")
    path = build(spec, tmp_path / "corpora", 1)
    assert metadata(path)["counts"] == metadata(build(spec, tmp_path / "other", 1))["counts"]


def test_a_corpus_is_not_replaced_by_one_from_other_files(source: Path, tmp_path: Path) -> None:
    path = build(spec_from_files("mine", [str(source)]), tmp_path, 1)
    before = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    logged: list[str] = []
    assert build(spec_from_files("mine", [str(source)]), tmp_path, 1, logged.append) == path
    assert logged[0].startswith("mine exists already, built from the same files")
    for spec in (
        spec_from_files("mine", [str(source / "a.jsonl")]),
        spec_from_files("mine", [str(source)], validation=0.5),
        spec_from_files("mine", [str(source)], "line"),
    ):
        with pytest.raises(UserError, match=r"NAME = 'mine': .* was built from other files or options"):
            build(spec, tmp_path, 1)
    (source / "c0.txt").write_text("changed")
    with pytest.raises(UserError, match="was built from other files"):
        build(spec_from_files("mine", [str(source)]), tmp_path, 1)
    assert before == {file: file.stat().st_mtime_ns for file in path.iterdir()}


def test_skipped_documents_are_counted_in_log_and_metadata(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/a.jsonl").write_bytes(b'{"text": "good"}\nno json\n{"title": "x"}\n{"text": "caf\xe9"}\n')
    (tmp_path / "source/empty.txt").touch()
    (tmp_path / "source/picture.png").write_bytes(b"\x89PNG")
    logged: list[str] = []
    path = build(spec_from_files("mine", [str(tmp_path / "source")]), tmp_path, 1, logged.append)
    counted = {"other_files": 1, "not_json": 1, "no_feature": 1, "empty": 1, "damaged_utf8": 1}
    assert metadata(path)["skipped"] == counted
    assert logged[-9:-1] == [
        "1 files of other types skipped",
        "1 lines skipped that are not valid JSON",
        "1 lines or rows skipped that have no text in the field --text-feature",
        "1 empty documents skipped",
        "1 documents with invalid UTF-8, replaced by U+FFFD",
        "no documents in empty.txt: empty",
        "no documents in picture.png: another type by its suffix; try it as an argument of its own",
        "no document was assigned to validation; try a larger --validation and another name",
    ]
    assert list(metadata(path)["counts"]) == ["train"], "a split without documents is omitted"
    assert not list(path.glob("*validation*"))


def test_no_documents_and_unwritable_directories_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"title": "x"}\n' * 3)
    with pytest.raises(
        UserError,
        match=r"^NAME = 'mine': no document in the files; a.jsonl: no field 'text'; it has 'title' \(string\); "
        r"try --text-feature title$",
    ):
        build(spec_from_files("mine", [str(tmp_path / "a.jsonl")]), tmp_path, 1)
    (tmp_path / "b.jsonl").touch()
    (tmp_path / "full").write_text("a file, not a directory")
    with pytest.raises(UserError, match=r"data.directory = .*full: cannot be written \(Not a directory\)"):
        build(spec_from_files("mine", [str(tmp_path / "a.jsonl")]), tmp_path / "full/corpora", 1)
    with pytest.raises(UserError, match=r"the files; b.jsonl: empty$"):
        build(spec_from_files("mine", [str(tmp_path / "b.jsonl")]), tmp_path, 1)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == [".lock"]


@pytest.mark.parametrize("damage", ["empty marker", "cut shard", "no shard"])
def test_a_piece_damaged_by_a_power_loss_is_written_again(
    source: Path, tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    spec = spec_from_files("mine", [str(source)], validation=0.2)
    expected = contents(build(spec, tmp_path / "at_once", 1))

    def fail(*_: object) -> None:
        raise RuntimeError("stop")

    monkeypatch.setattr(module, "_combined_reports", fail)
    with pytest.raises(RuntimeError, match="stop"):
        build(spec, tmp_path / "twice", 1)
    monkeypatch.undo()
    monkeypatch.setattr(module, "PIECE_BYTES", 2000)
    building = tmp_path / "twice/mine/1.0.0.building"
    (shard,) = building.glob("mine-train.array_record-00001-of-*")
    if damage == "empty marker":
        (building / "piece-00001.json").write_bytes(b"")
    elif damage == "cut shard":
        os.truncate(shard, 100)
    else:
        shard.unlink()
    logged: list[str] = []
    assert contents(build(spec, tmp_path / "twice", 1, logged.append)) == expected
    pieces = len(list((tmp_path / "twice/mine/1.0.0").glob("*train*")))
    assert logged[0] == f"mine: {pieces - 1} of {pieces} pieces were finished by an earlier build"


def test_a_full_disk_is_one_line_and_the_build_resumes(source: Path, tmp_path: Path, small_pieces: None) -> None:
    spec = spec_from_files("mine", [str(source)], validation=0.2)
    expected = contents(build(spec, tmp_path / "at_once", 1))
    pieces = len(list((tmp_path / "at_once/mine/1.0.0").glob("*train*")))
    building = tmp_path / "full/mine/1.0.0.building"
    building.mkdir(parents=True)
    (building / "plan").write_text(spec.identity())
    shard = building / f"mine-train.array_record-00002-of-{pieces:05d}"
    shard.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"^data.directory = .*: No space left on device; free some, and") as error:
        build(spec, tmp_path / "full", 1)
    assert "\n" not in str(error.value)
    shard.unlink()
    logged: list[str] = []
    assert contents(build(spec, tmp_path / "full", 1, logged.append)) == expected
    assert logged[0] == f"mine: 2 of {pieces} pieces were finished by an earlier build"


@pytest.mark.parametrize("locks", [True, False])
@pytest.mark.parametrize("same", [True, False])
def test_two_builds_at_once_never_mix(
    source: Path, tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch, locks: bool, same: bool
) -> None:
    """With locks the second build waits for the first; without, the first to finish wins."""
    specs = [spec_from_files("mine", [str(source)], validation=share) for share in (0.2, 0.2 if same else 0.5)]
    expected = [contents(build(spec, tmp_path / f"alone{i}", 1)) for i, spec in enumerate(specs)]
    if not locks:
        monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "no locks")))
    started, waiting, write = threading.Event(), threading.Event(), module._write_piece
    slow = threading.local()

    def write_slowly(directory: Path, piece: module.BuildPiece, advance: pool.Advance) -> None:
        if getattr(slow, "first", False) and piece.number == 1:
            started.set()
            assert waiting.wait(20)
        write(directory, piece, advance)

    monkeypatch.setattr(module, "_write_piece", write_slowly)

    def first() -> object:
        slow.first = True
        return outcome(specs[0], lambda line: None)

    def second() -> object:
        assert started.wait(20)
        result = outcome(specs[1], lambda line: waiting.set() if line.startswith("waiting for another") else None)
        waiting.set()
        return result

    def outcome(spec: module.CorpusSpec, log: Callable[[str], None]) -> object:
        try:
            return build(spec, tmp_path / "both", 1, log)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(2) as executor:
        outcomes = [future.result(30) for future in [executor.submit(first), executor.submit(second)]]
    path = tmp_path / "both/mine/1.0.0"
    winner = 0 if locks else 1
    assert contents(path) == expected[winner]
    assert outcomes[winner] == path
    assert outcomes[1 - winner] == path if same else "was built from other files" in str(outcomes[1 - winner])
    assert not list(path.parent.glob("*building*"))


@pytest.mark.parametrize(
    ("name", "validation", "message"),
    [
        ("My-Texts", 0.1, r"NAME = 'My-Texts': must consist of lowercase letters.*try my_texts"),
        ("python_source", 0.1, "not be python_source; try mine"),
        ("a/b", 0.1, "NAME = 'a/b'.*try ab"),
        ("mine", 1.0, "--validation = 1: must be at least 0 and below 1; try 0.01"),
    ],
)
def test_invalid_names_and_validation_shares_are_refused(name: str, validation: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        spec_from_files(name, [], validation=validation)


def test_building_does_not_import_jax() -> None:
    code = "import sys, mot_jax.data.build; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


_BUILD = """
import sys
from pathlib import Path
from mot_jax.data import build

if __name__ == "__main__":
    build.PIECE_BYTES = 4000
    spec = build.spec_from_files("mine", [sys.argv[1]], validation=0.2)
    build.build(spec, Path(sys.argv[2]), int(sys.argv[3]), print)
"""


@pytest.mark.slow
def test_the_result_does_not_depend_on_processes_or_interruptions(source: Path, tmp_path: Path) -> None:
    texts = [f"document {i} " * (1 + i % 50) for i in range(4000)]
    (source / "many.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "run.py").write_text(_BUILD)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}

    def start(directory: str, workers: int) -> subprocess.Popen:
        command = [sys.executable, "-W", "error", str(tmp_path / "run.py"), str(source), str(tmp_path / directory)]
        with open(tmp_path / f"{directory}.log", "wb") as log:
            return subprocess.Popen([*command, str(workers)], stdout=log, stderr=log, env=environment)

    first = start("killed", 2)
    building = tmp_path / "killed/mine/1.0.0.building"
    deadline = time.monotonic() + 120
    while not list(building.glob("piece-*.json")) and time.monotonic() < deadline:
        time.sleep(0.002)
    tasks = Path(f"/proc/{first.pid}/task")
    children = [pid for task in tasks.iterdir() for pid in (task / "children").read_text().split()]
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert building.exists(), "the build finished before it was killed"
    while any(_alive(pid) for pid in children):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.01)

    second, uninterrupted = start("killed", 2), start("uninterrupted", 1)
    assert second.wait(timeout=120) == uninterrupted.wait(timeout=120) == 0
    assert "pieces were finished by an earlier build" in (tmp_path / "killed.log").read_text()
    killed, whole = tmp_path / "killed/mine/1.0.0", tmp_path / "uninterrupted/mine/1.0.0"
    assert {p.name: p.read_bytes() for p in killed.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


def _alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
