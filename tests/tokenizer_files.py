"""Files of tokenizers of several kinds, trained on a small text, that differ in how they decode."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from mot_jax.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer, train_tokenizer

TEXT = [f"def f(x):\n    return x + {i}  # größer, ein Satz, 漢字\n".encode() * 3 for i in range(40)]
EOT = "<|endoftext|>"


def sentence_pieces(**changes) -> bytes:
    model = io.BytesIO()
    options = {"vocab_size": 90, "hard_vocab_limit": False, "minloglevel": 2, "eos_piece": EOT, "model_type": "bpe"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(t.decode() for t in TEXT), model_writer=model, **options | changes
    )
    return model.getvalue()


def library(model, trainer, **parts) -> bytes:
    """A tokenizer.json of the tokenizers library, trained on the texts."""
    tokenizer = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator((t.decode() for t in TEXT), trainer)
    return tokenizer.to_str().encode()


def word_pieces() -> bytes:
    """Words and their continuations, `##ing`; lower case; tokens are joined by spaces."""
    special = ["[UNK]", "[SEP]", "[MASK]"]
    return library(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False),
        normalizer=normalizers.BertNormalizer(),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(),
    )


def metaspace() -> bytes:
    """Unigram with spaces as `▁`, one of them in front of the text."""
    return library(
        models.Unigram(),
        trainers.UnigramTrainer(vocab_size=150, special_tokens=[EOT, "<unk>"], unk_token="<unk>", show_progress=False),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
    )


def byte_fallback() -> bytes:
    """As Llama's: a space in front of the text, and byte tokens for characters that are not in the vocabulary."""
    parts = {
        "normalizer": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        "decoder": decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ),
    }
    special = [EOT, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False, limit_alphabet=40)
    file = json.loads(library(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True), trainer, **parts))
    file["added_tokens"] = file["added_tokens"][:2]  # bytes are tokens of the vocabulary, not special
    return json.dumps(file).encode()


def word_ends() -> bytes:
    """BPE with `</w>` at the end of each word, which the decoder replaces by a space unless it is the last token."""
    return library(
        models.BPE(unk_token="<unk>"),
        trainers.BpeTrainer(
            vocab_size=200, special_tokens=[EOT, "<unk>"], end_of_word_suffix="</w>", show_progress=False
        ),
        pre_tokenizer=pre_tokenizers.WhitespaceSplit(),
        decoder=decoders.BPEDecoder(),
    )


FILES = {
    "bpe.json": lambda: train_tokenizer(TEXT, 300),
    "unigram.model": lambda: train_tokenizer(TEXT, 360, "sentencepiece"),
    "pieces.model": sentence_pieces,
    "pieces_bytes.model": lambda: sentence_pieces(vocab_size=340, byte_fallback=True, character_coverage=0.98),
    "suffix.model": lambda: sentence_pieces(treat_whitespace_as_suffix=True),
    "words.json": word_pieces,
    "metaspace.json": metaspace,
    "byte_fallback.json": byte_fallback,
    "word_ends.json": word_ends,
}


@functools.cache
def tokenizer_of(name: str, directory: Path) -> Tokenizer:
    """Load the tokenizer of FILES, from a file in `directory`; `bytes` is that of bytes."""
    if name == "bytes":
        return ByteTokenizer()
    (directory / name).write_bytes(FILES[name]())
    return load_tokenizer(str(directory / name))
