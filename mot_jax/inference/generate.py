"""Generation on the device: rows are left-padded, columns are filled one by one, keys and values are kept.

A column is a step in time for all rows, so that rows of a group are mixed column by column, as in training. Where a
row's text begins is its own: attention and the companions of its tokens count from there (`context.positions`).
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
    """How a token is drawn. Arrays, so that none of them makes the program compile anew.

    temperature: float32; 0 takes the likeliest token. top_k: int32, only so many likeliest tokens, V for all. top_p:
    float32, only the likeliest that together have this probability; the one that crosses it is in. Each looks at what
    the one before has left. seed: uint32; a row's draws depend on it, on the row's index and on their number.
    stops: int32 [n, L], sequences after which a row ends, filled up on the left with -1; what holds -2 is none.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    seed: Any
    stops: Any


class Decoding(NamedTuple):
    """Text in the making: the same on every device but for the cache.

    tokens: int32 [B, T]. real: bool [B, T], False in the padding on the left and after a row's end. log_probs: float32
    [B, T], of each token that was drawn, by the model's own distribution. column: int32, the next one. drawn: int32,
    how many each row has drawn before. finished: bool [B]. segment: int32 [B], which document of its row the last
    token is of.
    """

    cache: Cache
    tokens: jax.Array
    real: jax.Array
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
    real: jax.Array,
    sampler: Sampler,
    drawn: jax.Array,
    *,
    vocab_size: int,
    end_of_text: int,
    columns: int,
    filtered: bool,
) -> Decoding:
    """Reads left-padded prompts, int32 [B, P], P < `columns`, and draws the first token after them.

    step: int32 scalar, how long the model was trained, which an annealed temperature depends on. real: bool [B, P],
    False in the padding; a row without any is absent, and finished. columns: T, room for the text.
    vocab_size: of the tokenizer; the model may have room for more. filtered: whether top_k or top_p leave any out.
    drawn: int32 scalar, the tokens that each row has drawn before this text was cut.
    """
    prompts, real = replicate(prompts), replicate(real)
    rows, length = prompts.shape
    positions = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
    segments = jnp.cumsum(real & (prompts == end_of_text), axis=1)
    cache = Cache.empty(config, rows, columns)
    logits, cache = _read(config, params, step, prompts, real, positions, segments, cache, vocab_size)
    pad = ((0, 0), (0, columns - length))
    state = Decoding(
        cache=cache,
        tokens=jnp.pad(prompts, pad, constant_values=end_of_text),
        real=jnp.pad(real, pad),
        log_probs=jnp.zeros((rows, columns), jnp.float32),
        column=jnp.array(length, jnp.int32),
        drawn=drawn,
        finished=~real.any(axis=1),
        segment=segments[:, -1],
    )
    return _draw(state, logits, sampler, end_of_text, filtered)


@partial(jax.jit, static_argnames=("config", "vocab_size", "end_of_text", "filtered"), donate_argnames="state")
def decode(
    config: ModelConfig,
    params: Params,
    step: jax.Array,
    state: Decoding,
    sampler: Sampler,
    until: jax.Array,
    *,
    vocab_size: int,
    end_of_text: int,
    filtered: bool,
) -> Decoding:
    """Fills the columns before `until` (int32 scalar, at most T), or until every row is finished."""

    def body(state: Decoding) -> Decoding:
        last = state.column - 1
        token, real = (jax.lax.dynamic_slice_in_dim(a, last, 1, axis=1) for a in (state.tokens, state.real))
        positions = jnp.maximum(state.real.sum(axis=1, keepdims=True) - 1, 0)
        segments = state.segment[:, None]
        logits, cache = _read(config, params, step, token, real, positions, segments, state.cache, vocab_size)
        return _draw(state._replace(cache=cache), logits, sampler, end_of_text, filtered)

    return jax.lax.while_loop(lambda s: (s.column < until) & ~s.finished.all(), body, state)


def _read(config, params, step, tokens, real, positions, segments, cache: Cache, vocab_size) -> tuple[jax.Array, Cache]:
    """The next columns [B, S] of the text -> (logits [B, V] after the last one, on every device; the cache)."""
    tokens, real, positions, segments = (reshard(a, "sequences", None) for a in (tokens, real, positions, segments))
    context = FeedForwardContext(token_mask=real, token_ids=tokens, positions=positions, step=step)
    model = bind(config, params)
    out = model(tokens, context, segments, cache)
    assert out.cache is not None
    return replicate(model.logits(replicate(replicate(out.hidden)[:, -1]), vocab_size)), out.cache


