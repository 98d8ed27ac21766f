"""Studies of claims of the paper, as small models of Python source: do they hold here?

Command: mot bench train configs/studies/claims.py:causal --workdir runs/claims_causal
Command: mot bench train configs/studies/claims.py:masked --workdir runs/claims_masked
Here:    trains, and has not been run to the end.

Claims of `causal`, at equal steps, decided by the final loss in groups (*as trained*) of the pairs of the study:

- smaller and more mixtures help: the loss falls from granularity 1 to 8, and from 8 to 16;
- more experts help, in groups as large as their number: the loss falls from 8 to 32 (128 are not tested);
- a learned temperature hurts (version 1, one run at granularity 16; here at 8).

A claim is reproduced if the difference has its sign and p of the pair, corrected over the four by Holm's method, is
below 0.05; refuted if it has the other sign with such a p; else undecided, and of no relevance if the 95 % interval is
within 0.015 nats of zero. A temperature that stays above 0.3 in all blocks (the paper's end at 0.333, 0.059, 0.009 and
0.017; here it is read from the last checkpoints) is none as in the paper, and does not refute its claim. A step of
granularity 1, 8 and 16 has 1.07, 1.56 and 2.12 times the FLOPs of the dense model, which are more than in the paper,
since the model is narrow; `dense_wide` has those of granularity 16. A dense model of the usual width is in
`configs/studies/demo.py`. Experts are in all blocks, as in version 1; version 2 has them in the last half, and in the
last block only our recipe gains less than half as much (`configs/studies/recipe.py`). There is no shared expert, and
the scale of the controller is 1: that of the paper is 0.316, and was worse in a run of the demo study. The bound of the
initial values narrows them more where experts are narrow; the scale of their output matrices makes up for it. Uniform
mixing, which does not help in the paper, is in `configs/studies/controls.py`.

`masked` asks whether masked models with Mixture of Tokens, in the recipe of `configs/demo.py:all_blocks`, are better
than dense ones, if they mix across sequences, and if they mix neighbors within each; the paper's order is not known.
Mixtures have 1.28 times the FLOPs of the dense model. As trained, a mixture is better than dense if p, corrected over
the two, is below 0.05; the two differ if p of their pair is below 0.05, and are alike if the 95 % interval is within
0.015 nats of zero; else undecided. Masks depend on the seed, so that losses are compared seed by seed only.
"""

from collections.abc import Callable
from typing import Any, Literal

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
    select,
)

GROUP_SIZE, BATCH, CONTEXT, STEPS = 32, 32, 64, 1600
DENSE = DenseConfig(bias=False)


def config(layer: FeedForwardConfig, d_ff: int = 384, objective: Literal["causal", "masked"] = "causal") -> Config:
    """A model of three blocks with this layer. Batches have 32 sequences of different documents for every layer."""
    return Config(
        model=ModelConfig(
            num_blocks=3,
            d_model=96,
            d_ff=d_ff,
            num_heads=4,
            context_length=CONTEXT,
            objective=objective,
            vocab_size=258 if objective == "masked" else 257,  # one more entry, for the mask
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
            steps=STEPS,
            batch_size=BATCH,
            optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=50, beta2=0.95, clip_norm=1.0),
            log_every=20,
            validate_every=STEPS,  # only final losses are compared
            checkpoint_every=200,
        ),
        mesh=MeshConfig(data=1, expert=1),  # one device, also where there are more
    )


def mixture(group_size: int, granularity: int = 1, scale: float = 1.0, **mixing: Any) -> MixtureOfTokensConfig:
    """The paper's layer. scale: of the standard deviation of the experts' output matrices."""
    return MixtureOfTokensConfig(
        group_size=group_size,
        num_experts=granularity * group_size,
        controller_init_scale=1.0,
        w_out_init_scale=scale,
        mixing=MixingConfig(**mixing),
        save_for_backward="all",
    )


def study(
    title: str,
    entrants: dict[str, Config],
    pairs: tuple[tuple[str, str], ...],
    budget_hours: float,
    target: str = "dense",
    compared: str = "dense",
) -> Study:
    """A study of three learning rates and five seeds."""
    return Study(
        title=title,
        entrants=entrants,
        target=target,
        compared=compared,
        pairs=pairs,
        budget_hours=budget_hours,
        rate_factors=(0.5, 1.0, 2.0),
        max_extensions=1,
        horizons=(),
        flops_per_second=3.5e10,
        overhead_seconds=60.0,
    )


def causal() -> Study:
    """Granularity, number of experts and learned temperature."""
    return study(
        "Claims of the paper on experts and mixing, 1,600 steps on Python source",
        {
            "experts_8": config(mixture(8)),
            "granularity_1": config(mixture(GROUP_SIZE)),
            "granularity_8": config(mixture(GROUP_SIZE, 8, 1.42)),
            "granularity_16": config(mixture(GROUP_SIZE, 16, 1.89)),
            "learned_temperature": config(mixture(GROUP_SIZE, 8, 1.42, learned_temperature="scalar")),
            "dense_wide": config(DENSE, d_ff=1152),
        },
        target="granularity_1",
        compared="granularity_8",
        pairs=(
            ("granularity_8", "granularity_1"),
            ("granularity_16", "granularity_8"),
            ("granularity_1", "experts_8"),
            ("learned_temperature", "granularity_8"),
        ),
        budget_hours=7,
    )


def masked() -> Study:
    """Masked models that mix across the sequences of a group, or neighbors within each sequence."""

    def recipe(groups: Literal["across", "within"]) -> MixtureOfTokensConfig:
        return MixtureOfTokensConfig(
            group_size=GROUP_SIZE,
            num_experts=128,
            shared_expert_dim=96,
            controller_init_scale=3.0,
            mixing=MixingConfig(groups=groups),
            save_for_backward="all",
        )

    return study(
        "Masked models, 1,600 steps on Python source",
        {
            "dense": config(DENSE, objective="masked"),
            "across": config(recipe("across"), objective="masked"),
            "within": config(recipe("within"), objective="masked"),
        },
        pairs=(("across", "within"),),
        budget_hours=4,
    )


VARIANTS: dict[str, Callable[[], Study]] = {"causal": causal, "masked": masked}


def get_study(variant: str | None = None) -> Study:
    """The study of this variant, which must be named."""
    return select(VARIANTS, variant, has_default=False)
