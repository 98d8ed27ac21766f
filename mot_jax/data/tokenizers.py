"""Tokenizers: text as bytes to token ids and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from mot_jax.config import ConfigError, nearest


class Tokenizer(Protocol):
    """What windows, evaluation and generation need.

    vocab_size: V. end_of_text: the id that stands between documents.
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

    def decode(self, ids: Iterable[int]) -> bytes:
        """Token ids below 257 -> bytes; end_of_text is left out. Raises ValueError for any other id."""
        return bytes(i for i in map(int, ids) if i != self.end_of_text)


_TOKENIZERS = {"bytes": ByteTokenizer}


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of that name. Raises ConfigError if there is none."""
    if name not in _TOKENIZERS:
        raise ConfigError(f"data.tokenizer = {name!r}: no such tokenizer{nearest(name, _TOKENIZERS)}")
    return _TOKENIZERS[name]()
