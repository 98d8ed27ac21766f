"""Mixture of Tokens (arXiv 2310.15961) in JAX and Flax."""

import importlib
from typing import TYPE_CHECKING, Any

from mot_jax.config import (
    Config,
    DenseConfig,
    MixingConfig,
    MixtureOfTokensConfig,
    ModelConfig,
    TokenChoiceConfig,
    load_config,
)

if TYPE_CHECKING:
    from mot_jax.inference.language_model import LanguageModel, load
    from mot_jax.nn.feed_forward import Dense, FeedForwardContext, FeedForwardOutput, MixtureOfTokens, TokenChoice
    from mot_jax.nn.transformer import Transformer

__all__ = [
    "Config",
    "Dense",
    "DenseConfig",
    "FeedForwardContext",
    "FeedForwardOutput",
    "LanguageModel",
    "MixingConfig",
    "MixtureOfTokens",
    "MixtureOfTokensConfig",
    "ModelConfig",
    "TokenChoice",
    "TokenChoiceConfig",
    "Transformer",
    "load",
    "load_config",
]


def __getattr__(name: str) -> Any:
    """The names that need JAX, which takes seconds to import: commands and processes about text do without it."""
    if name in __all__:
        places = {"Transformer": "mot_jax.nn.transformer"}
        places |= dict.fromkeys(["LanguageModel", "load"], "mot_jax.inference.language_model")
        return getattr(importlib.import_module(places.get(name, "mot_jax.nn.feed_forward")), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
