"""Mixture of Tokens (arXiv 2310.15961) in JAX and Flax."""

import importlib
from typing import TYPE_CHECKING, Any

from mot_jax.config import Config, DenseConfig, MixingConfig, MixtureOfTokensConfig, ModelConfig, load_config

if TYPE_CHECKING:
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


def __getattr__(name: str) -> Any:
    """The names that need JAX, which takes seconds to import: commands and processes about text do without it."""
    if name in __all__:
        module = "mot_jax.model" if name == "Transformer" else "mot_jax.feed_forward"
        return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
