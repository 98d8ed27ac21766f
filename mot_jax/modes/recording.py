"""Record values of the feed-forward layers (their inputs, weights, …) during a forward pass of the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from mot_jax.config import ModelConfig
from mot_jax.nn.feed_forward import FeedForward, FeedForwardContext, FeedForwardOutput, MixtureOfTokens
from mot_jax.nn.transformer import ModelOutput, Params, bind

# (layer, its input [B, S, D], context) -> values by name.
Recorder = Callable[[Any, jax.Array, FeedForwardContext], dict[str, jax.Array]]

_PREFIX = "recorded "  # of the recorded values among the metrics


class _RecordingLayer(nnx.Module):
    """A layer that adds the values of a recorder to its metrics, which the scan over the blocks returns."""

    def __init__(self, layer: FeedForward, recorder: Recorder):
        self.layer, self.recorder = layer, recorder

    def __call__(self, x: jax.Array, context: FeedForwardContext) -> FeedForwardOutput:
        out = self.layer(x, context)
        values = {_PREFIX + name: value for name, value in self.recorder(self.layer, x, context).items()}
        return dataclasses.replace(out, metrics=out.metrics | values)


def record(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    context: FeedForwardContext,
    segments: jax.Array | None,
    recorder: Recorder,
    layer_type: type[FeedForward] = MixtureOfTokens,
) -> tuple[ModelOutput, dict[str, dict[int, jax.Array]]]:
    """Run the model on tokens [B, S]: its output, and the recorded values of each layer of a type by name and block."""
    model = bind(config, params)
    for stack in model.stacks:
        for block in stack:
            if isinstance(block.feed_forward, layer_type):
                block.feed_forward = _RecordingLayer(block.feed_forward, recorder)
    out = model(tokens, context, segments)
    recorded: dict[str, dict[int, jax.Array]] = {}
    for key in sorted(out.metrics):
        if key.startswith(_PREFIX):
            name, _, block_index = key.removeprefix(_PREFIX).partition("/")
            recorded.setdefault(name, {})[int(block_index)] = out.metrics.pop(key)
    return out, recorded
