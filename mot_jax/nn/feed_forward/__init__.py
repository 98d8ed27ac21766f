"""The feed-forward layers, one kind per file, and the table from the config class of a kind to its layer.

`docs/add-a-kind.md` has the steps that add a kind.
"""

from __future__ import annotations

from flax import nnx

from mot_jax.config import (
    CompanionsConfig,
    DenseConfig,
    ExpertChoiceConfig,
    ExpertThresholdConfig,
    FeedForwardConfig,
    HashConfig,
    MixtureOfTokensConfig,
    ModelConfig,
    ReluRoutingConfig,
    SoftMoEConfig,
    ThresholdConfig,
    TokenChoiceConfig,
)
from mot_jax.nn.feed_forward.companions import Companions
from mot_jax.nn.feed_forward.dense import Dense
from mot_jax.nn.feed_forward.expert_choice import ExpertChoice
from mot_jax.nn.feed_forward.expert_threshold import ExpertThreshold
from mot_jax.nn.feed_forward.hash import Hash
from mot_jax.nn.feed_forward.interface import (
    FeedForward,
    FeedForwardContext,
    FeedForwardOutput,
    RouterState,
    update_router_state,
)
from mot_jax.nn.feed_forward.mixture_of_tokens import MixtureOfTokens
from mot_jax.nn.feed_forward.relu_routing import ReluRouting
from mot_jax.nn.feed_forward.soft_moe import SoftMoE
from mot_jax.nn.feed_forward.threshold import Threshold
from mot_jax.nn.feed_forward.token_choice import TokenChoice

KINDS: dict[type, type[FeedForward]] = {
    DenseConfig: Dense,
    MixtureOfTokensConfig: MixtureOfTokens,
    CompanionsConfig: Companions,
    ThresholdConfig: Threshold,
    TokenChoiceConfig: TokenChoice,
    ExpertThresholdConfig: ExpertThreshold,
    ExpertChoiceConfig: ExpertChoice,
    ReluRoutingConfig: ReluRouting,
    HashConfig: Hash,
    SoftMoEConfig: SoftMoE,
}

__all__ = [
    "KINDS",
    "Companions",
    "Dense",
    "ExpertChoice",
    "ExpertThreshold",
    "FeedForward",
    "FeedForwardContext",
    "FeedForwardOutput",
    "Hash",
    "MixtureOfTokens",
    "ReluRouting",
    "RouterState",
    "SoftMoE",
    "Threshold",
    "TokenChoice",
    "make_feed_forward",
    "update_router_state",
]


def make_feed_forward(model: ModelConfig, kind: FeedForwardConfig, rngs: nnx.Rngs) -> FeedForward:
    """Create the layer of this kind, with the model's widths, activation, init and dtypes."""
    return KINDS[type(kind)](
        model.d_model,
        model.d_ff,
        kind.for_model(model),
        activation=model.activation,
        gated=model.gated,
        init=model.init,
        dtype=model.dtype,
        param_dtype=model.param_dtype,
        rngs=rngs,
    )
