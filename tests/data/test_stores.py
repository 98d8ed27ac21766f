"""Text on an object store: hosts copy it, one process makes it, and neither damage nor interruptions are used."""

from __future__ import annotations

import dataclasses
import errno
import functools
import random
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath
from object_store import ObjectStore, open_bucket

from mot_jax import cli
from mot_jax.config import Config, DataConfig, ModelConfig
from mot_jax.data import pool, stores, windows
from mot_jax.data.build import build, built_directory, spec_from_files
from mot_jax.data.corpora import open_corpus
from mot_jax.data.text import ExperimentText, open_text, store_text, text_warnings
from mot_jax.data.tokenizers import ByteTokenizer
from mot_jax.errors import RetryableError, UserError
from mot_jax.runtime import distributed
from mot_jax.training import evaluation

FILES = ("tokens.array_record", "documents.npy", "windows.json")


@pytest.fixture(scope="module")
def google() -> Iterator[tuple[epath.Path, ObjectStore]]:
    with open_bucket("gs") as (path, store):
        assert store is not None
        yield path, store


@pytest.fixture(params=["gs", "s3"])
def any_bucket(request: pytest.FixtureRequest) -> Iterator[epath.Path]:
    with open_bucket(request.param) as (path, _):
        yield path


@pytest.fixture
def on_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A function that makes this process one of a host: copies are in the directory of the user there."""

    def move(host: str) -> Path:
        monkeypatch.setenv("HOME", str(tmp_path / host))
        return tmp_path / host / ".cache/mot_jax/stores"

    return move


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("".join(f"document {i} of words\n" for i in range(200)))
    return tmp_path / "a.txt"


@pytest.fixture
def stored(google: tuple[epath.Path, ObjectStore], request: pytest.FixtureRequest, source: Path, on_host) -> epath.Path:
    """A directory on the store with the corpus `mine` and its windows, made by the host `first`."""
    directory = google[0] / request.node.name.replace("[", "-").replace("]", "")
    on_host("first")
    build(spec_from_files("mine", [str(source)], "line", validation=0.2), directory / "corpora", 1)
    store_text(config_of(directory), ByteTokenizer(), "train", "validation")
    on_host("second")
    return directory


def config_of(directory: epath.PathLike) -> Config:
    return Config(
        model=ModelConfig(context_length=16, loss_chunk=16),
        data=DataConfig(corpus=("mine",), shuffle_group_size=4, directory=str(directory)),
    )


def tokens(text: ExperimentText) -> list[np.ndarray]:
    return [split.read(range(len(split))).tokens for split in (text.train, text.validation)]


def names(directory: Path) -> set[str]:
    """The files that are not metadata of the corpus, and not locks."""
    paths = [path for path in directory.rglob("*") if path.is_file() and not path.name.endswith(".lock")]
    return {path.name for path in paths if path.suffix != ".json" or path.name == "windows.json"}


def no_work(*_: object) -> None:
    raise AssertionError("tokenized again")


def intercept(patch: pytest.MonkeyPatch, method: str, replacement: Callable[..., Any]) -> None:
    """Let transfers call replacement(method, *arguments) in place of a method of fsspec's file system."""
    filesystem_of = stores._filesystem

    class Intercepted:
        def __init__(self, filesystem: Any):
            self.filesystem = filesystem

        def __getattr__(self, name: str) -> Any:
            original = getattr(self.filesystem, name)
            return functools.partial(replacement, original) if name == method else original

    def intercepted(path: str) -> tuple[Any, str]:
        filesystem, root = filesystem_of(path)
        return Intercepted(filesystem), root

    patch.setattr(stores, "_filesystem", intercepted)


def edit(path: epath.Path, change: Callable[[bytes], bytes]) -> bytes:
    content = path.read_bytes()
    path.write_bytes(change(content))
    return content


