"""Tokenizers from files: each counts the bytes of text correctly, for any text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_files import EOT, FILES, TEXT, library, tokenizer_of

from mot_jax.data.tokenizers import Tokenizer, load_tokenizer, train_tokenizer
from mot_jax.errors import UserError

NAMES = ("bpe.json", "unigram.model", "pieces.model", "words.json")
LOSSLESS = ("bpe.json", "unigram.model")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Tokenizer]:
    directory: Path = tmp_path_factory.mktemp("tokenizers")
    return {name: tokenizer_of(name, directory) for name in NAMES}


@pytest.mark.parametrize("name", LOSSLESS)
@given(text=st.text())
def test_trained_tokenizers_are_lossless_and_count_every_byte(files, name, text):
    tokenizer, given_bytes = files[name], text.encode(errors="replace")
    ids = tokenizer.encode(given_bytes)
    assert tokenizer.decode(ids) == given_bytes
    assert tokenizer.token_bytes[ids].sum() == len(given_bytes)
    assert tokenizer.end_of_text not in ids


@pytest.mark.parametrize("name", NAMES)
def test_text_is_fewer_tokens_and_ids_are_in_the_vocabulary(files, name):
    tokenizer = files[name]
    for text, ids in zip(TEXT, tokenizer.encode_batch(TEXT), strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
        assert 0 < len(ids) < len(text) and ids.max() < tokenizer.vocab_size == len(tokenizer.token_bytes)
        # Lossy tokenizers drop spaces and merge unknown text: approximate here, corrected by `bytes_per_token_byte`.
        assert tokenizer.token_bytes[ids].sum() == pytest.approx(len(text), rel=0.4)


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_special_token_in_a_text_is_text(files, name):
    tokenizer = files[name]
    special = "[SEP]" if name == "words.json" else EOT
    ids = tokenizer.encode(f"a {special} b".encode())
    assert tokenizer.end_of_text not in ids


def test_the_mask_token_is_in_the_vocabulary_or_follows_it(files):
    assert files["words.json"].mask_token == 2  # [MASK]
    for name in ("bpe.json", "unigram.model", "pieces.model"):
        assert files[name].mask_token == files[name].vocab_size


def test_invalid_utf8_is_replaced(files):
    for tokenizer in files.values():
        assert len(tokenizer.encode(b"ab\xff\xfecd")) > 0
    assert files["bpe.json"].decode(files["bpe.json"].encode(b"ab\xffcd")).decode() == "ab\N{REPLACEMENT CHARACTER}cd"


def test_truncation_and_padding_in_a_file_change_nothing(files, tmp_path):
    limited = tokenizers.Tokenizer.from_str(FILES["bpe.json"]().decode())
    limited.enable_truncation(4)
    limited.enable_padding(length=4000)
    limited.save(str(tmp_path / "limited.json"))
    tokenizer = load_tokenizer(str(tmp_path / "limited.json"))
    for ids, expected in zip(tokenizer.encode_batch(TEXT), files["bpe.json"].encode_batch(TEXT), strict=True):
        np.testing.assert_array_equal(ids, expected)


def test_fingerprints_depend_on_the_content(files, tmp_path):
    (tmp_path / "again.json").write_bytes(FILES["bpe.json"]())
    assert load_tokenizer(str(tmp_path / "again.json")).fingerprint == files["bpe.json"].fingerprint
    assert len({tokenizer.fingerprint for tokenizer in files.values()}) == len(NAMES)


BROKEN = {
    "missing.json": (None, "cannot be read"),
    "broken.json": (b"{}", "must be a tokenizer.json"),
    "empty.model": (b"", "must be a SentencePiece model"),
    "other.txt": (b"", "no such tokenizer"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_invalid_files_are_refused_in_one_line(tmp_path, name):
    content, words = BROKEN[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        load_tokenizer(str(tmp_path / name))
    assert "\n" not in str(error.value) and str(error.value).startswith("data.tokenizer = ")


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path):
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, show_progress=False)
    (tmp_path / "t.json").write_bytes(library(tokenizers.models.BPE(), trainer))
    with pytest.raises(UserError, match=r"no end-of-text token; try tokenizer\.add_special_tokens"):
        load_tokenizer(str(tmp_path / "t.json"))


@pytest.mark.parametrize(("size", "kind", "words"), [(100, "bpe", "at least 257"), (300, "bpa", "did you mean 'bpe'")])
def test_invalid_training_options_are_refused(size, kind, words):
    with pytest.raises(UserError, match=words):
        train_tokenizer(TEXT, size, kind)


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_fewer_tokens_than_requested_are_reported(kind):
    warnings: list[str] = []
    train_tokenizer(TEXT, 100_000, kind, warnings.append)
    (line,) = warnings
    size = int(line.split("; try more text or ")[1])
    assert line.startswith(f"vocab_size = 100000: the tokenizer has {size}, all that the text gives")
    assert 257 < size < 2000
    train_tokenizer(TEXT, size, kind, warnings.append)
    assert len(warnings) == 1
