"""Tokenizers (bytes, tokenizer.json, SentencePiece models): text as bytes to token ids and back; and their training."""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, Protocol, TypeVar

import numpy as np
import sentencepiece
import tokenizers
from etils import epath

from mot_jax.errors import UserError, error_words, nearest
from mot_jax.runtime.paths import user_path

# Names of the end-of-text and mask tokens in published tokenizers; the first name in the vocabulary is used.
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "[SEP]")
_MASK = ("[MASK]", "<mask>", "<|mask|>")
COPIES = ("tokenizer.json", "tokenizer.model")  # file names of a tokenizer's copy in a workdir or an export
_BATCH = 2**20  # bytes or characters encoded in one call: the libraries need about 100 bytes of memory for each
_NO_MATCH = "(?!)"
_LINE = 1000  # characters: SentencePiece trains on lines of up to 4192 bytes


class Tokenizer(Protocol):
    """The interface of a tokenizer.

    Attributes:
        vocab_size: V.
        end_of_text: The id of the token between documents.
        mask_token: The id of the mask of masked language models; V if the vocabulary has none.
        token_bytes: int32 [V], the number of bytes of text of each token, for losses in bits per byte.
        fingerprint: Changes whenever the encoding of any text changes.
        content: Of the tokenizer's file; None without one.
        byte_token: The id of the token of byte 0xFF, which is in no character, if the decoder replaces a whole run of
            such tokens at once when the run is not UTF-8; else None.
    """

    vocab_size: int
    end_of_text: int
    mask_token: int
    token_bytes: np.ndarray
    fingerprint: str
    content: bytes | None
    byte_token: int | None

    def encode(self, text: bytes) -> np.ndarray:
        """The tokens of `text`: uint16 or int32 [n], without end_of_text."""

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """The tokens of each of several texts; faster than one call of `encode` for each."""

    def decode(self, ids: Iterable[int]) -> bytes:
        """The text of `ids`; end_of_text is omitted."""


class ByteTokenizer:
    """One token per byte, and `end_of_text` = 256. Lossless for any bytes."""

    vocab_size = 257
    end_of_text = 256
    mask_token = 257
    token_bytes = np.array([1] * 256 + [0], np.int32)
    fingerprint = "bytes/1"
    content: bytes | None = None
    byte_token: int | None = None

    def encode(self, text: bytes) -> np.ndarray:
        """The tokens of `text`: uint16 [len(text)]."""
        return np.frombuffer(text, np.uint8).astype(np.uint16)

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes of token ids below 257, without end_of_text. Raises ValueError for any other id."""
        return bytes(i for i in map(int, ids) if i != self.end_of_text)


def load_tokenizer(name: str) -> Tokenizer:
    """Load `bytes`, or a tokenizer's file: a `tokenizer.json` of the tokenizers library, or a SentencePiece `.model`.

    Raises:
        UserError: The file does not exist, is not a tokenizer of the kind of its suffix, or has no end-of-text token.
    """
    if name == "bytes":
        return ByteTokenizer()
    kinds = {".json": _TokenizersFile, ".model": _SentencePieceFile}
    suffix = PurePosixPath(name).suffix
    if suffix not in kinds:
        suggestion = nearest(name, ["bytes", "a path to a tokenizer.json", "a path to a SentencePiece .model"])
        raise UserError(f"data.tokenizer = {name!r}: no such tokenizer{suggestion}")
    try:
        content = user_path("data.tokenizer", name).read_bytes()
    except OSError as error:
        words = error.strerror or error_words(error)
        raise UserError(f"data.tokenizer = {name!r}: cannot be read ({words}); try 'bytes'") from None
    try:
        tokenizer = kinds[suffix](content)
    except Exception as error:  # the libraries raise various types
        rule = {".json": "a tokenizer.json of the tokenizers library", ".model": "a SentencePiece model"}[suffix]
        words = error_words(error)
        raise UserError(f"data.tokenizer = {name!r}: must be {rule} ({words}); try 'bytes'") from None
    if tokenizer.end_of_text < 0:
        raise UserError(f"data.tokenizer = {name!r}: has no end-of-text token; {tokenizer.end_of_text_advice}")
    return tokenizer


def tokenizer_copy(folder: epath.Path, name: str) -> epath.Path | None:
    """The path in `folder` of a copy of the tokenizer called `name`; None if it is that of bytes, without a file."""
    copy = f"tokenizer{PurePosixPath(name).suffix}"
    return folder / copy if copy in COPIES else None


class _SubwordTokenizer:
    """A tokenizer of a library that processes str: bytes that are not UTF-8 become U+FFFD.

    Texts are encoded without special tokens, in pieces of bounded length. Pieces are split inside the names of special
    tokens, which the libraries might otherwise encode as the tokens themselves.
    """

    kind: str
    end_of_text_advice: str  # advice for a tokenizer without that token
    vocab_size: int
    end_of_text: int
    mask_token: int
    token_bytes: np.ndarray
    byte_token: int | None = None

    def __init__(self, content: bytes):
        self.content: bytes | None = content
        self.fingerprint = f"{self.kind}/1/{hashlib.sha256(content).hexdigest()}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _load_once, (type(self), self.content)

    def _set_special_tokens(self, ids: dict[str, int], others: Iterable[str] = ()) -> None:
        """Set the special tokens from the vocabulary `ids`. `others` are the names of additional ones."""
        self.end_of_text = next((ids[name] for name in _END_OF_TEXT if name in ids), -1)
        self.mask_token = next((ids[name] for name in _MASK if name in ids), self.vocab_size)
        names = sorted({name for name in (*_END_OF_TEXT, *_MASK) if name in ids} | set(others))
        self.token_bytes[[ids[name] for name in names]] = 0
        # Matches the first letter of the name of a special token.
        self._in_special_name = re.compile(
            "|".join(f"{re.escape(n[0])}(?={re.escape(n[1:])})" for n in names) or _NO_MATCH
        )

    def encode(self, text: bytes) -> np.ndarray:
        """The tokens of `text`: int32 [n]."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        pieces = [list(_split_text(text.decode(errors="replace"), self._in_special_name)) for text in texts]
        ids = itertools.chain.from_iterable(
            [np.array(i, np.int32) for i in self._encode(batch)]
            for batch in batch_by_size(itertools.chain.from_iterable(pieces), _BATCH)
        )
        empty = np.zeros(0, np.int32)
        return [np.concatenate([empty, *itertools.islice(ids, len(of_text))]) for of_text in pieces]

    def _encode(self, pieces: list[str]) -> list[list[int]]:
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> bytes:
        raise NotImplementedError


