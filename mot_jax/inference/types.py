"""Inputs and results of a `LanguageModel`: prompts, continuations, filled texts, likelihoods."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

Prompt = str | bytes | np.ndarray  # text, or its token ids, int [n]
GAP = "\N{WHITE SQUARE}"  # the default mark of a missing token


class Continuation(NamedTuple):
    """The text generated after a prompt.

    Attributes:
        text: the generated text, without the stop that ended it.
        tokens: int32 [n], the generated tokens, those of the stop included.
        log_probs: float32 [n], natural log-probability of each token under the model's own distribution, that is
            before temperature, top_k and top_p.
        finished: whether a stop (or the end of a text) ended the generation.
    """

    text: str
    tokens: np.ndarray
    log_probs: np.ndarray
    finished: bool


class Filled(NamedTuple):
    """A text whose gaps a masked model has filled.

    Attributes:
        text: the text with the most likely token in each gap.
        gaps: (token, probability) of each gap, in order.
    """

    text: str
    gaps: list[tuple[str, float]]


class Likelihood(NamedTuple):
    """The likelihood of a continuation.

    Attributes:
        log_prob: natural log-probability of the whole continuation.
        greedy: whether each of its tokens is the most likely one.
    """

    log_prob: float
    greedy: bool