def flip(content: bytes) -> bytes:
    at = len(content) // 2 if len(content) < 60_000 else 33_000
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def test_one_host_builds_and_uploads_and_the_others_copy(
    any_bucket: epath.Path, source: Path, tmp_path: Path, on_host, monkeypatch, capsys
) -> None:
    on_host("first")
    directory = any_bucket / "text"
    flags = [str(source), "--documents", "line", "--validation", "0.2", "--directory"]
    for place in (str(directory), str(tmp_path / "local")):
        cli.main(["data", "build", "mine", *flags, place])
    printed = capsys.readouterr().out
    assert f"corpus directory: {directory}/corpora/mine/1.0.0" in printed
    expected = open_text(config_of(tmp_path / "local"))
    first = open_text(config_of(directory))
    copies = on_host("second")
    monkeypatch.setattr(windows, "_write_windows", no_work)
    second = open_text(config_of(directory))
    for text in (first, second):
        assert text.fingerprints == expected.fingerprints
        for read, right in zip(tokens(text), tokens(expected), strict=True):
            np.testing.assert_array_equal(read, right)
    assert names(copies) == set(FILES), "the shards of the corpus are not copied"
    before = {path: path.stat().st_mtime_ns for path in copies.rglob("*") if path.name in FILES}
    open_text(config_of(directory))
    assert before == {path: path.stat().st_mtime_ns for path in copies.rglob("*") if path.name in FILES}
    cli.main(["data", "build", "mine", *flags, str(directory)])
    assert "mine exists already, built from the same files" in capsys.readouterr().out


def test_a_directory_that_was_built_locally_and_copied_to_the_store(
    google: tuple[epath.Path, ObjectStore], source: Path, tmp_path: Path, on_host, monkeypatch
) -> None:
    """As by `gcloud storage cp -r`."""
    local = tmp_path / "local"
    build(spec_from_files("mine", [str(source)], "line", validation=0.2), local / "corpora", 1)
    expected = open_text(config_of(local))
    directory = google[0] / "copied"
    for path in local.rglob("*"):
        if path.is_file():
            (directory / path.relative_to(local)).write_bytes(path.read_bytes())
    on_host("second")
    monkeypatch.setattr(windows, "_write_windows", no_work)
    text = open_text(config_of(directory))
    assert text.fingerprints == expected.fingerprints
    np.testing.assert_array_equal(tokens(text)[0], tokens(expected)[0])
    by_path = open_corpus(str(directory / "corpora/mine"), "train", tmp_path)
    assert list(by_path) == list(open_corpus("mine", "train", local))


def stored_in_parts(directory: epath.Path, source: Path, on_host, monkeypatch) -> ExperimentText:
    """The text of a corpus that a first host has built and tokenized, in many parts."""
    monkeypatch.setattr(windows, "PART_BYTES", 1000)
    monkeypatch.setattr(pool, "_cores", lambda: 1)
    on_host("first")
    build(spec_from_files("mine", [str(source)], "line", validation=0.2), directory / "corpora", 1)
    return open_text(config_of(directory))


def test_an_interrupted_copy_resumes(
    google: tuple[epath.Path, ObjectStore], source: Path, tmp_path: Path, on_host, monkeypatch
) -> None:
    directory = google[0] / "interrupted"
    whole = stored_in_parts(directory, source, on_host, monkeypatch)
    monkeypatch.setattr(windows, "_write_windows", no_work)
    monkeypatch.setattr(stores, "_CONNECTIONS", 1)
    copies, copied = on_host("second"), []

    def killed(get_file: Callable, source: str, target: str, **options: Any) -> None:
        get_file(source, target, **options)
        if source.endswith("tokens.array_record") and len(copied) > 5:
            shutil.copy(target, f"{target}.of-a-process-that-was-killed.part")
            raise KeyboardInterrupt
        copied.append(source)

    with monkeypatch.context() as patch:
        intercept(patch, "get_file", killed)
        with pytest.raises(KeyboardInterrupt):
            open_text(config_of(directory))
    assert not [path for path in copies.glob("gs/bucket/interrupted/windows/[!.]*") if path.suffix != ".copying"]
    again: list[str] = []

    def count(get_file: Callable, source: str, *arguments: Any, **options: Any) -> None:
        again.append(source)
        get_file(source, *arguments, **options)

    intercept(monkeypatch, "get_file", count)
    text = open_text(config_of(directory))
    assert len(copied) > 5 and not set(copied) & set(again), "no file is copied twice"
    for read, right in zip(tokens(text), tokens(whole), strict=True):
        np.testing.assert_array_equal(read, right)
    assert names(copies) == set(FILES)


