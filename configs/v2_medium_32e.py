"""MoT-Medium/32E of version 2 of the paper: 32 experts of the dense width, in the last half of the blocks.

Command:    python train.py configs/v2_medium_32e.py   (prepare the text first: docs/reproduce.md)
Parameters: 336.9 M (51.0 M active)
The paper:  figures; its best MoT reaches the dense final loss with 33 % of the compute.
Here:       not run.
"""

from mot_jax.config import Config, DataConfig, MixtureOfTokensConfig, ModelConfig, OptimizerConfig, TrainingConfig


def get_config() -> Config:
    """The config of this experiment; the others of the paper's second version are this one with a few changes."""
    return Config(
        model=ModelConfig(
            num_blocks=8,
            d_model=512,
            d_ff=2048,
            num_heads=8,
            context_length=256,
            vocab_size=50_257,
            feed_forward=MixtureOfTokensConfig(group_size=32, num_experts=32),  # of width 2048, by the rule
            moe_blocks="last_half",
            dtype="bfloat16",
            scan_layers=False,  # a loop over blocks moves far more bytes (docs/performance.md)
        ),
        data=DataConfig(corpus=("c4/en",), tokenizer="tokenizers/gpt2.json", validation_windows=16_384),
        training=TrainingConfig(
            steps=150_000,
            batch_size=256,
            optimizer=OptimizerConfig(learning_rate=7e-4, warmup_steps=2_500),
            log_every=100,
            validate_every=5_000,
            checkpoint_every=5_000,
        ),
    )
