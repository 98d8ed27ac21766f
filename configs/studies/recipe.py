"""A study of recipes of Mixture of Tokens, as small models of Python source: which one wins in time, if any does?

Command: mot bench train configs/studies/recipe.py --workdir runs/recipe
Here:    has not been run.

Every recipe differs in one respect from `mixture_of_tokens`, the model of `configs/studies/demo.py`: in the blocks that
mix, in the size of groups, with four experts for each of their sequences, in the number of experts and so the cost of
mixing, in the width of the shared expert, in the temperature, which falls to a quarter, or in the learning rate of the
controller. The report has steps, FLOPs and seconds to the loss of the dense model; a recipe wins in time if it needs
fewer seconds. All batches have 32 sequences of different documents.
"""

from dataclasses import replace
from typing import Literal

from mot_jax.benchmark.study import Study
from mot_jax.config import (
    Config,
    DataConfig,
    DenseConfig,
    FeedForwardConfig,
    InitConfig,
    MeshConfig,
    MixingConfig,
    MixtureOfTokensConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)

GROUP_SIZE, EXPERTS, SHARED = 32, 128, 96
BATCH, CONTEXT, STEPS = 32, 64, 1600

MIXTURE_OF_TOKENS = MixtureOfTokensConfig(
    group_size=GROUP_SIZE, num_experts=EXPERTS, shared_expert_dim=SHARED, controller_init_scale=3.0
)
# Towards one-hot weights, of which each expert takes a single token, as in expert choice.
ANNEALED = MixingConfig(annealing="linear", final_temperature=0.25, annealing_steps=(0, STEPS))


def config(
    layer: FeedForwardConfig,
    moe_blocks: Literal["all"] | tuple[int, ...] = "all",
    multipliers: tuple[tuple[str, float], ...] = (),
) -> Config:
    """A model of three blocks with this layer in some of them; the others are dense."""
    return Config(
        model=ModelConfig(
            num_blocks=3,
            d_model=96,
            d_ff=384,
            num_heads=4,
            context_length=CONTEXT,
            feed_forward=layer,
            moe_blocks=moe_blocks,
            final_norm=True,
            init=InitConfig(scale=1.0),
            loss_chunk=32,
            scan_layers=False,  # a fifth faster on CPUs
        ),
        data=DataConfig(
            corpus=("python_source/site_packages",), validation_windows=1024, shuffle_group_size=GROUP_SIZE
        ),
        training=TrainingConfig(
            steps=STEPS,
            batch_size=BATCH,
            optimizer=OptimizerConfig(
                learning_rate=5e-3, warmup_steps=50, beta2=0.95, clip_norm=1.0, multipliers=multipliers
            ),
            log_every=20,
            validate_every=100,
            checkpoint_every=200,
        ),
        mesh=MeshConfig(data=1, expert=1),  # one device, also where there are more
    )


def get_study() -> Study:
    """The study."""
    mot = MIXTURE_OF_TOKENS
    return Study(
        title="Recipes of Mixture of Tokens, 1,600 steps on Python source",
        entrants={
            "dense": config(DenseConfig()),
            "mixture_of_tokens": config(mot),
            "last_two_blocks": config(mot, moe_blocks=(1, 2)),
            "last_block": config(mot, moe_blocks=(2,)),
            "groups_of_8": config(replace(mot, group_size=8, num_experts=32)),
            "groups_of_16": config(replace(mot, group_size=16, num_experts=64)),
            "experts_64": config(replace(mot, num_experts=64)),
            "experts_256": config(replace(mot, num_experts=256)),
            "no_shared_expert": config(replace(mot, shared_expert_dim=0)),
            "wide_shared_expert": config(replace(mot, shared_expert_dim=192)),
            "annealed": config(replace(mot, mixing=ANNEALED)),
            "fast_controller": config(mot, multipliers=(("controller", 3.0),)),
        },
        budget_hours=5,
        seeds=(1, 2, 3),
        rate_factors=(0.5, 1.0, 2.0),
        max_extensions=1,
        horizons=(),
        flops_per_second=7e10,
        overhead_seconds=40.0,
    )
