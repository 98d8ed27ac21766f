"""A run so small that a step takes milliseconds, with everything in it that a large one has."""

from __future__ import annotations

from pathlib import Path

import pytest

from mot_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    LoggingConfig,
    MeshConfig,
    MixtureOfTokensConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Two blocks, groups of 4, 32 rows of 16 bytes of the standard library."""
    data: Path = tmp_path_factory.mktemp("data")
    return Config(
        model=ModelConfig(
            num_blocks=2,
            d_model=16,
            d_ff=32,
            num_heads=4,
            context_length=16,
            loss_chunk=8,
            feed_forward=MixtureOfTokensConfig(
                group_size=4, num_experts=8, shared_expert_dim=8, controller_init_scale=3.0
            ),
        ),
        data=DataConfig(directory=str(data), validation_split="validation[:10%]", validation_windows=64),
        training=TrainingConfig(
            steps=12,
            batch_size=32,
            optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=4),
            log_every=1,
            validate_every=6,
            checkpoint_every=4,
        ),
        mesh=MeshConfig(data=1, expert=1),
        checkpoint=CheckpointConfig(max_to_keep=2),
        logging=LoggingConfig(tensorboard=True, sample_tokens=8),
    )
