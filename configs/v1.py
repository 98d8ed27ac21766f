"""The models of version 1 of the paper (arXiv 2310.15961v1): 4 blocks, d_model 256. `mot` is the default variant."""

import dataclasses

from mot_jax.config import (
    Config,
    DataConfig,
    DenseConfig,
    InitConfig,
    MixtureOfTokensConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
    select,
)


def mot() -> Config:
    """Mixture of Tokens with groups of 32 and 512 experts of width 64.

    Command:    python train.py configs/v1.py   (prepare the dataset first: docs/reproduce.md)
    Parameters: 94.5 M (16.5 M active)
    The paper:  final loss 3.7989 on C4 after 250,000 steps, against 4.0026 of the dense baseline.
    Here:       not run.
    """
    return Config(
        model=ModelConfig(
            num_blocks=4,
            d_model=256,
            d_ff=1024,
            num_heads=4,
            context_length=256,
            vocab_size=50_257,
            feed_forward=MixtureOfTokensConfig(group_size=32, num_experts=512),  # width 64, by the default rule
            init=InitConfig(distribution="uniform", scale=1.0, cut=None),
            dtype="bfloat16",
            scan_layers=False,  # a scan over blocks moves far more bytes (docs/notes/2026-11-26-step.md)
        ),
        data=DataConfig(corpus=("c4/en",), tokenizer="tokenizers/gpt2.json", validation_windows=16_384),
        training=TrainingConfig(
            steps=250_000,
            batch_size=256,
            optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=2_500, min_lr_ratio=0.1),
            log_every=100,
            validate_every=5_000,
            checkpoint_every=5_000,
        ),
    )


def dense() -> Config:
    """The FLOP-matched dense baseline of `mot`, with twice its learning rate and the same batches.

    Command:    python train.py configs/v1.py:dense   (prepare the dataset first: docs/reproduce.md)
    Parameters: 29.0 M (16.0 M active)
    The paper:  final loss 4.0026 on C4 after 250,000 steps.
    Here:       not run.
    """
    config = mot()
    optimizer = dataclasses.replace(config.training.optimizer, learning_rate=4e-3)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, feed_forward=DenseConfig()),
        data=dataclasses.replace(config.data, shuffle_group_size=config.group_size),  # the same batches
        training=dataclasses.replace(config.training, optimizer=optimizer),
    )


VARIANTS = {"mot": mot, "dense": dense}


def get_config(variant: str | None = None) -> Config:
    """The config of this variant, by default `mot`."""
    return select(VARIANTS, variant)
