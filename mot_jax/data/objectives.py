"""From windows of text to what a model reads and what it is to predict."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from mot_jax.config import Config
from mot_jax.data.tokenizers import Tokenizer
from mot_jax.data.windows import WindowBatch

TRAINING, VALIDATION = 0, 1  # each has random numbers of its own


class Batch(NamedTuple):
    """Rows as a model reads them, all [b, S]: NumPy's here, global arrays in a step.

    inputs, targets: int32. token_mask: bool, the inputs that are real. target_mask: bool, the targets that count.
    segments: int32, which document of the window a token belongs to; None unless the model asks.
    """

    inputs: Any
    targets: Any
    token_mask: Any
    target_mask: Any
    segments: Any = None


@dataclasses.dataclass(frozen=True)
class Objective:
    """Causal: each token predicts the next. Masked: the tokens that were hidden are predicted from all others.

    Of the real tokens, a share `mask_rate` is to be predicted; 80 % of these are replaced by the mask token, 10 % by a
    random one, 10 % stay (Devlin et al. 2019, section 3.1). Which ones depends on the seed, the split and the number of
    the example, and on nothing else: the same on every mesh, anew in every epoch, always the same in validation.
    """

    masked: bool
    document_mask: bool
    mask_rate: float
    seed: int
    vocab_size: int
    mask_token: int
    end_of_text: int

    @classmethod
    def of(cls, config: Config, tokenizer: Tokenizer) -> Objective:
        """The objective of an experiment."""
        return cls(
            masked=config.model.objective == "masked",
            document_mask=config.model.document_mask,
            mask_rate=config.data.mask_rate,
            seed=config.training.seed,
            vocab_size=tokenizer.vocab_size,
            mask_token=tokenizer.mask_token,
            end_of_text=tokenizer.end_of_text,
        )

    def __call__(self, windows: WindowBatch, examples: np.ndarray, split: int = TRAINING) -> Batch:
        """windows [b, S + 1], and the numbers of these examples, int [b] -> Batch [b, S].

        A masked model reads the first S tokens of a window; the last one is the first of the next window.
        """
        tokens, real = windows
        inputs = tokens[:, :-1]
        segments = np.cumsum(inputs == self.end_of_text, axis=1, dtype=np.int32) if self.document_mask else None
        if not self.masked:
            return Batch(inputs, tokens[:, 1:], real, real, segments)
        token_mask = np.concatenate([real[:, :1], real[:, :-1]], axis=1)  # a token more than it has targets
        first, second = self._random(examples, split, inputs.shape[1])
        chosen = token_mask & ((first >> 40) < self.mask_rate * 2**24)
        at = np.divmod(np.flatnonzero(chosen), chosen.shape[1])  # `nonzero` of two dimensions is slow
        how, other = (first[at] & (2**24 - 1)) / 2**24, (second[at] % self.vocab_size).astype(np.int32)
        hidden = inputs.copy()
        hidden[at] = np.where(how < 0.8, self.mask_token, np.where(how < 0.9, other, inputs[at]))
        return Batch(hidden, inputs, token_mask, chosen, segments)

    def _random(self, examples: np.ndarray, split: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Two random numbers for each token, uint64 [b, length]."""
        generator = np.random.Philox(key=[self.seed, split])  # NumPy promises raw bits for ever
        state: Any = generator.state  # with lists in it, which are set in a third of the time that arrays take
        state["buffer"], key = state["buffer"].tolist(), state["state"]["key"].tolist()
        bits = []
        for number in examples.tolist():
            state["state"] = {"counter": [0, 0, 0, number], "key": key}
            generator.state = state  # a new generator would take ten times as long
            bits.append(generator.random_raw(2 * length))
        found = np.stack(bits)
        return found[:, :length], found[:, length:]
