"""A study of batches of half the size, as small models of Python source.

Command: mot bench train configs/studies/half_batch.py --workdir runs/half_batch
Here:    trains, and has not been run to the end.

The models of `configs/studies/recipe.py`, on as many tokens of the same corpus, in twice as many steps of 16 sequences
in place of 32. Warmup, weight decay per step and the decay of the second moment are those of the larger batch per
token. A group of Mixture of Tokens cannot be larger than a batch: it has 16 sequences, and 64 experts of the same width
in place of 128, so that mixing costs half as much. (128 experts of half the width would be the other choice.)

Questions, with rules set before the runs:

1. Does halving the batch lower the dense model's loss as much as experts do? D is the loss of dense with 16 sequences,
   scored on the 1,024 windows of the other study (of groups of 32; about 5 % differ from those here), minus the loss
   with companions of Mixture of Tokens in the first block with 32, as published in docs/results/recipe; its mean over
   the seeds has a 95 % interval, paired by seed. If the upper end is below 0.015, halving does as much, within 0.015;
   else, if the lower end is above 0, it does not; else it is undecided. If a shift of 0.007 in either direction, which
   another processor may cause, changes the outcome, the five runs `first_block` of `recipe.py` are trained again here,
   and their losses replace those published. This is at equal tokens, not at equal time.
2. Does Mixture of Tokens in the first block have a lower loss than dense, and does it save time, with this batch? The
   tests of the report; and time is saved if the product of the upper ends of the 95 % intervals of steps and of step
   times is below 1. It has half as many tokens in a group here, and half as many experts. There is no wider dense
   model, which the other study has.
"""

from typing import Literal

from mot_jax.benchmark.study import Study
from mot_jax.config import (
    Config,
    DataConfig,
    DenseConfig,
    FeedForwardConfig,
    InitConfig,
    MeshConfig,
    MixtureOfTokensConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)

GROUP_SIZE, EXPERTS, SHARED = 16, 64, 96
BATCH, CONTEXT, STEPS = 16, 64, 3200

MIXTURE_OF_TOKENS = MixtureOfTokensConfig(
    group_size=GROUP_SIZE,
    num_experts=EXPERTS,  # four for each sequence of a group, as with larger groups
    shared_expert_dim=SHARED,
    controller_init_scale=3.0,
    save_for_backward="all",
)


def config(layer: FeedForwardConfig, moe_blocks: Literal["all"] | tuple[int, ...] = (0,)) -> Config:
    """A model of three blocks with this layer in some of them; the others are dense, without biases."""
    return Config(
        model=ModelConfig(
            num_blocks=3,
            d_model=96,
            d_ff=384,
            num_heads=4,
            context_length=CONTEXT,
            feed_forward=layer,
            moe_blocks=moe_blocks,
            dense_bias=moe_blocks == "all",
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
                learning_rate=5e-3, warmup_steps=100, beta2=0.975, weight_decay=0.05, clip_norm=1.0
            ),
            log_every=40,
            validate_every=200,
            checkpoint_every=400,
        ),
        mesh=MeshConfig(data=1, expert=1),  # one device, also where there are more
    )


def get_study() -> Study:
    """The study."""
    return Study(
        title="Batches of half the size, 3,200 steps on Python source",
        entrants={
            "dense": config(DenseConfig(bias=False), moe_blocks="all"),
            "first_block": config(MIXTURE_OF_TOKENS),
        },
        compared="dense",
        budget_hours=2,
        rate_factors=(0.5, 1.0, 2.0),
        max_extensions=1,
        horizons=(),
        flops_per_second=7e10,
        overhead_seconds=100.0,
    )
