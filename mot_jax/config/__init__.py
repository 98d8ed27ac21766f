"""Experiment configuration: fields, checks, files."""

from mot_jax.config.checks import attention_fault, check, kernel_faults, mixing_faults, platform_faults
from mot_jax.config.errors import ConfigError, TransientError, nearest
from mot_jax.config.fields import (
    CheckpointConfig,
    CompanionsConfig,
    Config,
    DataConfig,
    DenseConfig,
    FeedForwardConfig,
    InitConfig,
    LoggingConfig,
    LossWeights,
    MeshConfig,
    MixingConfig,
    MixtureOfTokensConfig,
    ModelConfig,
    OptimizerConfig,
    TokenChoiceConfig,
    TrainingConfig,
)
from mot_jax.config.files import FORMAT_VERSION, error_words, from_json, identity_changes, load_config, to_json
from mot_jax.config.hints import leaves, type_words

__all__ = [
    "FORMAT_VERSION",
    "CheckpointConfig",
    "CompanionsConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DenseConfig",
    "FeedForwardConfig",
    "InitConfig",
    "LoggingConfig",
    "LossWeights",
    "MeshConfig",
    "MixingConfig",
    "MixtureOfTokensConfig",
    "ModelConfig",
    "OptimizerConfig",
    "TokenChoiceConfig",
    "TrainingConfig",
    "TransientError",
    "attention_fault",
    "check",
    "error_words",
    "from_json",
    "identity_changes",
    "kernel_faults",
    "leaves",
    "load_config",
    "mixing_faults",
    "nearest",
    "platform_faults",
    "to_json",
    "type_words",
]
