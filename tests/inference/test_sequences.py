"""The text of a sequence while it is generated: that of all tokens decoded together, whatever the tokenizer."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_files import FILES, tokenizer_of

from mot_jax.inference.sequences import GeneratedSequence, GeneratedText

NAMES = ["bytes", *FILES]
PROMPTS = ["the tokens of a", "def f(x):\n", "größer ", "漢字 漢", "x", "  x", "Return X", " "]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizers")


def whole_text(tokenizer, prompt: np.ndarray, tokens: list[int]) -> str:
    return tokenizer.decode(np.append(prompt, tokens).astype(np.int32)).decode(errors="replace")


def zeros(tokens: list[int]) -> np.ndarray:
    return np.zeros(len(tokens), np.float32)


@st.composite
def generations(draw):
    """A prompt, tokens generated after it as fractions of the vocabulary, and the size of the steps."""
    return (
        draw(st.sampled_from(PROMPTS)),
        draw(st.lists(st.floats(0, 0.999), min_size=1, max_size=40)),
        draw(st.integers(1, 9)),
    )


@pytest.mark.parametrize("name", NAMES)
@given(generation=generations())
def test_prompt_and_continuation_are_the_text_of_all_tokens(directory, name, generation):
    """At the end, and every text before is a prefix of it. The text is decoded from a few tokens at a time."""
    tokenizer = tokenizer_of(name, directory)
    prompt_text, fractions, size = generation
    prompt = tokenizer.encode(prompt_text.encode()).astype(np.int32)
    tokens = [int(fraction * tokenizer.vocab_size) for fraction in fractions]
    sequence = GeneratedSequence(tokenizer, prompt)
    texts = []
    for first in range(0, len(tokens), size):
        part = tokens[first : first + size]
        sequence.append(np.array(part, np.int32), zeros(part), False)
        texts.append(sequence.continuation(is_last=first + size >= len(tokens)).text)
    decoded_prompt = tokenizer.decode(prompt).decode(errors="replace")
    whole = whole_text(tokenizer, prompt, tokens)
    if whole.startswith(decoded_prompt):
        assert decoded_prompt + texts[-1] == whole
    else:  # the new tokens complete or break the last characters of the prompt
        assert whole.endswith(texts[-1])
    for before, after in itertools.pairwise(texts):
        assert after.startswith(before)


@pytest.mark.parametrize("name", NAMES)
def test_the_cost_of_a_step_does_not_grow_with_the_text(directory, name, monkeypatch):
    tokenizer = tokenizer_of(name, directory)
    text = "def f(x):\n    return x + 1  # ein Satz\n" * 20
    ids = tokenizer.encode(text.encode()).astype(np.int32)
    generated = GeneratedText(tokenizer, ids[:10])
    sizes, decode = [], type(tokenizer).decode
    monkeypatch.setattr(type(tokenizer), "decode", lambda self, ids: sizes.append(len(ids)) or decode(self, ids))
    for first in range(10, len(ids), 8):
        generated.append(ids[first : first + 8])
        generated.settled_text()
    assert max(sizes) <= 64 < len(ids)


# --- stops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_a_stop_ends_the_text_wherever_tokens_and_steps_end(directory, name, data):
    """The text is that before the stop which is complete first; no text before the end shows a part of the stop."""
    tokenizer = tokenizer_of(name, directory)
    prompt = tokenizer.encode(b"def f").astype(np.int32)
    pieces = st.lists(st.sampled_from(["a", "b", "ab", " ", "re", "turn", "\n", "漢", "ö", "x:"]), max_size=12)
    written = "".join(data.draw(pieces))
    tokens = tokenizer.encode(b"def f" + written.encode()).astype(np.int32)[len(prompt) :]
    free = GeneratedText(tokenizer, prompt)
    free.append(tokens)
    text = free.text().decode(errors="replace")
    stops = data.draw(
        st.lists(st.sampled_from(["ab", "b", "bab", "turn", "\n", " re", "漢", "x:a", "abre"]), max_size=3)
    )
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    size = data.draw(st.integers(1, 5))
    sequence = GeneratedSequence(tokenizer, prompt, stops=[stop.encode() for stop in stops])
    texts = []
    for first in range(0, len(tokens), size):
        part = tokens[first : first + size]
        sequence.append(part, zeros(part), False)
        texts.append(sequence.continuation(is_last=first + size >= len(tokens)).text)
    if texts:
        assert texts[-1] == text[: min(ends)[1] if ends else None]
        assert sequence.finished == bool(ends)
    for before, after in itertools.pairwise(texts):
        assert after.startswith(before)


def streamed(tokenizer, prompt: str | bytes, tokens, stops=()) -> list[str]:
    """The texts after each of the tokens."""
    given_text = prompt.encode() if isinstance(prompt, str) else prompt
    ids = tokenizer.encode(given_text).astype(np.int32)
    sequence = GeneratedSequence(tokenizer, ids, given_text, [stop.encode() for stop in stops])
    texts = []
    for i, token in enumerate(tokens):
        sequence.append(np.array([token], np.int32), zeros([token]), False)
        texts.append(sequence.continuation(is_last=i == len(tokens) - 1).text)
    return texts


def test_the_beginning_of_a_stop_is_held_back_until_it_is_no_stop(directory):
    tokenizer = tokenizer_of("bytes", directory)
    assert streamed(tokenizer, "x", b"aENxEND", ["END"]) == ["a", "a", "a", "aENx", "aENx", "aENx", "aENx"]
    assert streamed(tokenizer, "x", b"aEN", ["END"]) == ["a", "a", "aEN"]  # it was none
    assert streamed(tokenizer, "x", b"xabc", ["abcd", "b"]) == ["x", "x", "xa", "xa"]  # b is complete first


def test_a_character_that_begins_in_the_prompt_is_completed(directory):
    tokenizer = tokenizer_of("bytes", directory)
    assert streamed(tokenizer, b"caf\xc3", b"\xa9!")[-1] == "é!"
    assert streamed(tokenizer, b"caf\xc3", b"s!")[-1] == "s!"  # the prompt shows its byte itself
    assert streamed(tokenizer, "漢", "字".encode()) == ["", "", "字"]


def test_a_space_that_the_tokenizer_drops_from_the_prompt_is_not_doubled(directory):
    tokenizer = tokenizer_of("pieces.model", directory)
    x = tokenizer.encode(b"x").tolist()
    token = next(i for i in range(tokenizer.vocab_size) if tokenizer.decode([*x, i]).startswith(b"x r"))
    (text,) = streamed(tokenizer, "x", [token])
    assert text.startswith(" r")
    assert streamed(tokenizer, "x ", [token]) == [text[1:]]
