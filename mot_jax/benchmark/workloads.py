"""Models that the benchmarks run: those of the paper in code, so that an installed package needs no `configs/`.

They equal the variants of the same names in `configs/v1.py` and `configs/v2.py`, which a test compares.
"""

from __future__ import annotations

import dataclasses

from mot_jax.config import (
    Config,
    DataConfig,
    DenseConfig,
    InitConfig,
    MixtureOfTokensConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)
from mot_jax.cost.matched import with_other_layer
from mot_jax.cost.parameters import active_parameters

SMALL = Config(
    model=ModelConfig(1, 16, 32, 2, context_length=16, loss_chunk=16, feed_forward=MixtureOfTokensConfig(4, 8)),
    training=TrainingConfig(batch_size=8),
)
LATE = 2**31 - 1  # a step after every annealing and warmup
_DATA = DataConfig(corpus=("c4/en",), tokenizer="tokenizers/gpt2.json", validation_windows=16_384)


def v1_mot() -> Config:
    """The mixture of version 1 of the paper (`docs/paper.md`, section 5)."""
    model = ModelConfig(
        num_blocks=4,
        d_model=256,
        d_ff=1024,
        num_heads=4,
        context_length=256,
        vocab_size=50_257,
        feed_forward=MixtureOfTokensConfig(group_size=32, num_experts=512),
        init=InitConfig(distribution="uniform", scale=1.0, cut=None),
        dtype="bfloat16",
        scan_layers=False,
    )
    return Config(model=model, data=_DATA, training=_training(250_000, 2e-3))


def v1_dense() -> Config:
    """The dense baseline of version 1, with its learning rate."""
    dense = dense_of_equal_width(v1_mot())
    return dataclasses.replace(dense, training=_training(250_000, 4e-3))


def v2_base_32e() -> Config:
    """MoT-Base/32E of version 2 of the paper."""
    model = ModelConfig(
        num_blocks=12,
        d_model=768,
        d_ff=3072,
        num_heads=12,
        context_length=256,
        vocab_size=50_257,
        feed_forward=MixtureOfTokensConfig(group_size=32, num_experts=32),
        moe_blocks="last_half",
        dtype="bfloat16",
        scan_layers=False,
    )
    return Config(model=model, data=_DATA, training=_training(150_000, 2e-4))


def d2048() -> Config:
    """Two blocks of d_model 2,048, otherwise as MoT-Base/32E, on half of its batch."""
    base = v2_base_32e()
    model = dataclasses.replace(base.model, num_blocks=2, d_model=2048, d_ff=8192, num_heads=16)
    return dataclasses.replace(base, model=model, training=dataclasses.replace(base.training, batch_size=128))


def _training(steps: int, learning_rate: float) -> TrainingConfig:
    return TrainingConfig(
        steps=steps,
        batch_size=256,
        optimizer=OptimizerConfig(learning_rate=learning_rate, warmup_steps=2_500),
        log_every=100,
        validate_every=5_000,
        checkpoint_every=5_000,
    )


# --- dense baselines --------------------------------------------------------------------------------------------------


def dense_of_equal_width(config: Config) -> Config:
    """The FLOP-matched dense baseline: the same widths, with dense layers of the FLOPs of the experts.

    The paper compares the time of a step with this model. It trains on the same batches, without the options of
    training that belong to the other layer.
    """
    data = dataclasses.replace(config.data, shuffle_group_size=config.group_size)
    return with_other_layer(dataclasses.replace(config, data=data), DenseConfig())


def dense_of_equal_active_parameters(config: Config) -> Config:
    """The dense model whose `d_ff` gives it as many active parameters as the model of `config`.

    The baseline of generation, where a step reads every active parameter.
    """
    model = config.model

    def dense(width: int) -> ModelConfig:
        return dataclasses.replace(model, feed_forward=DenseConfig(), moe_blocks="all", dense_bias=True, d_ff=width)

    target, of_width_1, of_width_2 = (active_parameters(m) for m in (model, dense(1), dense(2)))
    width = round(1 + (target - of_width_1) / (of_width_2 - of_width_1))
    return dataclasses.replace(config, model=dense(max(width, 1)))
