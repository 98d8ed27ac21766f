"""Generation on the device: prefill of left-padded prompts, then a loop of decode steps with a key/value cache.

Tokens are in arrays [B, T]; each decode step fills one column, that is one token of every sequence. Prompts are padded
on the left so that they end in the same column and the sequences of a group are mixed column by column, as in training.
Positions count from the first token of each sequence (`context.positions`), in attention and for the reference
sequences of mode `companions`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mot_jax.config import ModelConfig
from mot_jax.nn.feed_forward import FeedForwardContext
from mot_jax.nn.sharding import replicate, reshard
from mot_jax.nn.transformer import Cache, Params, bind


class Sampler(NamedTuple):
    """Sampling options. All are arrays, so that no change of them recompiles the program.

    Temperature, top_k and top_p apply in this order, each to the result of the one before.

    Attributes:
        temperature: float32; 0 selects the most likely token.
        top_k: int32, the number of most likely tokens to sample from; V for all.
        top_p: float32; sample from the smallest set of most likely tokens whose probabilities add up to at least this.
        seed: uint32; a sampled token depends on it, on the sequence's number and on the count of tokens sampled before.
        numbers: uint32 [B], of the sequences.
        stops: int32 [n, L], token sequences that end a sequence, padded on the left with -1. A row with -2 matches
            nothing.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    seed: Any
    numbers: Any
    stops: Any


class Decoding(NamedTuple):
    """The state of the decode loop. All fields but the cache are replicated on every device.

    Attributes:
        cache: keys and values of all columns before `column`.
        tokens: int32 [B, T].
        token_mask: bool [B, T], True for non-padding tokens; False in the left padding and after a sequence's end.
        log_probs: float32 [B, T], of each sampled token under the model's own distribution.
        column: int32 scalar, the column that the next decode step fills.
        drawn: int32 scalar, the number of tokens sampled so far for each sequence.
        finished: bool [B].
        segment: int32 [B], index of the last token's document within its sequence.
    """

    cache: Cache
    tokens: jax.Array
    token_mask: jax.Array
    log_probs: jax.Array
    column: jax.Array
    drawn: jax.Array
    finished: jax.Array
    segment: jax.Array


@partial(jax.jit, static_argnames=("config", "vocab_size", "end_of_text", "columns", "filtered"))
def prefill(
    config: ModelConfig,
    params: Params,
    step: jax.Array,
    prompts: jax.Array,
    token_mask: jax.Array,
    sampler: Sampler,
    drawn: jax.Array,
    *,
    vocab_size: int,
    end_of_text: int,
    columns: int,
    filtered: bool,
) -> Decoding:
    """Run the model on left-padded prompts, and sample the first token after them.

    Args:
        step: int32 scalar, the number of training steps, on which an annealed temperature depends.
        prompts: int32 [B, P], P < `columns`.
        token_mask: bool [B, P], True for non-padding tokens. A sequence without any is absent, and counts as finished.
        drawn: int32 scalar, the number of tokens sampled for each sequence before the prompts were cut to this window.
        vocab_size: of the tokenizer, at most that of the model.
        columns: T, the number of columns of the token arrays and the cache.
        filtered: whether top_k or top_p exclude any token.
    """
    prompts, token_mask = replicate(prompts), replicate(token_mask)
    batch, length = prompts.shape
    positions = jnp.maximum(jnp.cumsum(token_mask, axis=1) - 1, 0)
    segments = jnp.cumsum(token_mask & (prompts == end_of_text), axis=1)
    cache = Cache.empty(config, batch, columns)
    logits, cache = _next_logits(config, params, step, prompts, token_mask, positions, segments, cache, vocab_size)
    pad = ((0, 0), (0, columns - length))
    state = Decoding(
        cache=cache,
        tokens=jnp.pad(prompts, pad, constant_values=end_of_text),
        token_mask=jnp.pad(token_mask, pad),
        log_probs=jnp.zeros((batch, columns), jnp.float32),
        column=jnp.array(length, jnp.int32),
        drawn=drawn,
        finished=~token_mask.any(axis=1),
        segment=segments[:, -1],
    )
    return _append_token(state, logits, sampler, end_of_text, filtered)


@partial(jax.jit, static_argnames=("config", "vocab_size", "end_of_text", "filtered"), donate_argnames="state")
def decode(
    config: ModelConfig,
    params: Params,
    step: jax.Array,
    state: Decoding,
    sampler: Sampler,
    until: jax.Array,
    stopped: jax.Array,
    *,
    vocab_size: int,
    end_of_text: int,
    filtered: bool,
) -> Decoding:
    """Run decode steps to fill the columns before `until` (int32 scalar, at most T), or until all are finished.

    stopped: bool [B], sequences that are finished for another reason than their tokens: a stop in their text.
    """
    state = state._replace(finished=state.finished | stopped)

    def body(state: Decoding) -> Decoding:
        previous = state.column - 1
        token, token_mask = (
            jax.lax.dynamic_slice_in_dim(a, previous, 1, axis=1) for a in (state.tokens, state.token_mask)
        )
        positions = jnp.maximum(state.token_mask.sum(axis=1, keepdims=True) - 1, 0)
        segments = state.segment[:, None]
        logits, cache = _next_logits(
            config, params, step, token, token_mask, positions, segments, state.cache, vocab_size
        )
        return _append_token(state._replace(cache=cache), logits, sampler, end_of_text, filtered)

    return jax.lax.while_loop(lambda s: (s.column < until) & ~s.finished.all(), body, state)


