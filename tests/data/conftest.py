"""Fixtures of the tests of the data package."""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tensorflow_datasets as tfds

from mot_jax.data.corpora import Corpus


@pytest.fixture(scope="session")
def data_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory for the whole session, so that the standard library is prepared once."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def toy_corpus() -> Callable[..., Corpus]:
    """A function that makes a corpus in memory from texts."""

    def make(*texts: bytes, name: str = "toy", split: str = "train") -> Corpus:
        records = [{"name": f"{i}.txt".encode(), "text": text} for i, text in enumerate(texts)]
        return Corpus(name, split, "1", hashlib.sha256(repr(texts).encode()).hexdigest(), records)

    return make


class Articles(tfds.core.GeneratorBasedBuilder):
    """A data set prepared by TFDS: two configs, other features next to the text, no names."""

    VERSION = tfds.core.Version("2.1.0")
    BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name="en"), tfds.core.BuilderConfig(name="de")]

    def _info(self) -> tfds.core.DatasetInfo:
        label = tfds.features.ClassLabel(num_classes=2)
        features = {"text": tfds.features.Text(), "body": tfds.features.Text(), "label": label}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {"train": self._generate_examples(20), "test": self._generate_examples(3)}

    def _generate_examples(self, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        for i in range(count):
            yield i, {"text": f"text {i} ä", "body": f"body {i}", "label": i % 2}


@pytest.fixture(scope="session")
def tfds_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TFDS's data directory: `articles/en:2.1.0`, and `lines/en:2.1.0`, prepared as tfrecord."""
    directory = tmp_path_factory.mktemp("tensorflow_datasets")
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        Articles(config="en", data_dir=directory, file_format="array_record").download_and_prepare()
    path = shutil.copytree(directory / "articles", directory / "lines") / "en/2.1.0/dataset_info.json"
    path.write_text(path.read_text().replace("array_record", "tfrecord"))
    return directory