def _draw(state: Decoding, logits, sampler, end_of_text, filtered) -> Decoding:
    """The token of the next column."""
    token = choose(logits, sampler, state.drawn, filtered)
    log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
    token = jnp.where(state.finished, end_of_text, token)
    log_prob = jnp.where(state.finished, 0, log_prob)

    def write(array: jax.Array, column: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(array, column[:, None].astype(array.dtype), state.column, axis=1)

    tokens, real = write(state.tokens, token), write(state.real, ~state.finished)
    return state._replace(
        tokens=tokens,
        real=real,
        log_probs=write(state.log_probs, log_prob),
        column=state.column + 1,
        drawn=state.drawn + 1,
        finished=state.finished | _ended(tokens, state.column, sampler.stops, state.drawn + 1),
        segment=state.segment + (token == end_of_text),
    )


def choose(logits: jax.Array, sampler: Sampler, number: jax.Array, filtered: bool) -> jax.Array:
    """A token for each row, int32 [B], from logits [B, V] in float32; number: int32, how many were drawn before.

    Tokens as likely as the last one that top_k or top_p keep are kept as well.
    """
    scaled = logits - logits.max(axis=-1, keepdims=True)
    scaled /= jnp.maximum(sampler.temperature, jnp.finfo(logits.dtype).tiny)
    if filtered:
        ranked = -jnp.sort(-scaled, axis=-1)
        ranked = jnp.where(jnp.arange(ranked.shape[-1]) < sampler.top_k, ranked, -jnp.inf)
        shares = jax.nn.softmax(ranked, axis=-1)
        kept = jnp.cumsum(shares, axis=-1) - shares < sampler.top_p
        least = jnp.where(kept & (ranked > -jnp.inf), ranked, jnp.inf).min(axis=-1, keepdims=True)
        scaled = jnp.where(scaled >= least, scaled, -jnp.inf)
    drawn = jax.random.categorical(jax.random.fold_in(jax.random.key(sampler.seed), number), scaled)
    return jnp.where(sampler.temperature > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)


def _ended(tokens: jax.Array, column: jax.Array, stops: jax.Array, drawn: jax.Array) -> jax.Array:
    """bool [B]: whether what a row has drawn, so many tokens up to `column`, ends in one of the `stops` [n, L]."""
    if not stops.size:
        return jnp.zeros(len(tokens), bool)
    any_token, length = stops == -1, stops.shape[1]
    padded = jnp.pad(tokens, ((0, 0), (length - 1, 0)))
    last = jax.lax.dynamic_slice_in_dim(padded, column, length, axis=1)
    same = ((last[:, None] == stops) | any_token).all(axis=-1)
    return (same & ((~any_token).sum(axis=-1) <= drawn)).any(axis=-1)


def left_padded(texts: list[np.ndarray], rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [rows, width], real bool): each text at the right end of its row; rows without one are absent."""
    tokens, real = np.zeros((rows, width), np.int32), np.zeros((rows, width), bool)
    for row, text in enumerate(texts):
        tokens[row, width - len(text) :] = text
        real[row, width - len(text) :] = True
    return tokens, real


@partial(jax.jit, static_argnames=("config", "vocab_size"))
def fill(
    config: ModelConfig,
    params: Params,
    step: jax.Array,
    tokens: jax.Array,
    real: jax.Array,
    segments: jax.Array | None,
    vocab_size: int,
) -> tuple[jax.Array, jax.Array]:
    """The likeliest token of every place by a masked model, int32 [B, S], and its log-probability, float32 [B, S].

    step: as in `prefill`. tokens: int32 [B, S], with mask tokens in the gaps. real: bool [B, S]. segments: int32 [B,
    S], see `Transformer`.
    """
    tokens, real = reshard(tokens, "sequences", None), reshard(real, "sequences", None)
    segments = None if segments is None else reshard(segments, "sequences", None)
    model = bind(config, params)
    hidden = model(tokens, FeedForwardContext(real, tokens, step=step), segments).hidden
    log_probs = jax.nn.log_softmax(model.logits(hidden, vocab_size), axis=-1)
    return replicate(jnp.argmax(log_probs, axis=-1)), replicate(log_probs.max(axis=-1))