def _next_logits(
    config, params, step, tokens, token_mask, positions, segments, cache: Cache, vocab_size
) -> tuple[jax.Array, Cache]:
    """Run the model on the next columns [B, S]: (logits [B, V] after the last one, replicated; the updated cache)."""
    tokens, token_mask, positions, segments = (
        reshard(a, "sequences", None) for a in (tokens, token_mask, positions, segments)
    )
    context = FeedForwardContext(token_mask=token_mask, token_ids=tokens, positions=positions, step=step)
    model = bind(config, params)
    out = model(tokens, context, segments, cache)
    assert out.cache is not None
    return replicate(model.logits(replicate(replicate(out.hidden)[:, -1]), vocab_size)), out.cache


def _append_token(state: Decoding, logits, sampler, end_of_text, filtered) -> Decoding:
    """Sample one token of each sequence and write it to column `state.column`."""
    token = sample_tokens(logits, sampler, state.drawn, filtered)
    log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
    token = jnp.where(state.finished, end_of_text, token)
    log_prob = jnp.where(state.finished, 0, log_prob)

    def write(array: jax.Array, values: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(array, values[:, None].astype(array.dtype), state.column, axis=1)

    tokens, token_mask = write(state.tokens, token), write(state.token_mask, ~state.finished)
    return state._replace(
        tokens=tokens,
        token_mask=token_mask,
        log_probs=write(state.log_probs, log_prob),
        column=state.column + 1,
        drawn=state.drawn + 1,
        finished=state.finished | _ends_in_stop(tokens, state.column, sampler.stops, state.drawn + 1),
        segment=state.segment + (token == end_of_text),
    )


def sample_tokens(logits: jax.Array, sampler: Sampler, drawn: jax.Array, filtered: bool) -> jax.Array:
    """Sample one token for each sequence, int32 [B], from float32 logits [B, V].

    Tokens that tie with the least likely token admitted by top_k or top_p are admitted as well.

    Args:
        drawn: int32 scalar, the number of tokens sampled before.
        filtered: whether top_k or top_p exclude any token.
    """
    scaled = logits - logits.max(axis=-1, keepdims=True)
    scaled /= jnp.maximum(sampler.temperature, jnp.finfo(logits.dtype).tiny)
    if filtered:
        ranked = -jnp.sort(-scaled, axis=-1)
        ranked = jnp.where(jnp.arange(ranked.shape[-1]) < sampler.top_k, ranked, -jnp.inf)
        probs = jax.nn.softmax(ranked, axis=-1)
        admitted = jnp.cumsum(probs, axis=-1) - probs < sampler.top_p
        threshold = jnp.where(admitted & (ranked > -jnp.inf), ranked, jnp.inf).min(axis=-1, keepdims=True)
        scaled = jnp.where(scaled >= threshold, scaled, -jnp.inf)
    key = jax.random.fold_in(jax.random.key(sampler.seed), drawn)
    keys = jax.vmap(partial(jax.random.fold_in, key))(sampler.numbers)
    tokens = jax.vmap(jax.random.categorical)(keys, scaled)
    return jnp.where(sampler.temperature > 0, tokens, jnp.argmax(logits, axis=-1)).astype(jnp.int32)


def _ends_in_stop(tokens: jax.Array, column: jax.Array, stops: jax.Array, drawn: jax.Array) -> jax.Array:
    """Whether the last `drawn` tokens of each sequence, up to and with `column`, end in one of the `stops`: bool [B].

    The tokens of the prompt do not count. stops: int32 [n, L], see `Sampler`.
    """
    if not stops.size:
        return jnp.zeros(len(tokens), bool)
    padding, length = stops == -1, stops.shape[1]
    padded = jnp.pad(tokens, ((0, 0), (length - 1, 0)))
    last = jax.lax.dynamic_slice_in_dim(padded, column, length, axis=1)
    matches = ((last[:, None] == stops) | padding).all(axis=-1)
    return (matches & ((~padding).sum(axis=-1) <= drawn)).any(axis=-1)


def left_padded(texts: list[np.ndarray], batch_size: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Pad texts on the left: (tokens int32, non-padding mask bool), both [batch_size, width].

    Sequences without a text are padding throughout, that is absent.
    """
    tokens, token_mask = np.zeros((batch_size, width), np.int32), np.zeros((batch_size, width), bool)
    for i, text in enumerate(texts):
        tokens[i, width - len(text) :] = text
        token_mask[i, width - len(text) :] = True
    return tokens, token_mask