@functools.lru_cache(maxsize=2)
def _load_once(kind: type[_SubwordTokenizer], content: bytes) -> _SubwordTokenizer:
    """Load a pickled tokenizer; cached, since a worker process receives it with each of its tasks."""
    return kind(content)


class _TokenizersFile(_SubwordTokenizer):
    kind = "tokenizers"
    end_of_text_advice = (
        "try tokenizer.add_special_tokens(['<|endoftext|>']) of the tokenizers library, and save it again"
    )

    def __init__(self, content: bytes):
        super().__init__(content)
        self._library = tokenizers.Tokenizer.from_buffer(content)
        self._library.no_truncation()
        self._library.no_padding()
        ids = self._library.get_vocab(with_added_tokens=True)
        added = self._library.get_added_tokens_decoder()
        self.vocab_size = max(ids.values(), default=-1) + 1
        self.token_bytes = np.zeros(self.vocab_size, np.int32)
        file = json.loads(self._library.to_str())
        if '"ByteFallback"' in json.dumps(file["decoder"]):
            self.byte_token = ids.get("<0xFF>")
        size_of = _size_by_spelling(file)
        for token, i in ids.items():
            self.token_bytes[i] = size_of(token)
        for i, added_token in added.items():  # these are spelled as in the text
            self.token_bytes[i] = len(added_token.content.encode())
        self._set_special_tokens(ids, (token.content for token in added.values() if token.special))

    def _encode(self, pieces: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._library.encode_batch_fast(pieces, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> bytes:
        return self._library.decode([*map(int, ids)], skip_special_tokens=True).encode()


class _SentencePieceFile(_SubwordTokenizer):
    kind = "sentencepiece"
    end_of_text_advice = "try training it again with eos_id = 1 and eos_piece = '<|endoftext|>'"

    def __init__(self, content: bytes):
        super().__init__(content)
        if not content:
            raise ValueError("the file is empty")
        library = self._library = sentencepiece.SentencePieceProcessor(model_proto=content)
        self.vocab_size = library.vocab_size()
        pieces = [library.id_to_piece(i) for i in range(self.vocab_size)]
        self.token_bytes = np.array([len(piece.replace("▁", " ").encode()) for piece in pieces], np.int32)
        for i in range(self.vocab_size):
            if library.is_byte(i) or library.is_unknown(i):
                self.token_bytes[i] = 1
            elif library.is_control(i) or library.is_unused(i):
                self.token_bytes[i] = 0
        self._set_special_tokens({piece: i for i, piece in enumerate(pieces)})
        if library.eos_id() >= 0:
            self.end_of_text = library.eos_id()

    def _encode(self, pieces: list[str]) -> list[list[int]]:
        return self._library.encode(pieces, out_type=int, num_threads=1)

    def decode(self, ids: Iterable[int]) -> bytes:
        return self._library.decode([*map(int, ids)]).encode()


def _size_by_spelling(file: dict[str, Any]) -> Callable[[str], int]:
    """Make a function from a token's spelling in a tokenizer.json to its bytes of text; 1 for an unknown token."""
    model = file["model"]
    steps = json.dumps([file.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")], ensure_ascii=False)
    # In a byte-level vocabulary, each character of this alphabet is one byte of text.
    letters = frozenset(tokenizers.pre_tokenizers.ByteLevel.alphabet() if '"ByteLevel"' in steps else ())
    space = "▁" if "▁" in steps else " "
    prefix, suffix = (model.get(part) or "" for part in ("continuing_subword_prefix", "end_of_word_suffix"))
    unknown = model.get("unk_token")
    if model.get("unk_id") is not None:
        unknown = model["vocab"][model["unk_id"]][0]

    def size(token: str) -> int:
        if token == unknown or (model.get("byte_fallback") and re.fullmatch(r"<0x[0-9A-F]{2}>", token)):
            return 1
        ends_word = bool(suffix) and token.endswith(suffix)  # represents the following space
        token = token.removeprefix(prefix).removesuffix(suffix).replace(space, " ")
        return ends_word + sum(1 if letter in letters else len(letter.encode()) for letter in token)

    return size


T = TypeVar("T", str, bytes)


def batch_by_size(texts: Iterable[T], size: int) -> Iterator[list[T]]:
    """Group consecutive texts into lists of at least `size` characters or bytes in total; the last may have fewer."""
    batch: list[T] = []
    size_of_batch = 0
    for text in texts:
        batch.append(text)
        size_of_batch += len(text)
        if size_of_batch >= size:
            yield batch
            batch, size_of_batch = [], 0
    if batch:
        yield batch


def _split_text(text: str, inside: re.Pattern[str], longest: int = _BATCH) -> Iterator[str]:
    """Split `text` after each match of `inside` and into pieces of at most `longest` characters, before white space."""
    start = 0
    for stop in (*(match.end() for match in inside.finditer(text)), len(text)):
        while stop - start > longest:
            space = max(text.rfind("\n", start + 1, start + longest), text.rfind(" ", start + 1, start + longest))
            end = space if space > 0 else start + longest
            yield text[start:end]
            start = end
        if start < stop:
            yield text[start:stop]
            start = stop


def check_suffix(output: str, kind: str) -> None:
    """Raise UserError if a tokenizer of that kind could not be loaded from a file named `output`."""
    suffix, path = {"bpe": ".json", "sentencepiece": ".model"}[kind], PurePosixPath(output)
    if path.suffix != suffix:
        suggestion = f"{path.with_suffix(suffix)}" if path.name else f"tokenizer{suffix}"
        raise UserError(
            f"--output = {output!r}: must end in {suffix} for a tokenizer of kind {kind}; try {suggestion!r}"
        )


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)


def train_tokenizer(
    texts: Iterable[bytes], vocab_size: int, kind: str = "bpe", warn: Callable[[str], None] = _warn
) -> bytes:
    """Train a tokenizer with the end-of-text token `<|endoftext|>`, lossless for any UTF-8 text.

    Args:
        texts: Read once.
        vocab_size: V; the result has fewer tokens if there is little text.
        kind: `bpe`, byte-level, for a `tokenizer.json`; `sentencepiece`, unigram with byte fallback, for a `.model`.
        warn: Called with a line if the result has fewer tokens than `vocab_size`.

    Returns:
        The content of the tokenizer's file.

    Raises:
        UserError: vocab_size is too small, or the kind is unknown.
    """
    kinds = {"bpe": _train_bpe, "sentencepiece": _train_sentencepiece}
    if kind not in kinds:
        raise UserError(f"kind = {kind!r}: no such kind of tokenizer{nearest(kind, kinds)}")
    if vocab_size < 257:
        raise UserError(
            f"vocab_size = {vocab_size}: must be at least 257, for every byte and the end-of-text token; try 32000"
        )
    no_match = re.compile(_NO_MATCH)
    pieces = itertools.chain.from_iterable(_split_text(text.decode(errors="replace"), no_match) for text in texts)
    content = kinds[kind](pieces, vocab_size)
    size = {"bpe": _TokenizersFile, "sentencepiece": _SentencePieceFile}[kind](content).vocab_size
    if size < vocab_size:
        warn(f"vocab_size = {vocab_size}: the tokenizer has {size}, all that the text gives; try more text or {size}")
    return content


def _train_bpe(pieces: Iterator[str], vocab_size: int) -> bytes:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_END_OF_TEXT[0]],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces, trainer)
    return tokenizer.to_str().encode()


def _train_sentencepiece(pieces: Iterator[str], vocab_size: int) -> bytes:
    lines = (line[i : i + _LINE] for piece in pieces for line in piece.split("\n") for i in range(0, len(line), _LINE))
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(0)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            input_sentence_size=10**6,  # trains on a sample of the lines, which bounds the memory
            unk_id=0,
            eos_id=1,
            eos_piece=_END_OF_TEXT[0],
            bos_id=-1,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        words = re.sub(r".*\] *|\. Increase.*", "", error_words(error)) or "the text is empty"
        raise UserError(f"vocab_size = {vocab_size}: SentencePiece cannot train it ({words}); try 32000") from None
    return model.getvalue()
