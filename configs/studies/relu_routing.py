"""A study of ReLU routing, Mixture of Tokens and token choice with 32 experts, as small models of Python source.

Command: mot bench train configs/studies/relu_routing.py --workdir runs/relu_routing
Here:    trains, and has not been run to the end.

Models, data and batches are those of `configs/studies/demo.py`, with fewer experts, since ReLU routing runs all experts
on all tokens: a step executes 4 times the FLOPs of the dense model, so that its time, and all that the report computes
from it, is not that of a layer that skips experts. Useful FLOPs are those of the shared expert and of four experts per
token, the number at which the L1 loss of the gates aims: `experts_per_token` among the metrics has the number reached,
and the count of FLOPs is void where it is not within 0.3 of 4. In the first hundred steps about half of all experts are
active, whose FLOPs are not counted.

Two knobs are tuned, with equally many runs for every entrant: the learning rate, at three values, and the scale of the
controller's initial weights (of Mixture of Tokens 3 or 1, of token choice 1 or 3, of ReLU routing 1 or 0.3, which gives
smaller gates), of dense layers their biases. Runs of `dense` are also runs of the demo study: their directories may be
copied, once this study has begun.
"""

from dataclasses import replace

from mot_jax.benchmark.study import Study
from mot_jax.config import (
    Config,
    DataConfig,
    DenseConfig,
    FeedForwardConfig,
    InitConfig,
    LossWeights,
    MeshConfig,
    MixtureOfTokensConfig,
    ModelConfig,
    OptimizerConfig,
    ReluRoutingConfig,
    TokenChoiceConfig,
    TrainingConfig,
)

GROUP_SIZE, EXPERTS, PER_TOKEN, SHARED = 8, 32, 4, 96
BATCH, CONTEXT = 32, 64
SHUFFLE_GROUP = 32  # that of configs/studies/demo.py, for the same batches

MIXTURE_OF_TOKENS = MixtureOfTokensConfig(
    group_size=GROUP_SIZE, num_experts=EXPERTS, shared_expert_dim=SHARED, controller_init_scale=3.0
)
# As in configs/studies/demo.py: the capacity of an expert is a share of all tokens of a batch.
TOKEN_CHOICE = TokenChoiceConfig(
    num_experts=EXPERTS,
    top_k=PER_TOKEN,
    shared_expert_dim=SHARED,
    capacity_factor=1.25,
    routing_group_tokens=BATCH * CONTEXT,
)
BALANCING = LossWeights(load_balancing=0.01)
RELU_ROUTING = ReluRoutingConfig(num_experts=EXPERTS, top_k=PER_TOKEN, shared_expert_dim=SHARED)


def config(layer: FeedForwardConfig, losses: LossWeights = LossWeights()) -> Config:
    """A model of three blocks with this layer. Groups have sequences of different documents for every layer."""
    return Config(
        model=ModelConfig(
            num_blocks=3,
            d_model=96,
            d_ff=384,
            num_heads=4,
            context_length=CONTEXT,
            feed_forward=layer,
            final_norm=True,
            init=InitConfig(scale=1.0),
            loss_chunk=32,
            scan_layers=False,  # a fifth faster on CPUs
        ),
        data=DataConfig(
            corpus=("python_source/site_packages",), validation_windows=1024, shuffle_group_size=SHUFFLE_GROUP
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
        title="ReLU routing with 32 experts, 1,600 steps on Python source",
        entrants={
            "dense": config(DenseConfig()),
            "mixture_of_tokens": config(MIXTURE_OF_TOKENS),
            "token_choice": config(TOKEN_CHOICE, BALANCING),
            "relu_routing": config(RELU_ROUTING),
        },
        alternatives={  # as many for every entrant
            "dense": {"no_bias": config(DenseConfig(bias=False))},
            "mixture_of_tokens": {"scale_1": config(replace(MIXTURE_OF_TOKENS, controller_init_scale=1.0))},
            "token_choice": {"scale_3": config(replace(TOKEN_CHOICE, controller_init_scale=3.0), BALANCING)},
            "relu_routing": {"scale_03": config(replace(RELU_ROUTING, controller_init_scale=0.3))},
        },
        budget_hours=5,
        rate_factors=(0.5, 1.0, 2.0),
        horizons=(),
        flops_per_second=7e10,
        overhead_seconds=100.0,
    )
