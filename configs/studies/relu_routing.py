"""A study of ReLU routing with 32 experts, as small models of Python source: dense, Mixture of Tokens, ReLU routing.

Command: mot bench train configs/studies/relu_routing.py --workdir runs/relu_routing
Here:    trains, and has not been run to the end.

Models are those of `configs/studies/demo.py` with fewer experts, since ReLU routing runs all experts on all tokens: a
step executes 4 times the FLOPs of the dense model, so that its time is not that of a layer that skips experts. Useful
FLOPs are those of the shared expert and of four experts per token, the number that the L1 loss of the gates aims at.

Two knobs are tuned, with equally many runs for every entrant: the learning rate, and of the kinds with a controller the
scale of its initial weights, 1 or 3, of dense layers their biases.
"""

from dataclasses import replace

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
    ReluRoutingConfig,
    TrainingConfig,
)

GROUP_SIZE, EXPERTS, PER_TOKEN, SHARED = 8, 32, 4, 96
BATCH, CONTEXT = 32, 64

MIXTURE_OF_TOKENS = MixtureOfTokensConfig(
    group_size=GROUP_SIZE, num_experts=EXPERTS, shared_expert_dim=SHARED, controller_init_scale=3.0
)
RELU_ROUTING = ReluRoutingConfig(num_experts=EXPERTS, top_k=PER_TOKEN, shared_expert_dim=SHARED)


def config(layer: FeedForwardConfig) -> Config:
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
            corpus=("python_source/site_packages",), validation_windows=1024, shuffle_group_size=GROUP_SIZE
        ),
        training=TrainingConfig(
            steps=1600,
            batch_size=BATCH,
            optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=50, beta2=0.95, clip_norm=1.0),
            log_every=20,
            validate_every=200,
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
            "relu_routing": config(RELU_ROUTING),
        },
        alternatives={  # as many for every entrant
            "dense": {"no_bias": config(DenseConfig(bias=False))},
            "mixture_of_tokens": {"scale_1": config(replace(MIXTURE_OF_TOKENS, controller_init_scale=1.0))},
            "relu_routing": {"scale_3": config(replace(RELU_ROUTING, controller_init_scale=3.0))},
        },
        budget_hours=2,
        seeds=(1, 2, 3),
        rate_factors=(0.5, 1.0, 2.0),
        horizons=(),
        flops_per_second=7e10,
        overhead_seconds=40.0,
    )
