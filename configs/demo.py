"""placeholder"""

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
    return Config(
        model=ModelConfig(
            num_blocks=4,
            d_model=128,
            d_ff=512,
            num_heads=4,
            context_length=128,
            final_norm=True,
            init=InitConfig(scale=1.0),
            loss_chunk=64,
            feed_forward=MixtureOfTokensConfig(group_size=32, num_experts=128, controller_init_scale=3.0),
        ),
        data=DataConfig(validation_windows=512),
        training=TrainingConfig(batch_size=32, steps=600, optimizer=OptimizerConfig(learning_rate=4e-3)),
    )
