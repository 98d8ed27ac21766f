"""A study of controls of Mixture of Tokens, as small models of Python source: do its learned mixing weights matter?

Command: mot bench train configs/studies/controls.py --workdir runs/controls
Here:    trains, and has not been run to the end.

Models are those of `configs/studies/demo.py`. `uniform_mixing`: all mixtures of a group are the mean of its tokens, and
each of these receives the same sum of expert outputs. `frozen_controller`: the controller keeps its initial weights,
since its learning rate is 0. A control with the loss of `mixture_of_tokens` shows that learned mixing weights are not
the reason for the difference from the dense model.
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
    MixingConfig,
    MixtureOfTokensConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)

GROUP_SIZE, EXPERTS, SHARED = 32, 128, 96
BATCH, CONTEXT = 32, 64

MIXTURE_OF_TOKENS = MixtureOfTokensConfig(
    group_size=GROUP_SIZE, num_experts=EXPERTS, shared_expert_dim=SHARED, controller_init_scale=3.0
)


def config(layer: FeedForwardConfig, multipliers: tuple[tuple[str, float], ...] = ()) -> Config:
    """A model of three blocks with this layer. Batches have 32 sequences of different documents for every layer."""
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
            optimizer=OptimizerConfig(
                learning_rate=5e-3, warmup_steps=50, beta2=0.95, clip_norm=1.0, multipliers=multipliers
            ),
            log_every=20,
            validate_every=200,
            checkpoint_every=200,
        ),
        mesh=MeshConfig(data=1, expert=1),  # one device, also where there are more
    )


def get_study() -> Study:
    """The study."""
    return Study(
        title="Controls of Mixture of Tokens, 1,600 steps on Python source",
        entrants={
            "dense": config(DenseConfig()),
            "mixture_of_tokens": config(MIXTURE_OF_TOKENS),
            "uniform_mixing": config(replace(MIXTURE_OF_TOKENS, mixing=MixingConfig(merge="uniform"))),
            "frozen_controller": config(MIXTURE_OF_TOKENS, multipliers=(("controller", 0.0),)),
        },
        budget_hours=2,
        seeds=(1, 2, 3),
        rate_factors=(0.5, 1.0, 2.0),
        horizons=(),
        flops_per_second=7e10,
        overhead_seconds=40.0,
    )
