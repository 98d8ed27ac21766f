"""Reports on corpora, and tokenizers trained on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from mot_jax.data import report
from mot_jax.data.build import build, spec_from_files
from mot_jax.data.corpora import Corpus, open_corpus
from mot_jax.data.tokenizers import load_tokenizer
from mot_jax.errors import UserError


def test_a_built_corpus(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_text("first line\nsecond\n" + "x" * 10 * i)
    (tmp_path / "empty.txt").touch()
    build(spec_from_files("mine", [str(tmp_path / "*.txt")], validation=0), tmp_path / "corpora", 1)
    corpus = open_corpus("mine", "train", tmp_path)
    lines = list(report.describe_corpus(corpus, load_tokenizer("bytes"), 2))
    nbytes = 20 * 18 + 10 * sum(range(20))
    assert lines[:6] == [
        f"mine, train: mine/1.0.0, fingerprint {corpus.fingerprint[:12]}",
        f"20 documents, {nbytes:,} bytes",
        f"the longest document has 208 bytes, {208 / nbytes:.2%} of the corpus: "
        f"the sequences of a group can come from different documents for group sizes up to {nbytes // 208}",
        "1 empty documents skipped",
        "no documents in empty.txt: empty",
        f"1.00 bytes per token, measured on {nbytes:,} bytes",
    ]
    start = ["  first line", "  second"]
    assert lines[6:] == ["\n00.txt (18 bytes)", *start, "\n10.txt (118 bytes)", *start, "  " + "x" * 100]


def test_a_corpus_without_counts(toy_corpus: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = toy_corpus(*[b"x" * (i % 10 + 1) for i in range(1000)])
    assert list(report.describe_corpus(corpus))[1] == "1,000 documents, 5,500 bytes"
    monkeypatch.setattr(report, "_DOCUMENTS", 100)
    assert list(report.describe_corpus(corpus))[1].endswith("bytes, estimated from 100 of them")


def test_samples_are_spread_evenly(toy_corpus: Callable[..., Corpus]) -> None:
    corpus = toy_corpus(*[b"%05d" % i for i in range(1000)])
    numbers = [int(text) for text in report.sample_texts(corpus, 50)]
    assert numbers == list(range(0, 1000, 100))
    assert len(list(report.sample_texts(corpus, 10**9))) == 1000


def test_a_tokenizer_is_never_overwritten(toy_corpus: Callable[..., Corpus], tmp_path: Path) -> None:
    def train(texts: Iterable[bytes]) -> bytes:
        return b"|".join(texts)

    output = tmp_path / "new" / "tokenizer.json"
    line = report.write_tokenizer(toy_corpus(b"one", b"two"), train, str(output))
    assert line == f"{output}: trained on 6 bytes of toy" and output.read_bytes() == b"one|two"
    with pytest.raises(UserError, match=r"--output = .* exists, and is not overwritten"):
        report.write_tokenizer(toy_corpus(b"three"), train, str(output))
    assert output.read_bytes() == b"one|two"
