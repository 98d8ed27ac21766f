"""Opening corpora: by every kind of name, any split and feature, and the errors for those that do not exist."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mot_jax.data.build import build, spec_from_files
from mot_jax.data.corpora import open_corpus, shared_documents
from mot_jax.data.tokenizers import ByteTokenizer
from mot_jax.data.windows import open_windows
from mot_jax.errors import UserError


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with the corpus `mine`."""
    directory = tmp_path_factory.mktemp("directory")
    (directory / "a.jsonl").write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(50)))
    build(spec_from_files("mine", [str(directory / "a.jsonl")], validation=0.2), directory / "corpora", 1)
    return directory


@pytest.fixture(autouse=True)
def tfds_data_dir(tfds_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_directory))


def error_line(*arguments: object, **feature: str) -> str:
    with pytest.raises(UserError) as error:
        open_corpus(*arguments, **feature)  # type: ignore[arg-type]
    (line,) = error.value.faults
    assert "\n" not in line
    return line


def test_a_built_corpus_by_name_and_by_path(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(directory))
    mine = open_corpus("mine", "train", directory)
    texts = dict(mine)
    assert len(texts) == len(mine) == mine.metadata["counts"]["train"]["documents"]
    assert texts["a.jsonl@0"] == b"line 0"
    assert list(mine.read(3, 6)) == list(mine)[3:6]
    assert (mine.name, mine.split, mine.version) == ("mine", "train", "mine/1.0.0")
    path = directory / "corpora/mine"
    for name in ("mine:1.0.0", str(path), f"{path}/1.0.0", f"{path}:1.0.0", "~/corpora/mine/"):
        assert open_corpus(name, "train", directory).fingerprint == mine.fingerprint == mine.metadata["fingerprint"]


def test_a_data_set_prepared_by_tfds(directory: Path, tfds_directory: Path) -> None:
    train = open_corpus("articles/en", "train", directory)
    assert train.version == "articles/en/2.1.0"
    assert sorted(text.decode() for _, text in train) == sorted(f"text {i} ä" for i in range(20))
    assert [name for name, _ in train][:2] == ["train/0", "train/1"]
    by_path = open_corpus(str(tfds_directory / "articles/en/2.1.0"), "train", directory)
    assert by_path.fingerprint == train.fingerprint == open_corpus("articles/en:2.1.0", "test", directory).fingerprint

    body = open_corpus("articles/en", "train", directory, feature="body")
    assert {text[:5] for _, text in body} == {b"body "} and body.fingerprint != train.fingerprint


def test_parts_of_splits(directory: Path) -> None:
    parts = [open_corpus("articles/en", split, directory) for split in ("train[:90%]", "train[90%:]", "train+test")]
    assert list(map(len, parts)) == [18, 2, 23]
    assert [text for part in parts[:2] for _, text in part] == [text for _, text in parts[2]][:20]


def test_a_corpus_can_be_pickled(directory: Path) -> None:
    mine = open_corpus("mine", "train", directory)
    assert list(pickle.loads(pickle.dumps(mine))) == list(mine)


def test_unknown_names(directory: Path, tfds_directory: Path) -> None:
    assert error_line("python_source/stdlb", "train", directory).endswith("did you mean 'python_source/stdlib'?")
    assert error_line("mime", "train", directory) == "data.corpus = 'mime': no such corpus; did you mean 'mine'?"
    assert error_line("zzz", "train", directory) == (
        "data.corpus = 'zzz': no such corpus; there is python_source/stdlib, python_source/site_packages, mine, "
        "articles/en, lines/en; to add 'zzz' from the catalog at https://www.tensorflow.org/datasets, on a machine "
        f"with TensorFlow try tfds build zzz --file_format=array_record --data_dir={directory}/corpora"
    )
    assert error_line("articles", "train", directory).endswith("'articles': needs a config; there is articles/en")
    assert error_line("mine:3.0.0", "train", directory).endswith("no such version; there is mine")
    assert "no prepared data set" in error_line("/nowhere", "train", directory)


@pytest.mark.parametrize("name", ["c4/en", "lm1b", "wikipedia/20230601.en:1.0.0"])
def test_a_public_data_set_that_is_not_prepared(name: str, directory: Path) -> None:
    path = name.partition(":")[0]
    assert error_line(name, "train", directory).endswith(
        f"on a machine with TensorFlow try tfds build {path} --file_format=array_record --data_dir={directory}/corpora"
    )


