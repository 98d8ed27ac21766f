"""Studies of two sizes of the models of `configs/studies/recipe.py`: does an advantage grow with the model?

Command: mot bench train configs/studies/scale.py:d64 --workdir runs/scale_d64
Command: mot bench train configs/studies/scale.py:d128 --workdir runs/scale_d128
Here:    d64: hash layers and Mixture of Tokens save time, more than at d_model 96 (docs/results/scale.md). d128: begun.

The models of `configs/studies/recipe.py` have d_model 96, and are the size between these two. Kinds, data and batches
are the same. The widths of all layers are in proportion to d_model, and so is the inverse square of the bound of the
initial values, which are then as far from normal at every size; the number of experts is the same, and with it the
share of mixing in the FLOPs falls as d_model grows. The steps are in proportion to d_model squared: 720 (rounded),
1,600 and 2,848. The wider dense model has the FLOPs of Mixture of Tokens in all blocks at every size.

Rule, set before the runs: an advantage grows if the time to the dense model's loss (steps times step time, as a share
of dense's) falls from each size to the next, and the 95 % intervals of the first and the last do not overlap; it is
lost in the reverse case; else it is undecided. Three sizes allow no law.
"""

import math
from collections.abc import Callable
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
    select,
)

GROUP_SIZE, EXPERTS, PER_TOKEN = 32, 128, 4
BATCH, CONTEXT = 32, 64


def entrants(d_model: int, steps: int) -> dict[str, Config]:
    """The models of a width, each with one of the layers in all blocks or in the first of three."""

    def config(
        layer: FeedForwardConfig,
        moe_blocks: Literal["all"] | tuple[int, ...] = "all",
        d_ff: int = 4 * d_model,
        losses: LossWeights = LossWeights(),
    ) -> Config:
        return Config(
            model=ModelConfig(
                num_blocks=3,
                d_model=d_model,
                d_ff=d_ff,
                num_heads=4,
                context_length=CONTEXT,
                feed_forward=layer,
                moe_blocks=moe_blocks,
                dense_bias=moe_blocks == "all",
                final_norm=True,
                init=InitConfig(scale=1.0, cut=0.2 * math.sqrt(96 / d_model)),
                loss_chunk=32,
                scan_layers=False,  # a fifth faster on CPUs
            ),
            data=DataConfig(
                corpus=("python_source/site_packages",), validation_windows=1024, shuffle_group_size=GROUP_SIZE
            ),
            training=TrainingConfig(
                steps=steps,
                batch_size=BATCH,
                optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=steps // 32, beta2=0.95, clip_norm=1.0),
                losses=losses,
                log_every=20,
                validate_every=steps // 16,
                checkpoint_every=steps // 8,
            ),
            mesh=MeshConfig(data=1, expert=1),  # one device, also where there are more
        )

    mixture = MixtureOfTokensConfig(
        group_size=GROUP_SIZE,
        num_experts=EXPERTS,
        shared_expert_dim=d_model,
        controller_init_scale=3.0,
        save_for_backward="all",
    )
    token_choice = TokenChoiceConfig(
        num_experts=EXPERTS,
        top_k=PER_TOKEN,
        shared_expert_dim=d_model,
        capacity_factor=1.25,
        routing_group_tokens=BATCH * CONTEXT,
    )
    hash_layer = HashConfig(num_experts=EXPERTS, top_k=PER_TOKEN, shared_expert_dim=d_model, w_out_init_scale=2.0)
    dense = DenseConfig(bias=False)
    return {
        "dense": config(dense),
        "dense_equal_flops": config(dense, d_ff=4 * d_model + 192),
        "first_block": config(mixture, (0,)),
        "first_block_token_choice": config(token_choice, (0,), losses=LossWeights(load_balancing=0.01)),
        "first_block_hash": config(hash_layer, (0,)),
    }


def study(d_model: int, steps: int, seeds: tuple[int, ...], budget_hours: float) -> Study:
    """A study of one size, tuned at three learning rates."""
    return Study(
        title=f"Recipes of Mixture of Tokens at d_model {d_model}, {steps:,} steps on Python source",
        entrants=entrants(d_model, steps),
        compared="dense",
        budget_hours=budget_hours,
        seeds=seeds,
        rate_factors=(0.5, 1.0, 2.0),
        max_extensions=1,
        horizons=(),
        flops_per_second=3.5e10,
        overhead_seconds=40.0,
    )


def d64() -> Study:
    """Models of d_model 64, with five seeds."""
    return study(64, 720, (1, 2, 3, 4, 5), 2)


def d128() -> Study:
    """Models of d_model 128, with three seeds."""
    return study(128, 2848, (1, 2, 3), 8)


VARIANTS: dict[str, Callable[[], Study]] = {"d64": d64, "d128": d128}


def get_study(variant: str | None = None) -> Study:
    """The study of this variant, which must be named."""
    return select(VARIANTS, variant, has_default=False)
