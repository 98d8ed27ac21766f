"""A study of controls of Mixture of Tokens, as small models of Python source: do its learned mixing weights matter?

Command: mot bench train configs/studies/controls.py --workdir runs/controls
Here:    uniform mixing has the loss of no experts but the shared one, a frozen controller two thirds of the gain, no
         shared expert three quarters (docs/results/controls.md).

Models, data and batches are those of `configs/studies/demo.py`.

- `uniform_mixing`: all mixtures of a group are the mean of its tokens, and each of these receives the same sum of
  expert outputs. Its controller has no effect, though its products are in the FLOPs.
- `shared_expert_only`: the dense layer of the shared expert's width, with no other experts.
- `frozen_controller`: the controller keeps its initial weights, since its learning rate is 0. The layers before it can
  still learn to use it, so that this is a control of a learned controller, not of learned mixing weights.
- `no_shared_expert`: experts only, with all of the width of the dense layer. `paper_mixture` of the demo study also
  lacks the shared expert, and has another scale of the controller.

A control has the loss of `mixture_of_tokens` if the 95 % interval of the difference is within 0.015 nats of zero (the
gain over dense layers is 0.05 in the demo study), and another one if the difference is significant; else it is
undecided. If it has the same loss, the part that it lacks is not the reason for the gain. Uniform mixing has a shared
expert too: its other experts are worth its difference from `shared_expert_only`, and it helps if it is better than
`dense`. Three learning rates are tried in place of five. Runs of `dense` and `mixture_of_tokens` are also runs of
`configs/studies/recipe.py`: their directories may be copied, once this study has begun.
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
    group_size=GROUP_SIZE,
    num_experts=EXPERTS,
    shared_expert_dim=SHARED,
    controller_init_scale=3.0,
    save_for_backward="all",
)


def config(layer: FeedForwardConfig, multipliers: tuple[tuple[str, float], ...] = (), d_ff: int = 384) -> Config:
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
            optimizer=OptimizerConfig(
                learning_rate=5e-3, warmup_steps=50, beta2=0.95, clip_norm=1.0, multipliers=multipliers
            ),
            log_every=20,
            validate_every=100,
            checkpoint_every=200,
        ),
        mesh=MeshConfig(data=1, expert=1),  # one device, also where there are more
    )


def get_study() -> Study:
    """The study."""
    return Study(
        title="Controls of Mixture of Tokens, 1,600 steps on Python source",
        entrants={
            "dense": config(DenseConfig(bias=False)),
            "mixture_of_tokens": config(MIXTURE_OF_TOKENS),
            "uniform_mixing": config(replace(MIXTURE_OF_TOKENS, mixing=MixingConfig(merge="uniform"))),
            "shared_expert_only": config(DenseConfig(bias=False), d_ff=SHARED),
            "frozen_controller": config(MIXTURE_OF_TOKENS, multipliers=(("controller", 0.0),)),
            "no_shared_expert": config(replace(MIXTURE_OF_TOKENS, shared_expert_dim=0)),
        },
        pairs=(("uniform_mixing", "shared_expert_only"), ("uniform_mixing", "dense")),
        budget_hours=4,
        rate_factors=(0.5, 1.0, 2.0),
        horizons=(),
        flops_per_second=7e10,
        overhead_seconds=150.0,
    )
