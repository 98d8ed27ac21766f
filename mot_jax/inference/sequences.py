"""The host-side state of one sequence during generation: its next window of tokens, and the stops that end it."""

from __future__ import annotations

import numpy as np

from mot_jax.data.tokenizers import Tokenizer
from mot_jax.inference.types import Continuation


class GeneratedSequence:
    """A prompt and the tokens generated after it."""

    def __init__(self, prompt: np.ndarray):
        self.tokens, self.finished = prompt, False
        self._prompt_length, self._log_probs = len(prompt), np.zeros(0, np.float32)
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
        """Append generated tokens, unless the sequence is finished."""
        if not self.finished:
            self.tokens, self._log_probs = np.append(self.tokens, tokens), np.append(self._log_probs, log_probs)
            self.finished = bool(finished)

    def cut_at_stop(self, stops: list[bytes], tokenizer: Tokenizer) -> None:
        """Finish the sequence with the token that completes the earliest of `stops`, if the generated text has one."""
        if self._bytes_before_stop is not None or not stops:
            return
        generated = tokenizer.decode(self.tokens[self._prompt_length :])
        if not any(stop in generated for stop in stops):
            return
        for length in range(1, len(self._log_probs) + 1):
            generated = tokenizer.decode(self.tokens[self._prompt_length : self._prompt_length + length])
            offsets = [offset for stop in stops if (offset := generated.find(stop)) >= 0]
            if offsets:
                self.tokens, self._log_probs = self.tokens[: self._prompt_length + length], self._log_probs[:length]
                self.finished, self._bytes_before_stop = True, min(offsets)
                return

    def continuation(self, tokenizer: Tokenizer) -> Continuation:
        """Return the tokens and the text generated so far."""
        tokens = self.tokens[self._prompt_length :]
        text = tokenizer.decode(tokens)[: self._bytes_before_stop].decode(errors="replace")
        return Continuation(text, tokens, self._log_probs, self.finished)
