"""Scoring on the device: rows begin at position 0, as in training, and are padded on the right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mot_jax.config import ModelConfig
from mot_jax.nn.feed_forward import FeedForwardContext
from mot_jax.nn.sharding import replicate, reshard
from mot_jax.nn.transformer import Params, bind


class Window(NamedTuple):
    """tokens: int32 [n + 1], of which the model reads the first n. scored: how many of the last are predicted."""

    tokens: np.ndarray
    scored: int


def windows(tokens: np.ndarray, begin: int, length: int) -> list[Window]:
    """Windows that together predict each token of a text, int32 [n], from `begin` (at least 1) on once.

    Each predicts as many as a context of `length` has room for, and reads as many before them as still fit.
    """
    found = []
    for first in range(begin, len(tokens), length):
        end = min(first + length, len(tokens))
        found.append(Window(tokens[max(end - length - 1, 0) : end], end - first))
    return found


def right_padded(windows: Sequence[Window], rows: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens int32 [rows, width + 1], how many of each row are read, and predicted, int32 [rows])."""
    tokens, lengths, scored = np.zeros((rows, width + 1), np.int32), *np.zeros((2, rows), np.int32)
    for row, window in enumerate(windows):
        tokens[row, : len(window.tokens)] = window.tokens
        lengths[row], scored[row] = len(window.tokens) - 1, window.scored
    return tokens, lengths, scored


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
    """Natural log-probabilities of the last `scored` tokens, float32 [B, S], and whether each is the likeliest, bool.

    Both at the place of the token before; elsewhere 0 and True. step: int32 scalar, how long the model was trained.
    tokens: int32 [B, S + 1]. lengths: int32 [B], how many of each row are read; a row without any is absent. scored:
    int32 [B]. vocab_size: of the tokenizer.
    """
    read, targets = tokens[:, :-1], tokens[:, 1:]
    places, lengths = jnp.arange(read.shape[1]), lengths[:, None]
    real = places < lengths
    wanted = real & (places >= lengths - scored[:, None])
    segments = jnp.cumsum(real & (read == end_of_text), axis=1)
    read, real, segments, targets = (reshard(replicate(a), "sequences", None) for a in (read, real, segments, targets))
    model = bind(config, params)
    hidden = reshard(model(read, FeedForwardContext(real, read, step=step), segments).hidden, "sequences", None, None)
    size = math.gcd(config.loss_chunk, read.shape[1])  # logits exist for so many positions of each row at a time

    def body(_: None, first: jax.Array) -> tuple[None, tuple[jax.Array, jax.Array]]:
        part, target = (jax.lax.dynamic_slice_in_dim(a, first, size, axis=1) for a in (hidden, targets))
        logits = model.logits(part, vocab_size)
        own = jnp.where(jnp.arange(logits.shape[-1]) == target[..., None], logits, 0).sum(axis=-1)
        return None, (own - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == target)

    _, found = jax.lax.scan(body, None, jnp.arange(0, read.shape[1], size))
    log_probs, likeliest = (jnp.moveaxis(replicate(a), 0, 1).reshape(read.shape) for a in found)
    return jnp.where(wanted, log_probs, 0), ~wanted | likeliest
