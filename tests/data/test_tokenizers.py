"""The byte tokenizer is lossless."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mot_jax.data.tokenizers import load_tokenizer
from mot_jax.errors import UserError

TOKENIZER = load_tokenizer("bytes")


@given(st.binary())
def test_any_bytes_are_encoded_without_loss(text: bytes) -> None:
    tokens = TOKENIZER.encode(text)
    assert tokens.dtype == np.uint16
    assert TOKENIZER.decode(tokens) == text
    assert TOKENIZER.token_bytes[tokens].sum() == len(text)


def test_end_of_text_is_not_decoded() -> None:
    assert TOKENIZER.decode([256, 97, 256, 98]) == b"ab"
    assert TOKENIZER.end_of_text == 256
    assert TOKENIZER.vocab_size == 257
    assert TOKENIZER.token_bytes.dtype == np.int32
    assert TOKENIZER.token_bytes.tolist() == [1] * 256 + [0]


def test_ids_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError):
        TOKENIZER.decode([257])


def test_unknown_tokenizer() -> None:
    with pytest.raises(UserError, match=r"data.tokenizer = 'byte'.*'bytes'"):
        load_tokenizer("byte")