def test_an_unknown_name_imports_no_tensorflow(tmp_path: Path) -> None:
    code = f"""
import sys
from mot_jax.data.corpora import open_corpus, shared_documents
from mot_jax.data.tokenizers import ByteTokenizer
from mot_jax.data.windows import open_windows
from mot_jax.errors import UserError
try:
    open_corpus("c4/en", "train", {str(tmp_path)!r})
except UserError:
    sys.exit("tensorflow" in sys.modules or "tensorflow_datasets.text" in sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=environment)


def test_unknown_splits(directory: Path) -> None:
    assert error_line("articles/en", "tran", directory) == (
        "--split = 'tran': articles/en has no such split; it has train (20 documents), test (3 documents); "
        "did you mean 'train'?"
    )
    assert "did you mean 'test'" in error_line("articles/en", "train+tets[:50%]", directory)
    assert "--split = 'train[:x%]': " in error_line("articles/en", "train[:x%]", directory)
    assert "has no documents" in error_line("articles/en", "train[:1%]", directory)


def test_unknown_features(directory: Path) -> None:
    assert error_line("articles/en", "train", directory, feature="bodi") == (
        "data.text_feature = 'bodi': no such feature of articles/en; did you mean 'body'?"
    )
    assert error_line("articles/en", "train", directory, feature="label") == (
        "data.text_feature = 'label': is not text; there is body, text"
    )


def test_a_format_without_random_access(directory: Path, tfds_directory: Path) -> None:
    path = tfds_directory / "lines/en/2.1.0"
    assert error_line("lines/en", "train", directory) == (
        "data.corpus = 'lines/en': is prepared as tfrecord, which has no random access; on a machine with "
        f"TensorFlow try tfds convert_format --dataset_version_dir={path} --out_file_format=array_record"
    )


def test_a_data_set_converted_in_place_is_read(directory: Path, tfds_directory: Path, tmp_path: Path) -> None:
    """Without --out_dir, `tfds convert_format` adds new shards to the directory and records this in the metadata."""
    info = shutil.copytree(tfds_directory / "lines", tmp_path / "lines") / "en/2.1.0/dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"alternativeFileFormats": ["array_record"]}))
    assert len(open_corpus(str(info.parent), "train", directory)) == 20


@pytest.mark.parametrize("format_version", ["jsonl", 2])
def test_metadata_of_other_programs_is_not_read(
    directory: Path, tfds_directory: Path, tmp_path: Path, format_version: object
) -> None:
    articles = shutil.copytree(tfds_directory / "articles/en/2.1.0", tmp_path / "corpora/theirs/1.0.0")
    expected = open_corpus("articles/en", "train", directory)
    foreign = {"format": format_version, "fingerprint": 1, "counts": "20"}
    (articles / "metadata.json").write_text(json.dumps(foreign))
    for name in ("theirs", str(articles)):
        corpus = open_corpus(name, "train", tmp_path)
        assert list(corpus) == list(expected) and corpus.fingerprint == expected.fingerprint and not corpus.metadata
    with pytest.raises(UserError, match=r"1.0.0 exists, and mot data build did not write it; try another name"):
        build(spec_from_files("theirs", [str(directory / "a.jsonl")]), tmp_path / "corpora", 1)


def test_damaged_data_sets_and_buckets(directory: Path, tfds_directory: Path, tmp_path: Path) -> None:
    info = shutil.copytree(tfds_directory / "articles", tmp_path / "broken") / "en/2.1.0/dataset_info.json"
    info.write_text("{")
    assert "cannot be read" in error_line(str(info.parent), "train", directory)
    assert "must be local, gs:// or s3://" in error_line("hdfs://bucket/mine", "train", directory)


METADATA = ("dataset_info.json", "features.json", "metadata.json", "contents.json")
SHARD = "mine-train.array_record-00000-of-00001"


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *itertools.product([*METADATA, SHARD], ["empty", "cut", "missing"]),
        *((name, "changed") for name in METADATA[:3]),
    ],
)
def test_a_damaged_file_of_a_corpus_is_named(directory: Path, tmp_path: Path, name: str, damage: str) -> None:
    corpus = shutil.copytree(directory / "corpora/mine", tmp_path / "corpora/mine") / "1.0.0"
    if damage == "missing":
        (corpus / name).unlink()
    elif damage == "changed":
        (corpus / name).write_text((corpus / name).read_text() + " ")
    else:
        os.truncate(corpus / name, 0 if damage == "empty" else 50)
    line = error_line("mine", "train", tmp_path)
    assert line.startswith(f"{corpus / name}: is damaged (")
    assert line.endswith(f"; try rm -r {corpus}, then mot data build mine FILES again")
    with pytest.raises(UserError, match="is damaged"):
        build(spec_from_files("mine", [str(directory / "a.jsonl")], validation=0.2), tmp_path / "corpora", 1)


def test_a_flipped_bit_in_a_corpus_is_named(directory: Path, tmp_path: Path) -> None:
    corpus = shutil.copytree(directory / "corpora/mine", tmp_path / "corpora/mine") / "1.0.0"
    (shard,) = corpus.glob("mine-train.array_record-*")
    content = bytearray(shard.read_bytes())
    content[content.index(b"line 3") if b"line 3" in content else 200] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=rf"{shard.name}: is damaged .*; try rm -r .* mot data build mine"):
        list(open_corpus("mine", "train", tmp_path))


@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "empty", "longer"])
def test_a_damaged_file_of_a_data_set_of_tfds_is_named(
    directory: Path, tfds_directory: Path, tmp_path: Path, damage: str
):
    """No advice is to delete it: this package cannot prepare it again."""
    articles = shutil.copytree(tfds_directory / "articles/en/2.1.0", tmp_path / "corpora/articles/en/2.1.0")
    (shard,) = articles.glob("*-train.*")
    content = shard.read_bytes()
    damaged = {"cut": content[: len(content) // 2], "empty": b"", "longer": content + bytes(65536)}
    shard.write_bytes(damaged.get(damage, content.replace(content[300:301], bytes([content[300] ^ 1]))))
    if damage == "missing":
        shard.unlink()
    with pytest.raises(UserError) as error:
        open_windows("articles/en", "train", ByteTokenizer(), 8, tmp_path)
    (line,) = error.value.faults
    assert "\n" not in line and line.startswith(f"{shard}: is damaged (document ") and "rm -r" not in line
    assert "; try another copy of it, or tfds build --overwrite" in line
    assert not any((tmp_path / "windows").iterdir())
    shard.write_bytes(content)
    assert len(open_windows("articles/en", "train", ByteTokenizer(), 8, tmp_path)) > 10


def test_a_data_set_that_changes_after_it_was_tokenized_is_named(tfds_directory: Path, tmp_path: Path) -> None:
    """Its version and counts, from which its fingerprint is computed, may be the same."""
    articles = shutil.copytree(tfds_directory / "articles/en/2.1.0", tmp_path / "corpora/articles/en/2.1.0")
    fingerprint = open_windows("articles/en", "train", ByteTokenizer(), 8, tmp_path).fingerprint
    (shard,) = articles.glob("*-train.*")
    size = shard.stat().st_size
    with open(shard, "ab") as file:
        file.write(bytes(7))
    with pytest.raises(UserError, match=rf"^data.corpus = 'articles/en': {shard.name} has {size + 7:,} bytes, and had"):
        open_windows("articles/en", "train", ByteTokenizer(), 8, tmp_path)
    shard.unlink()  # after tokenizing, only the metadata is read
    assert open_windows("articles/en", "train", ByteTokenizer(), 8, tmp_path).fingerprint == fingerprint
    info = articles / "dataset_info.json"
    info.write_text(info.read_text().replace('"numBytes": "', '"numBytes": "1'))
    assert open_corpus("articles/en", "train", tmp_path).fingerprint != fingerprint


def test_the_documents_that_two_splits_share(directory: Path) -> None:
    def shared(*splits: str) -> int:
        return shared_documents("articles/en", splits, directory)

    assert shared("train", "train") == 20
    assert shared("train", "train[90%:]") == 2
    assert shared("train[:50%]+test", "train[25%:75%]") == 5
    assert shared("train[:90%]", "train[90%:]") == shared("train", "test") == 0
