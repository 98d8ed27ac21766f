"""Mixture of Tokens as in version 1 of the paper: 4 blocks, d_model 256, groups of 32, 512 experts of width 64.

Command:    python train.py configs/v1_mot.py   (prepare the text first: docs/reproduce.md)
Parameters: 94.5 M (16.5 M active)
The paper:  final loss 3.7989 on C4 after 250,000 steps, against 4.0026 of its dense twin (configs/v1_dense.py).
Here:       not run.
"""

from mot_jax.config import (
    Config,
    DataConfig,
    InitConfig,
    MixtureOfTokensConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)


def get_config() -> Config:
    """The config of this experiment."""
    return Config(
        model=ModelConfig(
            num_blocks=4,
            d_model=256,
            d_ff=1024,
            num_heads=4,
            context_length=256,
            vocab_size=50_257,
            feed_forward=MixtureOfTokensConfig(group_size=32, num_experts=512),  # width 64, by the rule
            init=InitConfig(distribution="uniform", scale=1.0, cut=None),
            dtype="bfloat16",
            scan_layers=False,  # a loop over blocks moves far more bytes (docs/performance.md)
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
