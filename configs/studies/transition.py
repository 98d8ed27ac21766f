r"""A study of token choice from the start, for a comparison with Mixture of Tokens that is tuned to token choice.

Command: mot bench train configs/studies/transition.py --workdir runs/transition
Here:    1.472 nats from the start, 1.486 by tuning, five seeds (docs/results/transition.md).

Is a token-choice model better trained as such, or as Mixture of Tokens with a short tuning to token choice
(`mot transition`)? The models are those of `configs/studies/recipe.py`, with experts in the first of three blocks. A
step of Mixture of Tokens takes 1.21 times the dense model's time there, one of token choice 1.25, so that 1,600 steps
of the first and 160 of the second take about as long as 1,760 of either.

This study trains both kinds for 1,760 steps. The other two models begin as the `first_block-seed-N` runs of the other
study; `mot transition` takes a copy, since it scores its source again:

    mot transition first_block-seed-N --to token_choice --steps 160 --windows 1024 --output tuned-N
    mot train configs/studies/transition.py --training.transition-from first_block-seed-N --training.seed N \
        --workdir continued-N

The tuned models read the same 160 batches as the others in their last steps. Their learning rate decays twice, from 0.4
of the rate of the run in the tuning, and to a lower end: 0.0002 in place of 0.0005. The continued models (`get_config`)
are Mixture of Tokens with the same 160 batches and rates, which separates the kind from this schedule. All are scored
on the same 1,024 windows, token choice without a limit of capacity, Mixture of Tokens with companions.

Rule, set before the runs: one of two ways has the lower loss if a paired t-test over the five seeds is significant,
with Holm's correction for two tests, tuned against token choice from the start, and tuned against continued.
"""

from mot_jax.benchmark.study import Study
from mot_jax.config import (
    Config,
    DataConfig,
    FeedForwardConfig,
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
BATCH, CONTEXT = 32, 64

MIXTURE_OF_TOKENS = MixtureOfTokensConfig(
    group_size=GROUP_SIZE,
    num_experts=EXPERTS,
    shared_expert_dim=SHARED,
    controller_init_scale=3.0,
    save_for_backward="all",
)
TOKEN_CHOICE = TokenChoiceConfig(
    num_experts=EXPERTS,
    top_k=PER_TOKEN,
    shared_expert_dim=SHARED,
    capacity_factor=1.25,
    routing_group_tokens=BATCH * CONTEXT,
)


def config(
    layer: FeedForwardConfig,
    losses: LossWeights = LossWeights(),
    steps: int = 1760,
    learning_rate: float = 5e-3,
    warmup_steps: int = 50,
) -> Config:
    """A model of three blocks with this layer in the first one; the others are dense, without biases."""
    return Config(
        model=ModelConfig(
            num_blocks=3,
            d_model=96,
            d_ff=384,
            num_heads=4,
            context_length=CONTEXT,
            feed_forward=layer,
            moe_blocks=(0,),
            dense_bias=False,
            final_norm=True,
            init=InitConfig(scale=1.0),
            loss_chunk=32,
            scan_layers=False,  # a fifth faster on CPUs
        ),
        data=DataConfig(
            corpus=("python_source/site_packages",),
            validation_windows=1024,
            final_validation_windows=1024,
            shuffle_group_size=GROUP_SIZE,
        ),
        training=TrainingConfig(
            steps=steps,
            batch_size=BATCH,
            optimizer=OptimizerConfig(
                learning_rate=learning_rate, warmup_steps=warmup_steps, beta2=0.95, clip_norm=1.0
            ),
            losses=losses,
            log_every=20,
            validate_every=steps // 16,
            checkpoint_every=steps // 8,
        ),
        mesh=MeshConfig(data=1, expert=1),  # one device, also where there are more
    )


def get_config() -> Config:
    """Mixture of Tokens that continues a run for as many steps as `mot transition` tunes it, at the same rates."""
    return config(MIXTURE_OF_TOKENS, steps=160, learning_rate=2e-3, warmup_steps=5)


def get_study() -> Study:
    """The study."""
    return Study(
        title="Token choice from the start, 1,760 steps on Python source",
        entrants={
            "token_choice": config(TOKEN_CHOICE, LossWeights(load_balancing=0.01)),
            "mixture_of_tokens": config(MIXTURE_OF_TOKENS),
        },
        target="token_choice",
        compared="token_choice",
        budget_hours=2,
        rate_factors=(0.5, 1.0, 2.0),
        max_extensions=1,
        horizons=(),
        flops_per_second=7e10,
        overhead_seconds=100.0,
    )
