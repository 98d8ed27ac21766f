"""The report on a corpus (`mot data inspect`), and training a tokenizer on it (`mot data train-tokenizer`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from mot_jax.data.build import summary_lines
from mot_jax.data.corpora import Corpus
from mot_jax.data.tokenizers import Tokenizer
from mot_jax.errors import UserError
from mot_jax.runtime.paths import replace_file, user_path

_DOCUMENTS = 10_000  # read to estimate the size, if the corpus has no counts from a build
_ENCODED_BYTES = 1 << 20
_TRAINING_BYTES = 1 << 28  # more text does not improve the tokenizer, and training holds all of it in memory


def describe_corpus(corpus: Corpus, tokenizer: Tokenizer | None = None, shown: int = 3) -> Iterator[str]:
    """Yield lines of text about a corpus: its size, longest document, skipped documents and bytes per token.

    The first lines of `shown` documents follow.
    """
    documents = len(corpus)
    yield f"{corpus.name}, {corpus.split}: {corpus.version}, fingerprint {corpus.fingerprint[:12]}"
    counts = corpus.metadata.get("counts", {}).get(corpus.split)
    estimated = ""
    if counts is None:
        lengths = [len(text) for text in _spaced_texts(corpus, min(documents, _DOCUMENTS))]
        estimated = "" if len(lengths) == documents else f", estimated from {len(lengths):,} of them"
        counts = {"bytes": round(sum(lengths) * documents / len(lengths)), "longest": max(lengths)}
    nbytes, longest = counts["bytes"], max(counts["longest"], 1)
    yield f"{documents:,} documents, {nbytes:,} bytes{estimated}"
    yield (
        f"the longest document has {longest:,} bytes, {longest / max(nbytes, 1):.2%} of the corpus: "
        f"the sequences of a group can come from different documents for group sizes up to {nbytes // longest:,}"
    )
    yield from summary_lines({"skipped": {}, **corpus.metadata, "counts": {}})
    if tokenizer is not None:
        texts = list(sample_texts(corpus, _ENCODED_BYTES))
        tokens = sum(len(tokenizer.encode(text)) for text in texts)
        size = sum(map(len, texts))
        yield f"{size / max(tokens, 1):.2f} bytes per token, measured on {size:,} bytes"
    for i in _spaced_numbers(documents, min(shown, documents)):
        ((name, text),) = corpus.read(i, i + 1)
        yield f"\n{name} ({len(text):,} bytes)"
        yield from (f"  {line}" for line in text[:300].decode(errors="replace").splitlines()[:5])


def write_tokenizer(corpus: Corpus, train: Callable[[Iterable[bytes]], bytes], output: str) -> str:
    """Train a tokenizer on the texts of a corpus, or on a sample of them if there are many, and write its file.

    Args:
        train: Function from texts to the content of the tokenizer's file.

    Returns:
        A line of text that describes the result.

    Raises:
        UserError: `output` exists.
    """
    path = user_path("--output", output)
    if path.exists():
        raise UserError(f"--output = {output!r}: exists, and is not overwritten; try another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    size = 0

    def texts() -> Iterator[bytes]:
        nonlocal size
        for text in sample_texts(corpus, _TRAINING_BYTES):
            size += len(text)
            yield text

    replace_file(path, train(texts()))
    return f"{output}: trained on {size:,} bytes of {corpus.name}"


def sample_texts(corpus: Corpus, nbytes: int) -> Iterator[bytes]:
    """Texts of about `nbytes` in total, evenly spaced over the corpus; all texts if they have fewer bytes."""
    lengths = [len(text) for text in _spaced_texts(corpus, min(len(corpus), 100))]
    return _spaced_texts(corpus, max(1, min(len(corpus), nbytes * len(lengths) // max(sum(lengths), 1))))


def _spaced_texts(corpus: Corpus, count: int) -> Iterator[bytes]:
    for i in _spaced_numbers(len(corpus), count):
        yield from (text for _, text in corpus.read(i, i + 1))


def _spaced_numbers(documents: int, count: int) -> Iterator[int]:
    """`count` evenly spaced integers below `documents`."""
    return (i * documents // count for i in range(count))
