"""What a corpus holds, in lines, and tokenizers trained on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from mot_jax.data.build import summary
from mot_jax.data.corpora import Corpus
from mot_jax.data.tokenizers import Tokenizer
from mot_jax.errors import UserError
from mot_jax.runtime.paths import user_path

_DOCUMENTS = 10_000  # read to count bytes, where no build has counted them
_ENCODED_BYTES = 1 << 20
_TRAINING_BYTES = 1 << 28  # more text makes no better tokenizer, and its training takes all of it into memory


def lines(corpus: Corpus, tokenizer: Tokenizer | None = None, shown: int = 3) -> Iterator[str]:
    """Size, longest document, what the build left out, bytes per token, and how `shown` documents begin."""
    documents = len(corpus)
    yield f"{corpus.name}, {corpus.split}: {corpus.version}, fingerprint {corpus.fingerprint[:12]}"
    counts = corpus.metadata.get("counts", {}).get(corpus.split)
    about = ""
    if counts is None:
        lengths = [len(text) for text in _spread(corpus, min(documents, _DOCUMENTS))]
        about = "" if len(lengths) == documents else f", by {len(lengths):,} of them"
        counts = {"bytes": round(sum(lengths) * documents / len(lengths)), "longest": max(lengths)}
    nbytes, longest = counts["bytes"], max(counts["longest"], 1)
    yield f"{documents:,} documents, {nbytes:,} bytes{about}"
    yield (
        f"the longest document has {longest:,} bytes, {longest / max(nbytes, 1):.2%} of all: "
        f"groups of up to {nbytes // longest:,} rows can be of different documents"
    )
    yield from summary({"counts": {}, "skipped": corpus.metadata.get("skipped", {})})
    if tokenizer is not None:
        texts = list(sample(corpus, _ENCODED_BYTES))
        tokens = sum(len(tokenizer.encode(text)) for text in texts)
        size = sum(map(len, texts))
        yield f"{size / max(tokens, 1):.2f} bytes per token, by {size:,} bytes"
    for i in _places(documents, min(shown, documents)):
        ((name, text),) = corpus.read(i, i + 1)
        yield f"\n{name} ({len(text):,} bytes)"
        yield from (f"  {line}" for line in text[:300].decode(errors="replace").splitlines()[:5])


def write_tokenizer(corpus: Corpus, train: Callable[[Iterable[bytes]], bytes], output: str) -> str:
    """Writes the file that `train` makes of the corpus' texts, a sample of them if there are many; says what it did.

    Raises UserError if `output` is there already.
    """
    path = user_path("--output", output)
    if path.exists():
        raise UserError(f"--output = {output!r}: is there already, and is never overwritten; try another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    size = 0

    def texts() -> Iterator[bytes]:
        nonlocal size
        for text in sample(corpus, _TRAINING_BYTES):
            size += len(text)
            yield text

    path.write_bytes(train(texts()))
    return f"{output}: trained on {size:,} bytes of {corpus.name}"


def sample(corpus: Corpus, nbytes: int) -> Iterator[bytes]:
    """Texts of about `nbytes` in all, spread evenly over the corpus; all of them if there are fewer."""
    few = [len(text) for text in _spread(corpus, min(len(corpus), 100))]
    return _spread(corpus, max(1, min(len(corpus), nbytes * len(few) // max(sum(few), 1))))


def _spread(corpus: Corpus, count: int) -> Iterator[bytes]:
    for i in _places(len(corpus), count):
        yield from (text for _, text in corpus.read(i, i + 1))


def _places(documents: int, count: int) -> Iterator[int]:
    """`count` of the numbers below `documents`, at equal distances."""
    return (i * documents // count for i in range(count))
