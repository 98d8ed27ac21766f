"""Opening corpora: by every kind of name, any split and feature, and every way in which there is none."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest

from mot_jax.data.build import build, plan_files
from mot_jax.data.corpora import open_corpus
from mot_jax.errors import UserError


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the corpus `mine`, built."""
    directory = tmp_path_factory.mktemp("directory")
    (directory / "a.jsonl").write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(50)))
    build(plan_files("mine", [str(directory / "a.jsonl")], validation=0.2), directory / "corpora", 1)
    return directory


@pytest.fixture(autouse=True)
def tfds_data_dir(tfds_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_directory))


def fault(*arguments: object, **feature: str) -> str:
    with pytest.raises(UserError) as error:
        open_corpus(*arguments, **feature)  # type: ignore[arg-type]
    (line,) = error.value.faults
    assert "\n" not in line
    return line


def test_a_corpus_that_was_built_by_name_and_by_path(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_data_set_that_tfds_prepared(directory: Path, tfds_directory: Path) -> None:
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


def test_a_corpus_can_be_sent_to_another_process(directory: Path) -> None:
    mine = open_corpus("mine", "train", directory)
    assert list(pickle.loads(pickle.dumps(mine))) == list(mine)


def test_unknown_names(directory: Path, tfds_directory: Path) -> None:
    assert fault("python_source/stdlb", "train", directory).endswith("did you mean 'python_source/stdlib'?")
    assert fault("mime", "train", directory) == "data.corpus = 'mime': no such corpus; did you mean 'mine'?"
    assert fault("wikipedai", "train", directory).endswith("did you mean 'wikipedia'?")
    assert fault("zzz", "train", directory).endswith(
        "there is python_source/stdlib, python_source/site_packages, mine, articles/en, lines/en"
    )
    assert fault("articles", "train", directory).endswith("'articles': needs a config; there is articles/en")
    assert fault("mine:3.0.0", "train", directory).endswith("no such version; there is mine")
    assert "no prepared data set" in fault("/nowhere", "train", directory)


@pytest.mark.parametrize("name", ["c4/en", "lm1b", "wikipedia/20230601.en:1.0.0", "pg19", "wiki40b/en"])
def test_a_public_data_set_that_is_not_prepared(name: str, directory: Path, tfds_directory: Path) -> None:
    line = fault(name, "train", directory)
    assert f"'{name}': is not prepared in {directory}/corpora or {tfds_directory}; on a machine with TensorFlow" in line
    command = f"tfds build {name.partition(':')[0]} --file_format=array_record --data_dir={directory}/corpora"
    extra = name.partition("/")[0]
    package = f"'tensorflow-datasets[{extra}]'" if extra in ("c4", "wikipedia") else "tensorflow-datasets"
    assert f"try pip install tensorflow {package}" in line and line.endswith(command)


@pytest.mark.parametrize("name", ["c4", "wikipedia", "para_crawl"])
def test_a_public_data_set_of_several_configs_is_not_built_whole(name: str, directory: Path) -> None:
    assert fault(name, "train", directory) == (
        f"data.corpus = {name!r}: needs a config, such as {name}/NAME; try one of "
        f"https://www.tensorflow.org/datasets/catalog/{name}"
    )


def test_unknown_splits(directory: Path) -> None:
    assert fault("articles/en", "tran", directory) == (
        "--split = 'tran': articles/en has no such split, but train (20 documents), test (3 documents); "
        "did you mean 'train'?"
    )
    assert "did you mean 'test'" in fault("articles/en", "train+tets[:50%]", directory)
    assert "--split = 'train[:x%]': " in fault("articles/en", "train[:x%]", directory)
    assert "there is no document in it" in fault("articles/en", "train[:1%]", directory)


def test_unknown_features(directory: Path) -> None:
    assert fault("articles/en", "train", directory, feature="bodi") == (
        "data.text_feature = 'bodi': no such feature of articles/en; did you mean 'body'?"
    )
    assert fault("articles/en", "train", directory, feature="label") == (
        "data.text_feature = 'label': is not text; there is body, text"
    )


def test_a_format_without_random_access(directory: Path, tfds_directory: Path) -> None:
    path = tfds_directory / "lines/en/2.1.0"
    assert fault("lines/en", "train", directory) == (
        "data.corpus = 'lines/en': is prepared as tfrecord, without random access; where TensorFlow is installed, try "
        f"tfds convert_format --dataset_version_dir={path} --out_file_format=array_record"
    )


def test_a_data_set_converted_in_place_is_read(directory: Path, tfds_directory: Path, tmp_path: Path) -> None:
    """`tfds convert_format` without --out_dir puts the new shards beside the old, and says so in the metadata."""
    info = shutil.copytree(tfds_directory / "lines", tmp_path / "lines") / "en/2.1.0/dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"alternativeFileFormats": ["array_record"]}))
    assert len(open_corpus(str(info.parent), "train", directory)) == 20


def test_damaged_data_sets_and_buckets(directory: Path, tfds_directory: Path, tmp_path: Path) -> None:
    info = shutil.copytree(tfds_directory / "articles", tmp_path / "broken") / "en/2.1.0/dataset_info.json"
    info.write_text("{")
    assert "cannot be read" in fault(str(info.parent), "train", directory)
    assert "reads local files and gs:// alone" in fault("s3://bucket/mine", "train", directory)
