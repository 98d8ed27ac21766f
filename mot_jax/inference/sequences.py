"""The host-side state of one sequence during generation: its next window of tokens, its text, the stops that end it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mot_jax.data.tokenizers import Tokenizer
from mot_jax.inference.types import Continuation

# A character that the next token may complete: U+FFFD, or a byte of no character (in `surrogateescape`).
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}" + "".join(map(chr, range(0xDC80, 0xDD00)))


class GeneratedText:
    """The text of the tokens generated after a prompt, as bytes: that of prompt and tokens less that of the prompt.

    The text of a token depends on the tokens before it: SentencePiece and Metaspace decoders drop the space in front of
    a first token, and a character may be split over tokens. Therefore tokens are decoded together with a few settled
    ones before them, the context. The invariant, tested against the decoding of all tokens:

        decode(context + new) = decode(context) + text of `new` in the whole sequence

    It holds because a context starts where the text was settled, so in the middle of no character and of no run of byte
    tokens, and has more than white space, so that the beginning of the sequence is treated alike with and without
    `new`. The cost of a decode step thus depends on the tokens since the last settled text, not on the whole text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: np.ndarray, prompt_text: bytes | None = None):
        """Begin after `prompt`, int32 [n]. prompt_text: that the user gave; None if it gave tokens."""
        self._tokenizer = tokenizer
        self._context, self._new = prompt, prompt[:0]
        text = tokenizer.decode(prompt)
        self._context_text, self._settled = self._settle(prompt, text), b""
        self._context_is_whole = self._context_text == text
        if prompt_text is None:
            prompt_text = text
        elif prompt_text != text:
            prompt_text = prompt_text.decode(errors="replace").encode()
        # The end of the prompt that its settled text lacks: a part of a character, or spaces that the tokenizer drops.
        is_longer = prompt_text.startswith(self._context_text)
        self._end_of_prompt = prompt_text[len(self._context_text) :] if is_longer else b""

    def append(self, tokens: np.ndarray) -> None:
        """Append generated tokens, int32 [n]."""
        self._new = np.append(self._new, tokens)

    def text(self) -> bytes:
        """Return the text so far. Its end may change with the next token, unlike `settled_text`."""
        return self._without_end_of_prompt(self._settled + self._text_of_new())

    def settled_text(self) -> bytes:
        """Return the text so far that no further token changes; this makes the end of the text the next context."""
        tokens = np.append(self._context, self._new)
        text = self._tokenizer.decode(tokens)
        settled = self._settle(tokens, text)
        new_text = settled[len(self._context_text) :]
        if settled == text and text.startswith(self._context_text):
            # The last settled text is a sufficient context if it shows, and the tokenizer can start there.
            alone = self._tokenizer.decode(self._new)
            if self._context_is_whole and alone.strip():
                self._context, self._context_text = self._new, alone
            else:
                self._context, self._context_text = tokens, text
            self._settled, self._new, self._context_is_whole = self._settled + new_text, self._new[:0], True
            new_text = b""
        return self._without_end_of_prompt(self._settled + new_text)

    def _text_of_new(self) -> bytes:
        return self._tokenizer.decode(np.append(self._context, self._new))[len(self._context_text) :]

    def _settle(self, tokens: np.ndarray, text: bytes) -> bytes:
        """Return the part of the `text` of `tokens` that no further token changes."""
        if (byte_token := self._tokenizer.byte_token) is not None:
            # A decoder may replace a whole run of byte tokens by U+FFFD as soon as the run is not UTF-8.
            text = text[: _common_length(text, self._tokenizer.decode(np.append(tokens, byte_token)))]
        return _escaped(text).rstrip(_INCOMPLETE).encode(errors="surrogateescape")

    def _without_end_of_prompt(self, text: bytes) -> bytes:
        if not self._end_of_prompt:
            return text
        characters = _escaped(text)
        return characters[_common_length(characters, _escaped(self._end_of_prompt)) :].encode(errors="surrogateescape")


def _escaped(text: bytes) -> str:
    return text.decode(errors="surrogateescape")


def _common_length(a: bytes | str, b: bytes | str) -> int:
    """Return the length of the common beginning of two texts."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class GeneratedSequence:
    """A prompt and the tokens generated after it, up to the first stop."""

    def __init__(
        self, tokenizer: Tokenizer, prompt: np.ndarray, prompt_text: bytes | None = None, stops: Sequence[bytes] = ()
    ):
        """Begin after `prompt`, int32 [n].

        Args:
            tokenizer: of the model.
            prompt: int32 [n].
            prompt_text: the text of the prompt as the user gave it; None if it was tokens.
            stops: texts that end the sequence, none of them empty.
        """
        self.tokens, self.finished = prompt, False
        self._prompt_length, self._log_probs = len(prompt), np.zeros(0, np.float32)
        self._text, self._stops = GeneratedText(tokenizer, prompt, prompt_text), stops
        self._bytes_before_stop: int | None = None
        self._window_start = 0  # index of the first token in the model's context

    def window(self, length: int) -> np.ndarray:
        """Return the tokens of the next pass, at most `length`; none if the sequence is finished.

        The window keeps its start until the sequence outgrows it; it then starts at the last `length` // 2 tokens.
        """
        if len(self.tokens) - self._window_start > length:
            self._window_start = len(self.tokens) - max(length // 2, 1)
        return self.tokens[len(self.tokens) if self.finished else self._window_start :]

    def append(self, tokens: np.ndarray, log_probs: np.ndarray, finished: bool) -> None:
        """Append generated tokens, unless the sequence is finished; the token that completes a stop is the last one.

        finished: whether the tokens themselves end the sequence.
        """
        if self.finished:
            return
        count = self._append_until_stop(tokens)
        self.tokens = np.append(self.tokens, tokens[:count])
        self._log_probs = np.append(self._log_probs, log_probs[:count])
        self.finished = bool(finished) or self._bytes_before_stop is not None

    def _append_until_stop(self, tokens: np.ndarray) -> int:
        """Append tokens to the text up to a stop; return how many."""
        if not self._stops:
            self._text.append(tokens)
            return len(tokens)
        for i in range(len(tokens)):
            self._text.append(tokens[i : i + 1])
            text = self._text.text()
            # (end, start) of each stop: by the end, so that the result is the same however the text is tokenized.
            places = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
            if places:
                self._bytes_before_stop = min(places)[1]
                return i + 1
        return len(tokens)

    def continuation(self, is_last: bool) -> Continuation:
        """Return the tokens generated so far, and their text.

        Unless the sequence is finished or `is_last`, text that the next tokens can change is held back: an incomplete
        character, and an end that begins a stop. The text is thus a prefix of all later ones.
        """
        if self.finished or is_last:
            text = self._text.text()[: self._bytes_before_stop]
        else:
            text = self._text.settled_text()
            text = text[: len(text) - _length_of_begun_stop(text, self._stops)]
        tokens = self.tokens[self._prompt_length :]
        return Continuation(text.decode(errors="replace"), tokens, self._log_probs, self.finished)


def _length_of_begun_stop(text: bytes, stops: Sequence[bytes]) -> int:
    """Return the length of the longest end of `text` that is the beginning of a stop."""
    longest = min(len(text), max(map(len, stops), default=1) - 1)
    return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in stops)), 0)
