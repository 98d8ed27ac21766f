"""A study of three kinds that only shows that studies work: 60 steps of tiny models of Python source.

Command: mot bench train configs/studies/smoke.py --workdir runs/smoke
Here:    about 2 minutes on two CPU cores (Python 3.13). Its losses are no results: the models have barely begun to
         learn.
"""

import dataclasses

from mot_jax.benchmark.study import Study
from mot_jax.config import (
    Config,
    DataConfig,
    InitConfig,
    LossWeights,
    MeshConfig,
    MixtureOfTokensConfig,
    ModelConfig,
    OptimizerConfig,
    TokenChoiceConfig,
    TrainingConfig,
)
from mot_jax.cost.matched import matched


def mixture_of_tokens() -> Config:
    """Two blocks, groups of 4, 8 experts."""
    return Config(
        model=ModelConfig(
            num_blocks=2,
            d_model=32,
            d_ff=128,
            num_heads=2,
            context_length=32,
            feed_forward=MixtureOfTokensConfig(group_size=4, num_experts=8, controller_init_scale=3.0),
            final_norm=True,
            init=InitConfig(scale=1.0),
            loss_chunk=32,
        ),
        data=DataConfig(validation_split="validation[:10%]"),
        training=TrainingConfig(
            steps=60,
            batch_size=16,
            optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=10, beta2=0.95, clip_norm=1.0),
            log_every=2,
            validate_every=15,
            checkpoint_every=30,
        ),
        mesh=MeshConfig(data=1, expert=1),  # one device, also where there are more
    )


def token_choice(base: Config) -> Config:
    """Token choice with the same FLOPs of the layer, and the load-balancing loss of its papers."""
    config = matched(base, "token_choice", "expert_flops")
    kind = config.model.feed_forward
    assert isinstance(kind, TokenChoiceConfig)
    model = dataclasses.replace(config.model, feed_forward=dataclasses.replace(kind, capacity_factor=2.0))
    training = dataclasses.replace(config.training, losses=LossWeights(load_balancing=0.01))
    return dataclasses.replace(config, model=model, training=training)


def get_study() -> Study:
    """The study."""
    base = mixture_of_tokens()
    return Study(
        title="Smoke study: three kinds, 60 steps",
        entrants={
            "dense": matched(base, "dense", "expert_flops"),
            "mixture_of_tokens": base,
            "token_choice": token_choice(base),
        },
        budget_hours=0.2,
        seeds=(1, 2),
        rate_factors=(0.5, 1.0, 2.0),
        max_extensions=1,
        horizons=(0.5, 0.75),
        overhead_seconds=8.0,
    )