def test_processes_of_one_host_copy_once(stored: epath.Path, monkeypatch, capfd) -> None:
    copied, barrier = [], threading.Barrier(3)

    def count(get_file: Callable, source: str, *arguments: Any, **options: Any) -> None:
        copied.append(source)
        get_file(source, *arguments, **options)

    intercept(monkeypatch, "get_file", count)

    def open_at_once(_: int) -> ExperimentText:
        barrier.wait(20)
        return open_text(config_of(stored))

    with ThreadPoolExecutor(3) as executor:
        texts = list(executor.map(open_at_once, range(3)))
    assert len(copied) == len(set(copied)) == 4 + 2 * 3
    assert len({tokens(text)[0].tobytes() for text in texts}) == 1


def test_too_little_space_is_one_line(stored: epath.Path, on_host, monkeypatch) -> None:
    copies = on_host("second")
    usage = shutil.disk_usage("/")
    with monkeypatch.context() as patch:
        patch.setattr(stores.shutil, "disk_usage", lambda path: usage._replace(free=50_000))
        with pytest.raises(
            UserError, match=r"^data.directory = gs://.*: its copy needs 0.1 MB in .*, and 0.1 MB are"
        ) as e:
            open_text(config_of(stored))
    assert f"make {copies} a link to a larger disk" in e.value.faults[0] and names(copies) == set()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        intercept(patch, "get_file", full)
        with pytest.raises(UserError, match=r"^data.directory = gs://.*, copied to .*: No space left on device; free"):
            open_text(config_of(stored))
    assert len(open_text(config_of(stored)).train) > 100


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_damaged_windows_on_a_store_are_named(stored: epath.Path, on_host, file: str, damage: str) -> None:
    copies = on_host("second")
    (path, _) = sorted(stored.glob(f"windows/*/{file}"), key=lambda path: -path.stat().length)
    content = edit(path, {"cut": lambda c: c[: len(c) // 2], "flipped": flip, "missing": lambda c: c}[damage])
    if damage == "missing":
        path.unlink()
    if (file, damage) == ("windows.json", "missing"):  # as after an interrupted upload
        open_text(config_of(stored))
        assert path.read_bytes() == content
        return
    with pytest.raises(UserError, match=rf"{path}: is ") as error:
        open_text(config_of(stored))
    (line,) = error.value.faults
    assert "\n" not in line and "; try " in line
    assert not list(copies.glob(f"gs/bucket/{stored.name}/windows/{path.parent.name}/*"))
    path.write_bytes(content)
    assert len(open_text(config_of(stored)).train) > 100


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json", "metadata.json", "contents.json", "shard"])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_damaged_corpus_on_a_store_is_named(stored: epath.Path, file: str, damage: str) -> None:
    corpus = stored / "corpora/mine/1.0.0"
    path = next(corpus.glob("*-train.array*")) if file == "shard" else corpus / file
    edit(path, lambda content: content[:50])
    if damage == "missing":
        path.unlink()
    with pytest.raises(UserError) as error:
        open_text(config_of(stored))
    (line,) = error.value.faults
    assert line.startswith(f"{path}: is damaged (")
    assert line.endswith(
        f"; try gcloud storage rm -r {corpus}, then mot data build mine FILES --directory {stored} again"
    )


def test_a_corpus_that_is_replaced_on_a_store_is_copied_again(stored: epath.Path, source: Path, on_host) -> None:
    before = list(open_corpus("mine", "train", stored))
    for path in (stored / "corpora/mine/1.0.0").iterdir():
        path.unlink()
    source.write_text(source.read_text().upper())
    build(spec_from_files("mine", [str(source)], "line", validation=0.2), stored / "corpora", 1)
    after = list(open_corpus("mine", "train", stored))
    assert {text for _, text in after} <= {
        line.encode() for line in source.read_text().splitlines()
    } and before != after


def test_an_interrupted_upload_resumes_and_others_are_refused(
    google: tuple[epath.Path, ObjectStore], source: Path, on_host, monkeypatch
) -> None:
    corpora, other = google[0] / "uploads/corpora", source.with_name("b.txt")
    other.write_text("another text\n" * 9)
    specs = [spec_from_files("mine", [str(path)], "line", validation=0.2) for path in (source, other)]
    on_host("first")
    with monkeypatch.context() as patch:

        def killed(put_file: Callable, source: str, target: str, **options: Any) -> None:
            if target.endswith("features.json"):
                raise KeyboardInterrupt
            put_file(source, target, **options)

        intercept(patch, "put_file", killed)
        with pytest.raises(KeyboardInterrupt):
            build(specs[0], corpora, 1)
    with pytest.raises(UserError, match=r"^data.corpus = 'mine': gs://.* is incomplete, its build is"):
        open_corpus("mine", "train", corpora.parent)
    on_host("second")
    with pytest.raises(UserError, match=r"is being written, or was left incomplete, by a build from other files"):
        build(specs[1], corpora, 1)
    on_host("first")
    build(specs[0], corpora, 1)
    assert len(list(open_corpus("mine", "train", corpora.parent))) > 100
    on_host("second")
    with pytest.raises(UserError, match=r"was built from other files or options"):
        build(specs[1], corpora, 1)
    assert not list((corpora / "mine/1.0.0").glob("plan"))


def test_a_store_that_refuses_or_does_not_respond(
    google: tuple[epath.Path, ObjectStore], source: Path, on_host, monkeypatch
) -> None:
    on_host("first")
    directory = google[0] / "refusing"
    build(spec_from_files("mine", [str(source)], "line", validation=0.2), directory / "corpora", 1)
    with monkeypatch.context() as patch:
        patch.setattr(windows, "_write_windows", no_work)
        patch.setattr(type(directory), "write_bytes", lambda *_: (_ for _ in ()).throw(PermissionError("Forbidden")))
        with pytest.raises(
            UserError, match=r"^data.directory = gs://.*windows.*: cannot be written to \(PermissionError"
        ):
            open_text(config_of(directory))
    store_text(config_of(directory), ByteTokenizer(), "train", "validation")
    on_host("second")
    for error, kind, words in (
        (ConnectionError("reset by peer"), RetryableError, "does not respond (ConnectionError: reset by peer)"),
        (PermissionError("Forbidden"), UserError, "refuses (PermissionError: Forbidden); try a bucket that"),
    ):
        for method in ("find", "get_file"):
            with monkeypatch.context() as patch:
                intercept(patch, method, lambda *_, e=error, **__: (_ for _ in ()).throw(e))
                with pytest.raises(kind) as raised:
                    open_text(config_of(directory))
            (line,) = raised.value.faults
            assert line.startswith("data.") and f": the store {words}" in line
    assert len(open_text(config_of(directory)).train) > 100


@pytest.mark.parametrize("moment", ["before", "during"])
def test_a_shard_that_is_replaced_while_it_is_copied_is_not_used(
    stored: epath.Path, on_host, monkeypatch, moment: str
) -> None:
    copies, corpus = on_host("second"), open_corpus("mine", "train", stored)
    (shard,) = (stored / "corpora/mine/1.0.0").glob("*-train.array*")
    content = shard.read_bytes()

    def replaced(get_file: Callable, *arguments: Any, **options: Any) -> None:
        get_file(*arguments, **options)
        shard.write_bytes(flip(content))

    with monkeypatch.context() as patch:
        if moment == "before":
            shard.write_bytes(flip(content))  # of the same size
        else:
            intercept(patch, "get_file", replaced)
        with pytest.raises(RetryableError, match=r"^data.directory = gs://.*-train.array.* has changed while it was"):
            list(corpus)
    assert names(copies) == set()
    shard.unlink()
    with pytest.raises(RetryableError, match=r"the same command reads the new one$"):
        list(corpus)
    shard.write_bytes(content)
    assert len(list(corpus)) == len(corpus) > 100


def test_a_damaged_local_copy_of_metadata_is_named(stored: epath.Path, on_host) -> None:
    copies = on_host("second")
    open_corpus("mine", "train", stored)
    (features,) = copies.rglob("features.json")
    features.write_bytes(flip(features.read_bytes()))
    with pytest.raises(UserError) as error:
        open_corpus("mine", "train", stored)
    (line,) = error.value.faults
    assert line.startswith(f"{features}: is damaged (") and f"; try rm -r {features.parent}, then this" in line
    shutil.rmtree(features.parent)
    assert len(open_corpus("mine", "train", stored)) > 100


def test_a_lossy_tokenizer_is_reported_only_where_the_shards_are(stored: epath.Path, on_host) -> None:
    class Uppercase(ByteTokenizer):
        fingerprint = "uppercase"

        def encode(self, text: bytes) -> np.ndarray:
            return super().encode(text.upper())

    copies = on_host("second")
    open_text(config_of(stored))
    assert text_warnings(config_of(stored), Uppercase()) == []
    assert names(copies) == set(FILES), "no shard is copied for a warning"
    list(open_corpus("mine", "validation", stored))
    (line,) = text_warnings(config_of(stored), Uppercase())
    assert "is lossy" in line


def test_the_advice_for_a_data_set_that_has_changed_leads_to_new_windows(
    google: tuple[epath.Path, ObjectStore], source: Path, on_host, monkeypatch
) -> None:
    """A data set that mot_jax did not build: its fingerprint depends on its version only."""
    monkeypatch.setattr(windows, "PART_BYTES", 1000)
    monkeypatch.setattr(pool, "_cores", lambda: 1)
    copies, directory = on_host("first"), google[0] / "changed"
    config = config_of(directory)
    slices = {"train_split": "train[:90%]", "validation_split": "train[90%:]"}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **slices))
    corpus = build(spec_from_files("mine", [str(source)], "line", validation=0), directory / "corpora", 1)
    edit(corpus / "dataset_info.json", lambda content: content.replace(b"Text corpus built by mot_jax", b"Words"))
    open_text(config)
    source.write_text("".join(f"{random.Random(i).getrandbits(4000):x}\n" for i in range(200)))
    other = build(spec_from_files("mine", [str(source)], "line", validation=0), source.parent / "corpora", 1)
    (shard,) = corpus.glob("*.array_record*")
    shard.write_bytes((other / shard.name).read_bytes())
    for split in slices.values():
        with pytest.raises(UserError, match=r"the data set has changed, but not its version") as error:
            open_text(config)
        advice = r"or gcloud storage rm -r (\S+) and rm -r (\S+) to tokenize it again$"
        remote, local = re.search(advice, str(error.value)).groups()
        assert Path(local) == copies / remote.replace("gs://", "gs/")
        assert list(Path(local).glob("*-of-*")) or split == "train[90%:]"
        epath.Path(remote).rmtree()
        shutil.rmtree(local)
    assert open_text(config).train.info["bytes"] > 90_000


def test_errors_of_the_local_disk_are_not_those_of_the_store(
    google: tuple[epath.Path, ObjectStore], source: Path, on_host, capsys
) -> None:
    copies = on_host("first")
    copies.parent.mkdir(parents=True)
    copies.write_text("a file where the directory of copies belongs")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["data", "build", "mine", str(source), "--directory", str(google[0] / "local-errors")])
    line = capsys.readouterr().err
    assert f"error: {copies}" in line and "the store" not in line and line.count("\n") == 1


