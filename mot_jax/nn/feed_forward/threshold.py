"""A Mixture-of-Tokens layer run as a sparse mixture of experts with a threshold for each expert: no token is mixed.

In training, a token with logit l has the weight exp(l / T) / (exp(l / T) + sum over the others of its group) for an
expert. With the sum replaced by its mean over the training text, (G - 1) mean exp(l / T), that weight is

    gate = sigmoid(l / T - z),    z = log((G - 1) mean exp(l / T))

An expert processes the tokens, unmixed, whose gate is among the largest E / G of E of the training text, and the update
of a token is the sum of its experts' outputs times their gates. Inference mode `threshold`; `modes.thresholds` measures
the constants. A token depends on no other token of the layer's input.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from mot_jax.config import ThresholdConfig
from mot_jax.nn import routing
from mot_jax.nn.feed_forward.companions import Summary
from mot_jax.nn.feed_forward.interface import FeedForwardContext, FeedForwardOutput, LayerOptions, activate
from mot_jax.nn.feed_forward.mixture_of_tokens import MixtureOfTokens
from mot_jax.nn.sharding import axes_of, reshard
from mot_jax.runtime.compilation import default_promotion


class Threshold(MixtureOfTokens):
    """The layer of a trained `MixtureOfTokens`, with its parameters, whose experts choose tokens by thresholds.

    In addition to the parameters it has two constants, float32 [E], zero until they are assigned:

    gate_offset: z of the gate.
    logit_threshold: the smallest l / T with which a token is processed by the expert.
    """

    config_type = ThresholdConfig
    config: ThresholdConfig

    def _create_parameters(self, options: LayerOptions) -> None:
        super()._create_parameters(options)
        self.gate_offset = Summary(jnp.zeros(self.config.num_experts))
        self.logit_threshold = Summary(jnp.zeros(self.config.num_experts))

    @default_promotion()
    def __call__(self, x: jax.Array, context: FeedForwardContext = FeedForwardContext()) -> FeedForwardOutput:
        """x [B, S, D] -> update [B, S, D] in the layer's dtype, for any B."""
        x = x.astype(self.dtype)
        logits = scaled_logits(self, x, context)
        taken = logits >= self.logit_threshold[...]
        if context.token_mask is not None:
            taken &= reshard(context.token_mask, *axes_of(x)[:2])[..., None]
        gates = jnp.where(taken, jax.nn.sigmoid(logits - self.gate_offset[...]), 0)
        act = functools.partial(activate, self.activation)
        y = reshard(routing.sum_all_experts(x, gates, act, *self._expert_parameters()), *axes_of(x))
        if self.shared is not None:
            y += self.shared(x, context).y
        return FeedForwardOutput(y)


def scaled_logits(layer: MixtureOfTokens, x: jax.Array, context: FeedForwardContext) -> jax.Array:
    """x [B, S, D] -> the controller's logits divided by the temperature of the step, [B, S, E].

    Computed in float32 (or wider), since a rounded logit may be on the other side of its threshold.
    """
    logits = routing.router_logits("bsd,de->bse", x.astype(layer.dtype), layer.controller[...])
    return logits / layer.temperatures(context)[0]
