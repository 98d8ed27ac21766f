"""Mixture of Tokens (arXiv 2310.15961) in JAX and Flax."""

from mot_jax.config import Config, DenseConfig, MixingConfig, MixtureOfTokensConfig, ModelConfig, load_config
from mot_jax.feed_forward import Dense, FeedForwardContext, FeedForwardOutput, MixtureOfTokens
from mot_jax.model import Transformer

__all__ = [
    "Config",
    "Dense",
    "DenseConfig",
    "FeedForwardContext",
    "FeedForwardOutput",
    "MixingConfig",
    "MixtureOfTokens",
    "MixtureOfTokensConfig",
    "ModelConfig",
    "Transformer",
    "load_config",
]