def test_a_build_that_another_host_finishes_at_the_same_time(
    stored: epath.Path, source: Path, on_host, monkeypatch
) -> None:
    """It looks for the corpus before the other one is complete, and for the plan when it is removed."""
    looks = []

    def look(*arguments: Any) -> Any:
        looks.append(arguments)
        return built_directory(*arguments) if len(looks) > 1 else None

    monkeypatch.setattr("mot_jax.data.build.built_directory", look)
    monkeypatch.setattr("mot_jax.data.build.create_file", lambda *_: False)
    lines: list[str] = []
    spec = spec_from_files("mine", [str(source)], "line", validation=0.2)
    assert build(spec, stored / "corpora", 1, lines.append) == stored / "corpora/mine/1.0.0"
    assert "mine exists already, built from the same files" in lines


def test_the_plan_of_a_build_is_not_copied(stored: epath.Path, on_host) -> None:
    copies, plan = on_host("second"), stored / "corpora/mine/1.0.0/plan"
    before = open_corpus("mine", "train", stored)
    plan.write_text("of a build that looks whether it is complete")
    assert open_corpus("mine", "train", stored).directory == before.directory
    assert not list(copies.rglob("plan"))


def test_the_first_error_ends_the_copies_that_have_not_begun(
    google: tuple[epath.Path, ObjectStore], tmp_path: Path, monkeypatch
) -> None:
    directory, begun, timer = google[0] / "first-error", [], threading.Event()
    for i in range(20):
        (directory / f"{i:02d}").write_bytes(b"content")

    def get_file(_: Callable, source: str, *arguments: Any, **options: Any) -> None:
        begun.append(source)
        if source.endswith("00"):
            timer.wait(0.4)
        elif len(begun) > 15:
            timer.set()
        else:
            threading.Event().wait(0.005)
        raise PermissionError("Forbidden")

    monkeypatch.setattr(stores, "_CONNECTIONS", 2)
    intercept(monkeypatch, "get_file", get_file)
    with pytest.raises(UserError, match="Forbidden"):
        stored_directory = stores.StoredDirectory(directory)
        stored_directory.copy(stored_directory.files, tmp_path / "copy")
    assert len(begun) < 15


