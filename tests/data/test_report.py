"""What is told of a corpus, and tokenizers trained on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from mot_jax.data import report
from mot_jax.data.build import build, plan_files
from mot_jax.data.corpora import Corpus, open_corpus
from mot_jax.data.tokenizers import load_tokenizer
from mot_jax.errors import UserError


def test_a_corpus_that_was_built(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_text("first line\nsecond\n" + "x" * 10 * i)
    (tmp_path / "empty.txt").touch()
    build(plan_files("mine", [str(tmp_path / "*.txt")], validation=0), tmp_path / "corpora", 1)
    corpus = open_corpus("mine", "train", tmp_path)
    lines = list(report.lines(corpus, load_tokenizer("bytes"), 2))
    nbytes = 20 * 18 + 10 * sum(range(20))
    assert lines[:5] == [
        f"mine, train: mine/1.0.0, fingerprint {corpus.fingerprint[:12]}",
        f"20 documents, {nbytes:,} bytes",
        f"the longest document has 208 bytes, {208 / nbytes:.2%} of all: "
        f"groups of up to {nbytes // 208} rows can be of different documents",
        "1 empty documents left out",
        f"1.00 bytes per token, by {nbytes:,} bytes",
    ]
    start = ["  first line", "  second"]
    assert lines[5:] == ["\n00.txt (18 bytes)", *start, "\n10.txt (118 bytes)", *start, "  " + "x" * 100]


def test_a_corpus_that_nobody_counted(toy_corpus: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = toy_corpus(*[b"x" * (i % 10 + 1) for i in range(1000)])
    assert list(report.lines(corpus))[1] == "1,000 documents, 5,500 bytes"
    monkeypatch.setattr(report, "_DOCUMENTS", 100)
    assert list(report.lines(corpus))[1].endswith("bytes, by 100 of them")


def test_samples_are_spread_evenly(toy_corpus: Callable[..., Corpus]) -> None:
    corpus = toy_corpus(*[b"%05d" % i for i in range(1000)])
    found = [int(text) for text in report.sample(corpus, 50)]
    assert found == list(range(0, 1000, 100))
    assert len(list(report.sample(corpus, 10**9))) == 1000


def test_a_tokenizer_is_never_overwritten(toy_corpus: Callable[..., Corpus], tmp_path: Path) -> None:
    def train(texts: Iterable[bytes]) -> bytes:
        return b"|".join(texts)

    output = tmp_path / "new" / "tokenizer.json"
    said = report.write_tokenizer(toy_corpus(b"one", b"two"), train, str(output))
    assert said == f"{output}: trained on 6 bytes of toy" and output.read_bytes() == b"one|two"
    with pytest.raises(UserError, match=r"--output = .* is there already, and is never overwritten"):
        report.write_tokenizer(toy_corpus(b"three"), train, str(output))
    assert output.read_bytes() == b"one|two"
