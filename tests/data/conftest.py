"""Shared by the tests of the data package."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from mot_jax.data.corpora import Corpus


@pytest.fixture(scope="session")
def data_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for the whole session, so that the standard library is prepared once."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def toy_corpus() -> Callable[..., Corpus]:
    """Makes a corpus in memory out of texts."""

    def make(*texts: bytes, name: str = "toy", split: str = "train") -> Corpus:
        records = [{"name": f"{i}.txt".encode(), "text": text} for i, text in enumerate(texts)]
        return Corpus(name, split, "1", hashlib.sha256(repr(texts).encode()).hexdigest(), records)

    return make
