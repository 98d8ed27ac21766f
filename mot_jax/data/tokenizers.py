"""Tokenizers: text as bytes to token ids and back."""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, Protocol, TypeVar

import numpy as np
import sentencepiece
import tokenizers

from mot_jax.errors import UserError, error_words, nearest
from mot_jax.runtime.paths import user_path

# What the end of a text, and the mask, are called in published tokenizers: the first that there is.
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "[SEP]")
_MASK = ("[MASK]", "<mask>", "<|mask|>")
_BATCH = 2**20  # bytes or characters that are encoded together: the libraries take a hundred bytes for each
_NOWHERE = "(?!)"
_LINE = 1000  # characters: SentencePiece trains on lines of up to 4192 bytes


class Tokenizer(Protocol):
    """What windows, evaluation and generation need.

    vocab_size: V. end_of_text: the id that stands between documents. mask_token: that of masked language models; V
    itself where the vocabulary has none.
    token_bytes: int32 [V], the bytes of text that each token stands for, to give a loss in bits per byte.
    fingerprint: changes whenever any text would be encoded differently.
    """

    vocab_size: int
    end_of_text: int
    mask_token: int
    token_bytes: np.ndarray
    fingerprint: str

    def encode(self, text: bytes) -> np.ndarray:
        """The tokens of `text`: uint16 or int32 [n], without end_of_text."""

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """The same for each of several texts, in less time."""

    def decode(self, ids: Iterable[int]) -> bytes:
        """The text of `ids`; end_of_text stands for nothing."""


class ByteTokenizer:
    """One token a byte, and `end_of_text` = 256. Any bytes survive encoding and decoding."""

    vocab_size = 257
    end_of_text = 256
    mask_token = 257
    token_bytes = np.array([1] * 256 + [0], np.int32)
    fingerprint = "bytes/1"

    def encode(self, text: bytes) -> np.ndarray:
        """`text` -> uint16 [len(text)]."""
        return np.frombuffer(text, np.uint8).astype(np.uint16)

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> bytes:
        """Token ids below 257 -> bytes; end_of_text is left out. Raises ValueError for any other id."""
        return bytes(i for i in map(int, ids) if i != self.end_of_text)


def load_tokenizer(name: str) -> Tokenizer:
    """`bytes`, or the tokenizer in a file: a `tokenizer.json` of the tokenizers library, or a SentencePiece `.model`.

    Raises UserError if there is none, or if its file is not what its name says.
    """
    if name == "bytes":
        return ByteTokenizer()
    kinds = {".json": _TokenizersFile, ".model": _SentencePieceFile}
    suffix = PurePosixPath(name).suffix
    if suffix not in kinds:
        found = nearest(name, ["bytes", "a path to a tokenizer.json", "a path to a SentencePiece .model"])
        raise UserError(f"data.tokenizer = {name!r}: no such tokenizer{found}")
    try:
        content = user_path("data.tokenizer", name).read_bytes()
    except OSError as error:
        words = error.strerror or error_words(error)
        raise UserError(f"data.tokenizer = {name!r}: cannot be read ({words}); try 'bytes'") from None
    try:
        tokenizer = kinds[suffix](content)
    except Exception as error:  # either library raises what it likes
        rule = {".json": "a tokenizer.json of the tokenizers library", ".model": "a SentencePiece model"}[suffix]
        words = error_words(error)
        raise UserError(f"data.tokenizer = {name!r}: must be {rule} ({words}); try 'bytes'") from None
    if tokenizer.end_of_text < 0:
        raise UserError(f"data.tokenizer = {name!r}: has no token for the end of a text; {tokenizer.adding}")
    return tokenizer


