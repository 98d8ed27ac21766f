"""A study of small causal models of Python source: dense, Mixture of Tokens in two recipes, and the sparse baselines.

Command: mot bench train configs/studies/demo.py --workdir runs/demo_study
Here:    complete, see docs/results/demo.md.

The experts that process a token, with a shared one, have the FLOPs of a dense layer of width 384: the paper's rule.
Mixing and routers are not in it: the layer of Mixture of Tokens has 1.5 times these FLOPs, most sparse ones 1.17 times.
`dense_equal_flops` is a dense model with as many FLOPs as that of Mixture of Tokens. No dense model here has as many
parameters: its layers would be 24 times as wide.

All kinds with experts, but one of the two Mixture of Tokens, have the same shared expert of a quarter of that width and
four of 128 small experts per token. Soft MoE is not causal. ReLU routing, which runs all experts on all tokens, is in
a study of its own, with fewer experts.

Two knobs are tuned, with equally many runs for every entrant: the learning rate, and one knob of the kind, for which
one alternative is tried: the scale of the initial weights of a learned controller (3 or 1; for the paper's layer the
square root of 0.1, as in the paper, or 1), for hash layers the scale of the experts' second matrices (2 undoes the mean
over four experts), for dense layers biases. Not tuned: capacity, the rate of bias balancing, the layer norm of expert
choice, which is the paper's. Before this study, small trials of Mixture of Tokens chose its number of experts, shared
expert and scale (docs/paper.md, section 6); the other kinds were given the same.
"""

from dataclasses import replace

from mot_jax.benchmark.study import Study
from mot_jax.config import (
    Config,
    DataConfig,
    DenseConfig,
    ExpertChoiceConfig,
    ExpertThresholdConfig,
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
BATCH, CONTEXT = 32, 64
ROUTING_GROUP = BATCH * CONTEXT  # a batch: the capacity of an expert is a share of all its tokens

MIXTURE_OF_TOKENS = MixtureOfTokensConfig(
    group_size=GROUP_SIZE,
    num_experts=EXPERTS,
    shared_expert_dim=SHARED,
    controller_init_scale=3.0,
    save_for_backward="all",
)
# The layer of the paper's article: no shared expert, a controller with the variance 0.1 / D, nearly uniform mixing.
PAPER = MixtureOfTokensConfig(
    group_size=GROUP_SIZE, num_experts=EXPERTS, controller_init_scale=0.1**0.5, save_for_backward="all"
)
# Capacity factor and weight of the load-balancing loss of the paper.
TOKEN_CHOICE = TokenChoiceConfig(
    num_experts=EXPERTS,
    top_k=PER_TOKEN,
    shared_expert_dim=SHARED,
    capacity_factor=1.25,
    routing_group_tokens=ROUTING_GROUP,
)
BALANCING = LossWeights(load_balancing=0.01)
BIAS_BALANCED = replace(TOKEN_CHOICE, scores="sigmoid", balance="bias", capacity_factor=None)
EXPERT_THRESHOLD = ExpertThresholdConfig(
    num_experts=EXPERTS,
    top_k=PER_TOKEN,
    shared_expert_dim=SHARED,
    routing_group_tokens=ROUTING_GROUP,
    group_size=GROUP_SIZE,
)
EXPERT_CHOICE = ExpertChoiceConfig(
    group_size=GROUP_SIZE, num_experts=EXPERTS, top_k=PER_TOKEN, shared_expert_dim=SHARED, layer_norm=True
)
HASH = HashConfig(num_experts=EXPERTS, top_k=PER_TOKEN, shared_expert_dim=SHARED)


def config(layer: FeedForwardConfig, losses: LossWeights = LossWeights(), d_ff: int = 384) -> Config:
    """A model of three blocks with this layer. Batches have 32 sequences of different documents for every layer."""
    return Config(
        model=ModelConfig(
            num_blocks=3,
            d_model=96,
            d_ff=d_ff,
            num_heads=4,
            context_length=CONTEXT,
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
        title="Python source, 1,600 steps of models of 0.4 million active parameters",
        entrants={
            "dense": config(DenseConfig()),
            "dense_equal_flops": config(DenseConfig(), d_ff=576),
            "mixture_of_tokens": config(MIXTURE_OF_TOKENS),
            "paper_mixture": config(PAPER),
            "token_choice": config(TOKEN_CHOICE, BALANCING),
            "token_choice_bias": config(BIAS_BALANCED),
            "expert_threshold": config(EXPERT_THRESHOLD),
            "expert_choice": config(EXPERT_CHOICE),
            "hash": config(HASH),
        },
        alternatives={
            "dense": {"no_bias": config(DenseConfig(bias=False))},
            "dense_equal_flops": {"no_bias": config(DenseConfig(bias=False), d_ff=576)},
            "mixture_of_tokens": {"scale_1": config(replace(MIXTURE_OF_TOKENS, controller_init_scale=1.0))},
            "paper_mixture": {"scale_1": config(replace(PAPER, controller_init_scale=1.0))},
            "token_choice": {"scale_3": config(replace(TOKEN_CHOICE, controller_init_scale=3.0), BALANCING)},
            "token_choice_bias": {"scale_3": config(replace(BIAS_BALANCED, controller_init_scale=3.0))},
            "expert_threshold": {"scale_3": config(replace(EXPERT_THRESHOLD, controller_init_scale=3.0))},
            "expert_choice": {"scale_3": config(replace(EXPERT_CHOICE, controller_init_scale=3.0))},
            "hash": {"scale_2": config(replace(HASH, w_out_init_scale=2.0))},
        },
        budget_hours=8,
        flops_per_second=7e10,
        overhead_seconds=40.0,
    )
