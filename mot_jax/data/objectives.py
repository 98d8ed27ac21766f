"""Training objectives: inputs, targets and masks of causal and masked language models, from windows of tokens."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from mot_jax.config import Config
from mot_jax.data.tokenizers import Tokenizer
from mot_jax.data.windows import WindowBatch

TRAINING, VALIDATION = 0, 1  # keys of independent random numbers


class Batch(NamedTuple):
    """Sequences as inputs of a model, all [b, S]: NumPy arrays in this package, global arrays in a training step.

    Attributes:
        inputs, targets: int32.
        token_mask: bool, True for non-padding inputs.
        target_mask: bool, True for the targets that count in the loss.
        segments: int32, index of the document in the window that a token belongs to; None without
            `model.document_mask`.
    """

    inputs: Any
    targets: Any
    token_mask: Any
    target_mask: Any
    segments: Any = None


@dataclasses.dataclass(frozen=True)
class Objective:
    """Causal: predict each next token. Masked: predict the hidden tokens from all others.

    The fraction `mask_rate` of the non-padding tokens is predicted; of these, 80 % are replaced by the mask token, 10 %
    by a random token, and 10 % are unchanged (Devlin et al. 2019, section 3.1). The random choice depends only on the
    seed,
    the split and the number of the example: it is the same on every mesh, differs between epochs, and is fixed in
    validation.
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
        """The objective of a config."""
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
        """Make a batch from windows.

        A masked model reads the first S tokens of a window; the last token is the first of the next window.

        Args:
            windows: [b, S + 1] tokens.
            examples: int [b], the number of each example in the order, which determines its random choices.
        """
        tokens, mask = windows
        inputs = tokens[:, :-1]
        segments = np.cumsum(inputs == self.end_of_text, axis=1, dtype=np.int32) if self.document_mask else None
        if not self.masked:
            return Batch(inputs, tokens[:, 1:], mask, mask, segments)
        token_mask = np.concatenate([mask[:, :1], mask[:, :-1]], axis=1)  # one more than the non-padding targets
        first, second = self._random(examples, split, inputs.shape[1])
        chosen = token_mask & ((first >> 40) < self.mask_rate * 2**24)
        at = np.divmod(np.flatnonzero(chosen), chosen.shape[1])  # `nonzero` of two dimensions is slow
        action, random_tokens = (first[at] & (2**24 - 1)) / 2**24, (second[at] % self.vocab_size).astype(np.int32)
        hidden = inputs.copy()
        hidden[at] = np.where(action < 0.8, self.mask_token, np.where(action < 0.9, random_tokens, inputs[at]))
        return Batch(hidden, inputs, token_mask, chosen, segments)

    def _random(self, examples: np.ndarray, split: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Two random 64-bit numbers for each token: uint64 [b, length]."""
        generator = np.random.Philox(key=[self.seed, split])  # NumPy guarantees that raw bits never change
        state: Any = generator.state  # setting lists takes a third of the time of setting arrays
        state["buffer"], key = state["buffer"].tolist(), state["state"]["key"].tolist()
        bits = []
        for number in examples.tolist():
            state["state"] = {"counter": [0, 0, 0, number], "key": key}
            generator.state = state  # constructing a generator takes ten times as long
            bits.append(generator.random_raw(2 * length))
        numbers = np.stack(bits)
        return numbers[:, :length], numbers[:, length:]
