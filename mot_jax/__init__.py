"""Mixture of Tokens (arXiv 2310.15961) in JAX and Flax."""

import importlib
import importlib.metadata
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
    from mot_jax.training import train

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
    "train",
]

try:
    __version__ = importlib.metadata.version("mot_jax")
except importlib.metadata.PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "unknown"

# The module of each public name that needs JAX, which takes seconds to import: imported at first use.
_LAZY = {
    "Dense": "mot_jax.nn.feed_forward",
    "FeedForwardContext": "mot_jax.nn.feed_forward",
    "FeedForwardOutput": "mot_jax.nn.feed_forward",
    "LanguageModel": "mot_jax.inference.language_model",
    "MixtureOfTokens": "mot_jax.nn.feed_forward",
    "TokenChoice": "mot_jax.nn.feed_forward",
    "Transformer": "mot_jax.nn.transformer",
    "load": "mot_jax.inference.language_model",
    "train": "mot_jax.training",
}


def __getattr__(name: str) -> Any:
    """Import a public name that needs JAX."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