class _Subwords:
    """A tokenizer of a library: its text is str, and bytes that are not UTF-8 become U+FFFD.

    Texts are encoded without any special token, in pieces: none is long, and none holds the name of a special token,
    which the libraries might take for the token itself.
    """

    kind: str
    adding: str  # how to add an end of text
    vocab_size: int
    end_of_text: int
    mask_token: int
    token_bytes: np.ndarray

    def __init__(self, content: bytes):
        self._content = content
        self.fingerprint = f"{self.kind}/1/{hashlib.sha256(content).hexdigest()}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), self._content)

    def _find_specials(self, ids: dict[str, int], others: Iterable[str] = ()) -> None:
        """Finds the special tokens in the vocabulary `ids`. `others` are the names of more of them."""
        self.end_of_text = next((ids[name] for name in _END_OF_TEXT if name in ids), -1)
        self.mask_token = next((ids[name] for name in _MASK if name in ids), self.vocab_size)
        names = sorted({name for name in (*_END_OF_TEXT, *_MASK) if name in ids} | set(others))
        self.token_bytes[[ids[name] for name in names]] = 0
        # Matches the first letter of such a name.
        self._inside = re.compile("|".join(f"{re.escape(n[0])}(?={re.escape(n[1:])})" for n in names) or _NOWHERE)

    def encode(self, text: bytes) -> np.ndarray:
        """The tokens of `text`: int32 [n]."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        pieces = [list(_cut(text.decode(errors="replace"), self._inside)) for text in texts]
        ids = itertools.chain.from_iterable(
            [np.array(i, np.int32) for i in self._encode(batch)]
            for batch in batches(itertools.chain.from_iterable(pieces), _BATCH)
        )
        none = np.zeros(0, np.int32)
        return [np.concatenate([none, *itertools.islice(ids, len(of_text))]) for of_text in pieces]

    def _encode(self, pieces: list[str]) -> list[list[int]]:
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> bytes:
        raise NotImplementedError


@functools.lru_cache(maxsize=2)
def _again(kind: type[_Subwords], content: bytes) -> _Subwords:
    """A pickled tokenizer: a process that gets it with each of its tasks makes it once."""
    return kind(content)


class _TokenizersFile(_Subwords):
    kind = "tokenizers"
    adding = "try tokenizer.add_special_tokens(['<|endoftext|>']) of the tokenizers library, and save it again"

    def __init__(self, content: bytes):
        super().__init__(content)
        self._library = tokenizers.Tokenizer.from_buffer(content)
        self._library.no_truncation()
        self._library.no_padding()
        ids = self._library.get_vocab(with_added_tokens=True)
        added = self._library.get_added_tokens_decoder()
        self.vocab_size = max(ids.values(), default=-1) + 1
        self.token_bytes = np.zeros(self.vocab_size, np.int32)
        size_of = _sizes(json.loads(self._library.to_str()))
        for token, i in ids.items():
            self.token_bytes[i] = size_of(token)
        for i, new in added.items():  # spelt as in the text
            self.token_bytes[i] = len(new.content.encode())
        self._find_specials(ids, (token.content for token in added.values() if token.special))

    def _encode(self, pieces: list[str]) -> list[list[int]]:
        return [found.ids for found in self._library.encode_batch_fast(pieces, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> bytes:
        return self._library.decode([*map(int, ids)], skip_special_tokens=True).encode()


class _SentencePieceFile(_Subwords):
    kind = "sentencepiece"
    adding = "try training it again with eos_id = 1 and eos_piece = '<|endoftext|>'"

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
        self._find_specials({piece: i for i, piece in enumerate(pieces)})
        if library.eos_id() >= 0:
            self.end_of_text = library.eos_id()

    def _encode(self, pieces: list[str]) -> list[list[int]]:
        return self._library.encode(pieces, out_type=int, num_threads=1)

    def decode(self, ids: Iterable[int]) -> bytes:
        return self._library.decode([*map(int, ids)]).encode()


def _sizes(file: dict[str, Any]) -> Callable[[str], int]:
    """How many bytes of text a token of a tokenizer.json stands for, by its spelling; an unknown one counts as 1."""
    model = file["model"]
    around = json.dumps([file.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")], ensure_ascii=False)
    # Each byte of the text is one character of this alphabet.
    letters = frozenset(tokenizers.pre_tokenizers.ByteLevel.alphabet() if '"ByteLevel"' in around else ())
    space = "▁" if "▁" in around else " "
    prefix, suffix = (model.get(part) or "" for part in ("continuing_subword_prefix", "end_of_word_suffix"))
    unknown = model.get("unk_token")
    if model.get("unk_id") is not None:
        unknown = model["vocab"][model["unk_id"]][0]

    def size(token: str) -> int:
        if token == unknown or (model.get("byte_fallback") and re.fullmatch(r"<0x[0-9A-F]{2}>", token)):
            return 1
        ends_word = bool(suffix) and token.endswith(suffix)  # which stands for the space that follows
        token = token.removeprefix(prefix).removesuffix(suffix).replace(space, " ")
        return ends_word + sum(1 if letter in letters else len(letter.encode()) for letter in token)

    return size


T = TypeVar("T", str, bytes)


def batches(texts: Iterable[T], size: int) -> Iterator[list[T]]:
    """Neighbouring texts, as many as are needed for `size` characters or bytes in all."""
    batch: list[T] = []
    held = 0
    for text in texts:
        batch.append(text)
        held += len(text)
        if held >= size:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _cut(text: str, inside: re.Pattern[str], longest: int = _BATCH) -> Iterator[str]:
    """`text` in pieces of up to `longest` characters, cut before white space if there is any, and at all `inside`."""
    start = 0
    for stop in (*(match.end() for match in inside.finditer(text)), len(text)):
        while stop - start > longest:
            space = max(text.rfind("\n", start + 1, start + longest), text.rfind(" ", start + 1, start + longest))
            middle = space if space > 0 else start + longest
            yield text[start:middle]
            start = middle
        if start < stop:
            yield text[start:stop]
            start = stop


def check_suffix(output: str, kind: str) -> None:
    """Raises UserError if a tokenizer of that kind could not be opened under the name `output`."""
    suffix, path = {"bpe": ".json", "sentencepiece": ".model"}[kind], PurePosixPath(output)
    if path.suffix != suffix:
        good = f"{path.with_suffix(suffix)}" if path.name else f"tokenizer{suffix}"
        raise UserError(f"--output = {output!r}: must end in {suffix} for a tokenizer of kind {kind}; try {good!r}")


def train_tokenizer(texts: Iterable[bytes], vocab_size: int, kind: str = "bpe") -> bytes:
    """The content of a new tokenizer's file, with `<|endoftext|>`; any text in UTF-8 survives it.

    kind: `bpe`, byte-level, for a `tokenizer.json`; `sentencepiece`, unigram with byte fallback, for a `.model`.
    vocab_size: V, or less if the texts are few. Texts are read once. Raises UserError for a V that is too small.
    """
    kinds = {"bpe": _train_bpe, "sentencepiece": _train_sentencepiece}
    if kind not in kinds:
        raise UserError(f"kind = {kind!r}: no such kind of tokenizer{nearest(kind, kinds)}")
    if vocab_size < 257:
        raise UserError(f"vocab_size = {vocab_size}: must be at least 257, every byte and an end of text; try 32000")
    nowhere = re.compile(_NOWHERE)
    pieces = itertools.chain.from_iterable(_cut(text.decode(errors="replace"), nowhere) for text in texts)
    return kinds[kind](pieces, vocab_size)


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
            input_sentence_size=10**6,  # a sample of the lines, so that memory does not grow with the text
            unk_id=0,
            eos_id=1,
            eos_piece=_END_OF_TEXT[0],
            bos_id=-1,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        words = re.sub(r".*\] *|\. Increase.*", "", error_words(error)) or "the text is empty"
        raise UserError(f"vocab_size = {vocab_size}: SentencePiece refuses it ({words}); try 32000") from None
    return model.getvalue()