@pytest.mark.parametrize("first", [True, False])
def test_one_of_several_processes_tokenizes_for_an_evaluation(
    google: tuple[epath.Path, ObjectStore], source: Path, tmp_path: Path, on_host, monkeypatch, first: bool
) -> None:
    on_host("first")
    directory = google[0] / f"evaluation-{first}"
    build(spec_from_files("mine", [str(source)], "line", validation=0.2), directory / "corpora", 1)
    monkeypatch.setattr(distributed, "is_connected", lambda: True)
    monkeypatch.setattr(distributed, "is_first", lambda: first)

    class OpenedError(Exception):
        """The windows are opened."""

    def opened(*_: object) -> None:
        raise OpenedError

    monkeypatch.setattr(evaluation, "open_split", opened)
    with pytest.raises(OpenedError):
        evaluation.evaluate_run(tmp_path, config_of(directory), "train", None)
    assert len(list(directory.glob("windows/*/windows.json"))) == first


def test_copies_of_a_replaced_corpus_are_removed(stored: epath.Path, source: Path, on_host) -> None:
    copies = on_host("second")
    list(open_corpus("mine", "train", stored))
    (stored / "corpora/mine/1.0.0").rmtree()
    source.write_text(source.read_text().upper())
    build(spec_from_files("mine", [str(source)], "line", validation=0.2), stored / "corpora", 1)
    corpus = open_corpus("mine", "train", stored)
    assert list((copies / f"gs/bucket/{stored.name}/corpora/mine/1.0.0").glob("*[!k]")) == [Path(corpus.directory)]


def test_only_damaged_parts_are_copied_again(
    google: tuple[epath.Path, ObjectStore], source: Path, on_host, monkeypatch
) -> None:
    directory = google[0] / "damaged-parts"
    whole = stored_in_parts(directory, source, on_host, monkeypatch)
    on_host("second")
    damaged = sorted(directory.glob("windows/*/00001-of-*/documents.npy"))[0]
    content = edit(damaged, flip)
    with pytest.raises(UserError, match=f"^{damaged}: is damaged"):
        open_text(config_of(directory))
    damaged.write_bytes(content)
    copied: list[str] = []

    def count(get_file: Callable, source: str, *arguments: Any, **options: Any) -> None:
        copied.append(f"gs://{source}")
        get_file(source, *arguments, **options)

    intercept(monkeypatch, "get_file", count)
    for read, right in zip(tokens(open_text(config_of(directory))), tokens(whole), strict=True):
        np.testing.assert_array_equal(read, right)
    of_split = [path for path in copied if path.startswith(str(damaged.parent.parent))]
    assert sorted(of_split) == sorted(str(damaged.with_name(file)) for file in FILES)
