"""What the Mixture-of-Tokens layers of a model see, out of its own forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
from flax import nnx

from mot_jax.config import ModelConfig
from mot_jax.nn.feed_forward import FeedForwardContext, FeedForwardOutput, MixtureOfTokens
from mot_jax.nn.transformer import ModelOutput, Params, bind

Look = Callable[[MixtureOfTokens, jax.Array, FeedForwardContext], dict[str, jax.Array]]

_MARK = "recorded "  # before a name, among the metrics


class _Recording(nnx.Module):
    """A layer whose metrics hold what `look` makes of its input, too: so it comes out of the scan over the blocks."""

    def __init__(self, layer: MixtureOfTokens, look: Look):
        self.layer, self.look = layer, look

    def __call__(self, x: jax.Array, context: FeedForwardContext) -> FeedForwardOutput:
        out = self.layer(x, context)
        found = {_MARK + name: value for name, value in self.look(self.layer, x, context).items()}
        return dataclasses.replace(out, metrics=out.metrics | found)


def record(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    context: FeedForwardContext,
    segments: jax.Array | None,
    look: Look,
) -> tuple[ModelOutput, dict[str, dict[int, jax.Array]]]:
    """The model's output for tokens [B, S], and what `look` finds in each mixing layer, by name and block."""
    model = bind(config, params)
    for stack in model.stacks:
        for block in stack:
            if isinstance(block.feed_forward, MixtureOfTokens):
                block.feed_forward = _Recording(block.feed_forward, look)
    out = model(tokens, context, segments)
    found: dict[str, dict[int, jax.Array]] = {}
    for key in sorted(out.metrics):
        if key.startswith(_MARK):
            name, _, index = key.removeprefix(_MARK).partition("/")
            found.setdefault(name, {})[int(index)] = out.metrics.pop(key)
    return out, found
