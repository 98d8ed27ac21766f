"""Text from a model for people to read, a whole group at a time, as it was trained: no cache, no modes."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mot_jax.config import Config, ModelConfig
from mot_jax.data.objectives import Batch, Objective
from mot_jax.data.pipeline import validation_batches
from mot_jax.data.tokenizers import Tokenizer
from mot_jax.data.windows import Windows
from mot_jax.feed_forward import FeedForwardContext
from mot_jax.model import Params, bind
from mot_jax.sharding import local_rows, place_rows, reshard, rows_multiple, whole


def sample_text(config: Config, mesh: Mesh, params: Params, windows: Windows, tokenizer: Tokenizer) -> str:
    """A group of validation texts, continued by the model, or with its guesses where a masked model has gaps."""
    size = rows_multiple(config, mesh)
    objective = Objective.of(config, tokenizer)

    def read(rows: np.ndarray) -> Batch:
        return next(validation_batches(windows, objective, config.group_size, size, rows, None))

    batch, shown = read(local_rows(mesh, size)), read(np.arange(config.group_size))

    def words(tokens: np.ndarray) -> str:
        return tokenizer.decode(tokens).decode(errors="replace")

    if objective.masked:
        found = fill(config.model, params, place_rows(mesh, batch, size), tokenizer.vocab_size)
        texts = []
        guessed_rows = np.asarray(found)[: config.group_size]
        for row, guesses, hidden in zip(shown.inputs, guessed_rows, shown.target_mask, strict=True):
            pieces = [_GAP if gap else words(token[None]) for token, gap in zip(row, hidden, strict=True)]
            guessed = words(np.where(hidden, guesses, row))
            texts.append(f"--- prompt\n{''.join(pieces)}\n--- filled\n{guessed}\n")
        return "\n".join(texts)
    prompt = config.model.context_length // 2
    prompts, present = place_rows(mesh, (batch.inputs[:, :prompt], batch.token_mask[:, 0]), size)
    key = jax.random.key(config.training.seed)
    length = config.logging.sample_tokens
    sizes = {"length": length, "vocab_size": tokenizer.vocab_size, "end_of_text": tokenizer.end_of_text}
    tokens = np.asarray(sample(config.model, params, prompts, present, key, **sizes))
    continued = [(words(row[:prompt]), words(row[prompt:])) for row in tokens[: config.group_size]]
    return "\n".join(f"--- prompt\n{begin}\n--- continued\n{end}\n" for begin, end in continued)


_GAP = "\N{WHITE SQUARE}"


@partial(jax.jit, static_argnames=("config", "vocab_size"))
def fill(config: ModelConfig, params: Params, batch: Batch, vocab_size: int) -> jax.Array:
    """The likeliest token of every place, int32 [B, S], by a masked model."""
    model = bind(config, params)
    out = model(batch.inputs, FeedForwardContext(batch.token_mask, batch.inputs), batch.segments)
    logits = model.logits(out.hidden)
    likeliest = jnp.argmax(jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf), axis=-1)
    return whole(likeliest)


@partial(jax.jit, static_argnames=("config", "length", "vocab_size", "end_of_text", "temperature"))
def sample(
    config: ModelConfig,
    params: Params,
    prompts: jax.Array,
    present: jax.Array,
    key: jax.Array,
    length: int,
    vocab_size: int,
    end_of_text: int,
    temperature: float = 0.7,
) -> jax.Array:
    """Continues every row of `prompts` by `length` tokens, drawn from softmax(logits / temperature).

    The rows are whole groups, and rows of a group influence each other. Text longer than the context slides through it.

    prompts: int32 [B, P], P at most the context length. present: bool [B]; other rows are left out of the mixing.
    vocab_size: of the tokenizer; the model may have room for more. end_of_text: begins a document.
    Returns int32 [B, P + length].
    """
    prompt, window = prompts.shape[1], config.context_length  # whole windows, of which the mesh can exchange parts
    model = bind(config, params)
    text = jnp.pad(prompts, ((0, 0), (0, max(length, window - prompt))))
    mask = jnp.repeat(present[:, None], window, axis=1)

    def body(i: jax.Array, text: jax.Array) -> jax.Array:
        # What lies behind the last token so far is padding, which no earlier position sees.
        begin = jnp.maximum(prompt + i - window, 0)
        tokens = jax.lax.dynamic_slice_in_dim(text, begin, window, axis=1)
        segments = jnp.cumsum(tokens == end_of_text, axis=1)
        hidden = model(tokens, FeedForwardContext(token_mask=mask, token_ids=tokens), segments).hidden
        hidden = reshard(hidden, "rows", None, None)
        last = jax.lax.dynamic_index_in_dim(hidden, prompt + i - begin - 1, axis=1, keepdims=False)
        logits = model.logits(last)
        logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)
        token = jax.random.categorical(jax.random.fold_in(key, i), logits / temperature)
        return jax.lax.dynamic_update_index_in_dim(text, token.astype(text.dtype), prompt + i, axis=1)

    text = jax.lax.fori_loop(0, length, body, text)[:, : prompt + length]
    return whole(text)
