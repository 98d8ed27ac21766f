"""A study of recipes of Mixture of Tokens, as small models of Python source: which one wins in time, if any does?

Command: mot bench train configs/studies/recipe.py --workdir runs/recipe
Here:    in the first block, hash layers (0.73 of dense's time), token choice (0.88) and Mixture of Tokens (0.92) win;
         five seeds (docs/results/recipe.md).

Models, data and batches are those of `configs/studies/demo.py`, in which MoT in all three blocks needs 0.78 of dense's
steps for its loss, and its step takes 1.8 times as long, mostly in small products. Here layers with experts are in one
block, and the other two are dense. Chosen after one run of each of these and of others, which gained less: groups of 8
with 32 experts in all blocks, in the first two and in the first one (docs/results/recipe.md has their losses).

A recipe wins in time if the upper ends of the 95 % intervals of its steps and of its step time, both relative to
dense's, have a product below 1. `dense_equal_flops` is a wider dense model, which has to be beaten as well; hash layers
and token choice in the first block show whether that is due to the place or to the kind. Three learning rates are tried
in place of five. Runs of `dense`, `dense_equal_flops` and `mixture_of_tokens` are also runs of the demo study, of the
dense ones those without biases: their directories may be copied, under the names of this study, once it has begun.
"""

from dataclasses import replace
from typing import Literal

from mot_jax.benchmark.study import Study
from mot_jax.config import (
    Config,
    DataConfig,
    DenseConfig,
    FeedForwardConfig,
    HashConfig,
    InitConfig,
    LossWeights,
    MeshConfig,
    MixtureOfTokensConfig,
    ModelConfig,
    OptimizerConfig,
    TokenChoiceConfig,
    TrainingConfig,
)

GROUP_SIZE, EXPERTS, PER_TOKEN, SHARED = 32, 128, 4, 96
BATCH, CONTEXT, STEPS = 32, 64, 1600

MIXTURE_OF_TOKENS = MixtureOfTokensConfig(
    group_size=GROUP_SIZE,
    num_experts=EXPERTS,
    shared_expert_dim=SHARED,
    controller_init_scale=3.0,
    save_for_backward="all",
)
# As in configs/studies/demo.py.
TOKEN_CHOICE = TokenChoiceConfig(
    num_experts=EXPERTS,
    top_k=PER_TOKEN,
    shared_expert_dim=SHARED,
    capacity_factor=1.25,
    routing_group_tokens=BATCH * CONTEXT,
)
HASH = HashConfig(num_experts=EXPERTS, top_k=PER_TOKEN, shared_expert_dim=SHARED, w_out_init_scale=2.0)
DENSE = DenseConfig(bias=False)


def config(
    layer: FeedForwardConfig,
    moe_blocks: Literal["all"] | tuple[int, ...] = "all",
    d_ff: int = 384,
    losses: LossWeights = LossWeights(),
) -> Config:
    """A model of three blocks with this layer in some of them; the others are dense, without biases."""
    return Config(
        model=ModelConfig(
            num_blocks=3,
            d_model=96,
            d_ff=d_ff,
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
            optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=50, beta2=0.95, clip_norm=1.0),
            losses=losses,
            log_every=20,
            validate_every=100,
            checkpoint_every=200,
        ),
        mesh=MeshConfig(data=1, expert=1),  # one device, also where there are more
    )


def get_study() -> Study:
    """The study."""
    return Study(
        title="Recipes of Mixture of Tokens, 1,600 steps on Python source",
        entrants={
            "dense": config(DENSE),
            "dense_equal_flops": config(DENSE, d_ff=576),
            "mixture_of_tokens": config(MIXTURE_OF_TOKENS),
            "first_block": config(MIXTURE_OF_TOKENS, moe_blocks=(0,)),
            "first_block_256_experts": config(replace(MIXTURE_OF_TOKENS, num_experts=256), moe_blocks=(0,)),
            "last_block": config(MIXTURE_OF_TOKENS, moe_blocks=(2,)),
            "first_block_token_choice": config(TOKEN_CHOICE, (0,), losses=LossWeights(load_balancing=0.01)),
            "first_block_hash": config(HASH, moe_blocks=(0,)),
        },
        compared="dense",
        budget_hours=5,
        rate_factors=(0.5, 1.0, 2.0),
        max_extensions=1,
        horizons=(),
        flops_per_second=7e10,
        overhead_seconds=100.0,
    )
