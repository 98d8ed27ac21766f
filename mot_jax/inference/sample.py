"""Text from a model, a whole group at a time, as it was trained: each new token costs a full forward pass."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from mot_jax.config import ModelConfig
from mot_jax.feed_forward import FeedForwardContext
from mot_jax.model import Params, bind


@partial(jax.jit, static_argnames=("config", "length", "vocab_size", "temperature"))
def sample(
    config: ModelConfig,
    params: Params,
    prompts: jax.Array,
    present: jax.Array,
    key: jax.Array,
    length: int,
    vocab_size: int,
    temperature: float = 0.7,
) -> jax.Array:
    """Continues every row of `prompts` by `length` tokens, drawn from softmax(logits / temperature).

    The rows are whole groups, and rows of a group influence each other. Text longer than the context slides through it.

    prompts: int32 [B, P], P at most the context length. present: bool [B]; other rows are left out of the mixing.
    vocab_size: of the tokenizer; the model may have room for more.
    Returns int32 [B, P + length].
    """
    prompt = prompts.shape[1]
    window = min(config.context_length, prompt + length)
    model = bind(config, params)
    text = jnp.pad(prompts, ((0, 0), (0, length)))
    mask = jnp.repeat(present[:, None], window, axis=1)

    def body(i: jax.Array, text: jax.Array) -> jax.Array:
        # What lies behind the last token so far is padding, which no earlier position sees.
        begin = jnp.maximum(prompt + i - window, 0)
        tokens = jax.lax.dynamic_slice_in_dim(text, begin, window, axis=1)
        hidden = model(tokens, FeedForwardContext(token_mask=mask, token_ids=tokens)).hidden
        last = jax.lax.dynamic_index_in_dim(hidden, prompt + i - begin - 1, axis=1, keepdims=False)
        logits = model.logits(last)
        logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)
        token = jax.random.categorical(jax.random.fold_in(key, i), logits / temperature)
        return jax.lax.dynamic_update_index_in_dim(text, token.astype(text.dtype), prompt + i, axis=1)

    return jax.lax.fori_loop(0, length, body, text)
