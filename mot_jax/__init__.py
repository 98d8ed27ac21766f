"""Mixture of Tokens (arXiv 2310.15961) in JAX and Flax."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mot_jax.config import (
    Config,
    DenseConfig,
    ExpertChoiceConfig,
    ExpertThresholdConfig,
    HashConfig,
    MixingConfig,
    MixtureOfTokensConfig,
    ModelConfig,
    ReluRoutingConfig,
    SoftMoEConfig,
    TokenChoiceConfig,
    load_config,
)

if TYPE_CHECKING:
    from etils import epath

    from mot_jax.cost.register import register_kind
    from mot_jax.inference.language_model import LanguageModel, load
    from mot_jax.nn.feed_forward import (
        Dense,
        ExpertChoice,
        ExpertThreshold,
        FeedForwardContext,
        FeedForwardOutput,
        Hash,
        MixtureOfTokens,
        ReluRouting,
        RouterState,
        SoftMoE,
        TokenChoice,
        update_router_state,
    )
    from mot_jax.nn.transformer import Transformer
    from mot_jax.training import Hook

__all__ = [
    "Config",
    "Dense",
    "DenseConfig",
    "ExpertChoice",
    "ExpertChoiceConfig",
    "ExpertThreshold",
    "ExpertThresholdConfig",
    "FeedForwardContext",
    "FeedForwardOutput",
    "Hash",
    "HashConfig",
    "LanguageModel",
    "MixingConfig",
    "MixtureOfTokens",
    "MixtureOfTokensConfig",
    "ModelConfig",
    "ReluRouting",
    "ReluRoutingConfig",
    "RouterState",
    "SoftMoE",
    "SoftMoEConfig",
    "TokenChoice",
    "TokenChoiceConfig",
    "Transformer",
    "load",
    "load_config",
    "register_kind",
    "train",
    "update_router_state",
]

try:
    __version__ = importlib.metadata.version("mot_jax")
except importlib.metadata.PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "unknown"

# The module of each public name that needs JAX, which takes seconds to import: imported at first use.
_LAZY = {
    "Dense": "mot_jax.nn.feed_forward",
    "ExpertChoice": "mot_jax.nn.feed_forward",
    "ExpertThreshold": "mot_jax.nn.feed_forward",
    "FeedForwardContext": "mot_jax.nn.feed_forward",
    "FeedForwardOutput": "mot_jax.nn.feed_forward",
    "Hash": "mot_jax.nn.feed_forward",
    "LanguageModel": "mot_jax.inference.language_model",
    "MixtureOfTokens": "mot_jax.nn.feed_forward",
    "ReluRouting": "mot_jax.nn.feed_forward",
    "RouterState": "mot_jax.nn.feed_forward",
    "SoftMoE": "mot_jax.nn.feed_forward",
    "TokenChoice": "mot_jax.nn.feed_forward",
    "Transformer": "mot_jax.nn.transformer",
    "load": "mot_jax.inference.language_model",
    "register_kind": "mot_jax.cost.register",
    "update_router_state": "mot_jax.nn.feed_forward",
}


def train(
    config: Config, workdir: epath.PathLike, hooks: Sequence[Hook] = (), take_over: bool = False
) -> dict[str, Any]:
    """Train a model, or resume the run in `workdir`, as `mot train` does.

    This is `mot_jax.training.train` with a `SampleHook`: at the end of the run it writes `sample.txt`, a text of
    `config.logging.sample_tokens` tokens, unless that is 0.

    Args:
        config: the experiment.
        workdir: the directory of the run: new, empty, or that of the same experiment.
        hooks: called in each step, in addition to those that log, validate and save checkpoints.
        take_over: do not wait for another run that is in progress in `workdir`, but end it.

    Returns:
        The last validation row: loss in nats per token, bits_per_byte, ...

    Raises:
        UserError: before the workdir is touched, for every error in the config, the workdir or the data.
        RetryableError: if another run is in progress in the workdir, or a store fails.
        DivergedError: if the loss or gradient is not finite for `training.max_skipped` steps in a row.
    """
    from mot_jax import training
    from mot_jax.inference.sample import SampleHook

    return training.train(config, workdir, [*hooks, SampleHook()], take_over)


def __getattr__(name: str) -> Any:
    """Import a public name that needs JAX."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
