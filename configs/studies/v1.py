"""A study at the size of the models of version 1 of the paper, on subwords of C4, for one GPU.

Command: mot bench train configs/studies/v1.py --workdir runs/v1_study   (prepare the dataset first: docs/reproduce.md)
Here:    not run.

Is the order of the kinds on bytes, in models of 0.4 M active parameters, also that on subwords in models of 16 M? With
bytes, hash layers and token choice in the first block gain most (`configs/studies/recipe.py`); a table of 50,257 ids is
another thing. Models are those of `configs/v1.py`: 4 blocks of d_model 256, d_ff 1,024, 512 experts, groups of 32.
`paper` is its Mixture of Tokens; the others with experts have a shared expert of a quarter of d_ff, and experts of
three quarters of the paper's width. 10,000 steps of 65,536 tokens, 0.66 billion; on an H100 the modeled steps of the
dense model and of `paper` take 23.3 and 35.7 ms (docs/performance.md), 4 and 6 minutes a run.

In pieces, each resumed by the same command: timeout 540 mot bench train configs/studies/v1.py --workdir runs/v1_study
"""

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

GROUP_SIZE, EXPERTS, PER_TOKEN, SHARED = 32, 512, 16, 256
BATCH, CONTEXT, STEPS = 256, 256, 10_000

RECIPE = MixtureOfTokensConfig(
    group_size=GROUP_SIZE, num_experts=EXPERTS, shared_expert_dim=SHARED, controller_init_scale=3.0
)
TOKEN_CHOICE = TokenChoiceConfig(
    num_experts=EXPERTS,
    top_k=PER_TOKEN,
    shared_expert_dim=SHARED,
    capacity_factor=1.25,
    routing_group_tokens=GROUP_SIZE * CONTEXT,
)
HASH = HashConfig(num_experts=EXPERTS, top_k=PER_TOKEN, shared_expert_dim=SHARED, w_out_init_scale=2.0)
DENSE = DenseConfig(bias=False)


def config(
    layer: FeedForwardConfig,
    learning_rate: float = 2e-3,
    moe_blocks: Literal["all"] | tuple[int, ...] = "all",
    losses: LossWeights = LossWeights(),
) -> Config:
    """A model of four blocks with this layer in some of them; the others are dense, without biases."""
    return Config(
        model=ModelConfig(
            num_blocks=4,
            d_model=256,
            d_ff=1024,
            num_heads=4,
            context_length=CONTEXT,
            vocab_size=50_257,
            feed_forward=layer,
            moe_blocks=moe_blocks,
            dense_bias=moe_blocks == "all",
            init=InitConfig(distribution="uniform", scale=1.0, cut=None),
            dtype="bfloat16",
            scan_layers=False,  # a scan over blocks moves far more bytes
        ),
        data=DataConfig(
            corpus=("c4/en",),
            tokenizer="tokenizers/gpt2.json",
            validation_windows=4_096,
            shuffle_group_size=GROUP_SIZE,
        ),
        training=TrainingConfig(
            steps=STEPS,
            batch_size=BATCH,
            optimizer=OptimizerConfig(learning_rate=learning_rate, warmup_steps=STEPS // 100, min_lr_ratio=0.1),
            losses=losses,
            log_every=50,
            validate_every=STEPS // 10,
            checkpoint_every=STEPS // 10,
        ),
        mesh=MeshConfig(data=1, expert=1),  # one device, also where there are more
    )


def get_study() -> Study:
    """The study."""
    balanced = LossWeights(load_balancing=0.01)
    return Study(
        title="Models of version 1 of the paper, 10,000 steps on C4",
        entrants={
            "dense": config(DENSE, learning_rate=4e-3),
            "paper": config(MixtureOfTokensConfig(group_size=GROUP_SIZE, num_experts=EXPERTS)),
            "recipe": config(RECIPE),
            "first_block": config(RECIPE, moe_blocks=(0,)),
            "first_block_token_choice": config(TOKEN_CHOICE, moe_blocks=(0,), losses=balanced),
            "first_block_hash": config(HASH, moe_blocks=(0,)),
        },
        compared="dense",
        pairs=(("first_block", "recipe"), ("first_block", "first_block_token_choice")),
        budget_hours=8,
        seeds=(1, 2, 3),
        rate_factors=(0.5, 1.0, 2.0),
        horizons=(),
        flops_per_second=1.5e14,
        overhead_seconds=60.0,
    )
