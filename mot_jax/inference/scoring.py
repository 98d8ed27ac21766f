"""Scoring on the device: sequences begin at position 0, as in training, and are padded on the right."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mot_jax.config import ModelConfig
from mot_jax.nn.feed_forward import FeedForwardContext
from mot_jax.nn.sharding import replicate, reshard
from mot_jax.nn.transformer import Params, Transformer, bind


class ScoringWindow(NamedTuple):
    """A part of a text that is scored in one pass.

    Attributes:
        tokens: int32 [n + 1]; the first n are the model's input.
        scored: how many of the last tokens are scored.
    """

    tokens: np.ndarray
    scored: int


def scoring_windows(tokens: np.ndarray, begin: int, length: int) -> list[ScoringWindow]:
    """Split a text, int32 [n], into windows that together score each token from index `begin` (at least 1) on once.

    Each window scores up to `length` tokens, the context length, and its input starts with as many tokens before them
    as fit.
    """
    windows = []
    for first in range(begin, len(tokens), length):
        end = min(first + length, len(tokens))
        windows.append(ScoringWindow(tokens[max(end - length - 1, 0) : end], end - first))
    return windows


def right_padded(
    windows: Sequence[ScoringWindow], batch_size: int, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pad windows on the right, and with absent sequences up to `batch_size`.

    Returns:
        Tokens, int32 [batch_size, width + 1]; the number of input tokens and of scored tokens of each sequence, int32
        [batch_size].
    """
    tokens, lengths, scored = np.zeros((batch_size, width + 1), np.int32), *np.zeros((2, batch_size), np.int32)
    for i, window in enumerate(windows):
        tokens[i, : len(window.tokens)] = window.tokens
        lengths[i], scored[i] = len(window.tokens) - 1, window.scored
    return tokens, lengths, scored


@partial(jax.jit, static_argnames=("config", "vocab_size", "end_of_text"))
def likeliest_tokens(
    config: ModelConfig,
    params: Params,
    step: jax.Array,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    vocab_size: int,
    end_of_text: int,
) -> tuple[jax.Array, jax.Array]:
    """Return the most likely token at every position under a masked model, and its log-probability.

    Args:
        step: int32 scalar, the number of training steps.
        tokens: int32 [B, S], with mask tokens in the gaps.
        lengths: int32 [B], the number of tokens of each sequence; a sequence without any is absent.
        vocab_size: of the tokenizer.

    Returns:
        Tokens, int32 [B, S], and natural log-probabilities, float32 [B, S], both replicated.
    """
    token_mask = jnp.arange(tokens.shape[1]) < lengths[:, None]
    model, hidden = _hidden(config, params, step, tokens, token_mask, end_of_text)

    def body(part: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_probs = jax.nn.log_softmax(model.logits(part, vocab_size), axis=-1)
        return jnp.argmax(log_probs, axis=-1), log_probs.max(axis=-1)

    return _by_chunks(config, body, hidden)


def _hidden(
    config: ModelConfig,
    params: Params,
    step: jax.Array,
    tokens: jax.Array,
    token_mask: jax.Array,
    end_of_text: int,
) -> tuple[Transformer, jax.Array]:
    """Run the model on tokens [B, S], in one pass without a cache: the model and its last hidden states [B, S, D]."""
    segments = jnp.cumsum(token_mask & (tokens == end_of_text), axis=1)
    tokens, token_mask, segments = (reshard(replicate(a), "sequences", None) for a in (tokens, token_mask, segments))
    model = bind(config, params)
    hidden = model(tokens, FeedForwardContext(token_mask, tokens, step=step), segments).hidden
    return model, reshard(hidden, "sequences", None, None)


def _by_chunks(
    config: ModelConfig, function: Callable[..., tuple[jax.Array, jax.Array]], *arrays: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Apply a function of positions to arrays [B, S, ...] for a chunk of positions at a time, whose logits it computes.

    Its results [B, S] are replicated.
    """
    batch, length = arrays[0].shape[:2]
    chunk = math.gcd(config.loss_chunk, length)

    def body(_: None, first: jax.Array) -> tuple[None, tuple[jax.Array, jax.Array]]:
        return None, function(*(jax.lax.dynamic_slice_in_dim(a, first, chunk, axis=1) for a in arrays))

    _, chunks = jax.lax.scan(body, None, jnp.arange(0, length, chunk))
    first, second = (jnp.moveaxis(replicate(a), 0, 1).reshape(batch, length) for a in chunks)
    return first, second


@partial(jax.jit, static_argnames=("config", "vocab_size", "end_of_text"))
def score(
    config: ModelConfig,
    params: Params,
    step: jax.Array,
    tokens: jax.Array,
    lengths: jax.Array,
    scored: jax.Array,
    *,
    vocab_size: int,
    end_of_text: int,
) -> tuple[jax.Array, jax.Array]:
    """Score the last `scored` tokens of each sequence in one pass without a cache.

    Args:
        step: int32 scalar, the number of training steps.
        tokens: int32 [B, S + 1].
        lengths: int32 [B], the number of input tokens of each sequence; a sequence without any is absent.
        scored: int32 [B], the number of scored tokens of each sequence.
        vocab_size: of the tokenizer.

    Returns:
        Natural log-probabilities of the scored tokens, float32 [B, S], and whether each is the most likely token, bool
        [B, S]. Both are at the position of the token before; the other positions are 0 and True.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    positions, lengths = jnp.arange(inputs.shape[1]), lengths[:, None]
    token_mask = positions < lengths
    is_scored = token_mask & (positions >= lengths - scored[:, None])
    model, hidden = _hidden(config, params, step, inputs, token_mask, end_of_text)

    def body(part: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model.logits(part, vocab_size)
        target_logits = jnp.where(jnp.arange(logits.shape[-1]) == target[..., None], logits, 0).sum(axis=-1)
        return target_logits - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == target

    targets = reshard(replicate(targets), "sequences", None)
    log_probs, likeliest = _by_chunks(config, body, hidden, targets)
    return jnp.where(is_scored, log_probs, 0), ~is_scored | likeliest
