"""A prompt and what a model writes after it: what it reads next, and where a stop ends it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mot_jax.data.tokenizers import Tokenizer


class Continuation(NamedTuple):
    """text: what follows the prompt, without the stop that ended it. tokens: int32 [n], with it. log_probs: float32
    [n], natural, of each token by the model's own distribution. finished: whether a stop ended it.
    """

    text: str
    tokens: np.ndarray
    log_probs: np.ndarray
    finished: bool


class Row:
    """A prompt and what was written after it."""

    def __init__(self, prompt: np.ndarray):
        self.text, self.finished = prompt, False
        self._begin, self._log_probs = len(prompt), np.zeros(0, np.float32)
        self._end: int | None = None  # bytes before the stop
        self._first = 0  # token of it that the model reads

    def window(self, length: int) -> np.ndarray:
        """What the model reads next, at most `length` tokens: from where it read before, unless that was outgrown."""
        if len(self.text) - self._first > length:
            self._first = len(self.text) - max(length // 2, 1)
        return self.text[len(self.text) if self.finished else self._first :]

    def take(self, tokens: np.ndarray, log_probs: np.ndarray, finished: bool) -> None:
        if not self.finished:
            self.text, self._log_probs = np.append(self.text, tokens), np.append(self._log_probs, log_probs)
            self.finished = bool(finished)

    def end_at(self, stops: list[bytes], tokenizer: Tokenizer) -> None:
        """Ends the row with the token that completes the first of `stops`, if what was written holds any."""
        if self._end is not None or not stops:
            return
        written = tokenizer.decode(self.text[self._begin :])
        if not any(stop in written for stop in stops):
            return
        for length in range(1, len(self._log_probs) + 1):
            written = tokenizer.decode(self.text[self._begin : self._begin + length])
            places = [place for stop in stops if (place := written.find(stop)) >= 0]
            if places:
                self.text, self._log_probs = self.text[: self._begin + length], self._log_probs[:length]
                self.finished, self._end = True, min(places)
                return

    def continuation(self, tokenizer: Tokenizer) -> Continuation:
        tokens = self.text[self._begin :]
        words = tokenizer.decode(tokens)[: self._end].decode(errors="replace")
        return Continuation(words, tokens, self._log_probs, self.finished)
