"""A study of training in pure bfloat16, as small models of Python source: Mixture of Tokens against expert choice.

Command: mot bench train configs/studies/bfloat16.py --workdir runs/bfloat16
Here:    trains, and has not been run to the end.

Models, data and batches are those of `configs/studies/demo.py`, whose runs are in float32. Parameters, activations,
gradients and the first moment of the optimizer are in bfloat16 here. Logits of routers, softmax, norms, losses and the
second moment are in float32, as always in this project. An update smaller than 2^-9 of a weight is rounded away: the
main difference from training in mixed precision. Options are those chosen in that study: expert choice has the paper's
layer norm, and Mixture of Tokens our scale of the controller. Only learning rates are tuned here.

Claim of the paper (version 2): in pure bfloat16, Mixture of Tokens has a lower loss than expert choice. Rule, set
before the runs, for the losses as trained, both in groups: reproduced if the difference is significant and in favor of
Mixture of Tokens, contradicted at this size if it is significant in favor of expert choice, else undecided. In the demo
study the difference was 0.009 in favor of expert choice, with a standard deviation of 0.02 over the seeds; with eight
seeds, a difference of 0.022 is significant with a probability of 80 %. That bfloat16 is the reason is shown only by the
change from float32: the difference in that study, of seeds 1 to 5 and perhaps of another processor, is reported next to
that of these seeds, with the interval of the change, and without a verdict. No look is taken before the last seed.
"""

from mot_jax.benchmark.study import Study
from mot_jax.config import (
    Config,
    DataConfig,
    ExpertChoiceConfig,
    FeedForwardConfig,
    InitConfig,
    MeshConfig,
    MixtureOfTokensConfig,
    ModelConfig,
    OptimizerConfig,
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
EXPERT_CHOICE = ExpertChoiceConfig(
    group_size=GROUP_SIZE, num_experts=EXPERTS, top_k=PER_TOKEN, shared_expert_dim=SHARED, layer_norm=True
)


def config(layer: FeedForwardConfig) -> Config:
    """A model of three blocks with this layer. Batches have 32 sequences of different documents for every layer."""
    return Config(
        model=ModelConfig(
            num_blocks=3,
            d_model=96,
            d_ff=384,
            num_heads=4,
            context_length=CONTEXT,
            dtype="bfloat16",
            param_dtype="bfloat16",
            feed_forward=layer,
            final_norm=True,
            init=InitConfig(scale=1.0),
            loss_chunk=32,
            scan_layers=False,  # a fifth faster on CPUs
        ),
        data=DataConfig(
            corpus=("python_source/site_packages",), validation_windows=1024, shuffle_group_size=GROUP_SIZE
        ),
        training=TrainingConfig(
            steps=1600,
            batch_size=BATCH,
            optimizer=OptimizerConfig(
                learning_rate=5e-3, warmup_steps=50, beta2=0.95, clip_norm=1.0, mu_dtype="bfloat16"
            ),
            log_every=20,
            validate_every=1600,  # only final losses are compared
            checkpoint_every=200,
        ),
        mesh=MeshConfig(data=1, expert=1),  # one device, also where there are more
    )


def get_study() -> Study:
    """The study."""
    return Study(
        title="Training in bfloat16, 1,600 steps on Python source",
        entrants={
            "mixture_of_tokens": config(MIXTURE_OF_TOKENS),
            "expert_choice": config(EXPERT_CHOICE),
        },
        target="expert_choice",
        compared="mixture_of_tokens",
        seeds=(1, 2, 3, 4, 5, 6, 7, 8),
        budget_hours=4,
        rate_factors=(0.5, 1.0, 2.0),
        max_extensions=1,
        horizons=(),
        flops_per_second=3.5e10,
        overhead_seconds=60.0,
    )
