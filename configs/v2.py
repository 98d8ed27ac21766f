"""The models of version 2 of the paper (arXiv 2310.15961v2), Medium and Base, after 150,000 steps on C4.

There is no default variant. In a name such as `medium_32e_8`, 32 is the group size, and the number of experts of the
dense width; 8 is the granularity: 8 times as many experts, of an eighth of the width. Prepare the dataset first:
docs/reproduce.md.
"""

import dataclasses

from mot_jax.config import (
    Config,
    DataConfig,
    DenseConfig,
    FeedForwardConfig,
    MixingConfig,
    MixtureOfTokensConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
    select,
)


def _medium(feed_forward: FeedForwardConfig, shuffle_group_size: int | None = None) -> Config:
    """Medium: 8 blocks, d_model 512. The width of the experts follows from the default rule of `expert_dim`."""
    return Config(
        model=ModelConfig(
            num_blocks=8,
            d_model=512,
            d_ff=2048,
            num_heads=8,
            context_length=256,
            vocab_size=50_257,
            feed_forward=feed_forward,
            moe_blocks="last_half",
            dtype="bfloat16",
            scan_layers=False,  # a scan over blocks moves far more bytes (docs/notes/2026-11-26-step.md)
        ),
        data=DataConfig(
            corpus=("c4/en",),
            tokenizer="tokenizers/gpt2.json",
            validation_windows=16_384,
            shuffle_group_size=shuffle_group_size,
        ),
        training=TrainingConfig(
            steps=150_000,
            batch_size=256,
            optimizer=OptimizerConfig(learning_rate=7e-4, warmup_steps=2_500),
            log_every=100,
            validate_every=5_000,
            checkpoint_every=5_000,
        ),
    )


def _base(
    feed_forward: FeedForwardConfig, shuffle_group_size: int | None = None, learning_rate: float = 2e-4
) -> Config:
    """Base: 12 blocks, d_model 768."""
    medium = _medium(feed_forward, shuffle_group_size)
    model = dataclasses.replace(medium.model, num_blocks=12, d_model=768, d_ff=3072, num_heads=12)
    optimizer = dataclasses.replace(medium.training.optimizer, learning_rate=learning_rate)
    return dataclasses.replace(medium, model=model, training=dataclasses.replace(medium.training, optimizer=optimizer))


def _masked(config: Config) -> Config:
    """The same as a masked language model, whose vocabulary has one entry more than GPT-2's: the mask token."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, objective="masked", vocab_size=50_258))


def medium_dense() -> Config:
    """Transformer-Medium, the FLOP-matched dense baseline of the MoT-Medium models; batches of medium_32e.

    Command:    python train.py configs/v2.py:medium_dense
    Parameters: 76.8 M (50.9 M active)
    The paper:  the baseline of its figures; the best MoT reaches its final loss with 33 % of the compute.
    Here:       not run.
    """
    return _medium(DenseConfig(), shuffle_group_size=32)


def medium_8e() -> Config:
    """MoT-Medium/8E: groups of 8, 8 experts of the dense width.

    Command:    python train.py configs/v2.py:medium_8e
    Parameters: 135.5 M (50.9 M active)
    The paper:  figures; more experts help, and of 8, 32 and 128 these are the fewest.
    Here:       not run.
    """
    return _medium(MixtureOfTokensConfig(group_size=8, num_experts=8))


def medium_32e() -> Config:
    """MoT-Medium/32E: groups of 32, 32 experts of the dense width, in the last half of the blocks.

    Command:    python train.py configs/v2.py:medium_32e
    Parameters: 336.9 M (51.0 M active)
    The paper:  figures; its best MoT reaches the dense final loss with 33 % of the compute.
    Here:       not run.
    """
    return _medium(MixtureOfTokensConfig(group_size=32, num_experts=32))


def medium_32e_8() -> Config:
    """MoT-Medium/32E/8: granularity 8, 256 experts of width 256.

    Command:    python train.py configs/v2.py:medium_32e_8
    Parameters: 337.4 M (51.4 M active)
    The paper:  figures; more and smaller mixtures help, here of granularities 1, 8, 16 and 32.
    Here:       not run.
    """
    return _medium(MixtureOfTokensConfig(group_size=32, num_experts=256))


def medium_32e_16() -> Config:
    """MoT-Medium/32E/16: granularity 16, 512 experts of width 128.

    Command:    python train.py configs/v2.py:medium_32e_16
    Parameters: 337.9 M (52.0 M active)
    The paper:  figures; more and smaller mixtures help, here of granularities 1, 8, 16 and 32.
    Here:       not run.
    """
    return _medium(MixtureOfTokensConfig(group_size=32, num_experts=512))


def medium_32e_32() -> Config:
    """MoT-Medium/32E/32: granularity 32, 1,024 experts of width 64.

    Command:    python train.py configs/v2.py:medium_32e_32
    Parameters: 338.9 M (53.0 M active)
    The paper:  figures; more and smaller mixtures help, here of granularities 1, 8, 16 and 32.
    Here:       not run.
    """
    return _medium(MixtureOfTokensConfig(group_size=32, num_experts=1024))


def medium_128e() -> Config:
    """MoT-Medium/128E: groups of 128, 128 experts of the dense width.

    Command:    python train.py configs/v2.py:medium_128e
    Parameters: 1.14 B (51.2 M active)
    The paper:  figures; more experts help, and of 8, 32 and 128 these are the most.
    Here:       not run.
    """
    return _medium(MixtureOfTokensConfig(group_size=128, num_experts=128))


def base_dense() -> Config:
    """Transformer-Base, the FLOP-matched dense baseline of the MoT-Base models; batches of base_32e.

    Command:    python train.py configs/v2.py:base_dense
    Parameters: 162.4 M (123.6 M active)
    The paper:  the baseline of its figures; the best MoT reaches its final loss with 33 % of the compute.
    Here:       not run.
    """
    return _base(DenseConfig(), shuffle_group_size=32, learning_rate=4e-4)


def base_32e() -> Config:
    """MoT-Base/32E: groups of 32, 32 experts of the dense width.

    Command:    python train.py configs/v2.py:base_32e
    Parameters: 1.04 B (123.7 M active)
    The paper:  figures; the best MoT reaches the dense final loss with 33 % of the compute.
    Here:       not run.
    """
    return _base(MixtureOfTokensConfig(group_size=32, num_experts=32))


def base_64e_16() -> Config:
    """MoT-Base/64E/16: groups of 64, 1,024 experts of width 192.

    Command:    python train.py configs/v2.py:base_64e_16
    Parameters: 1.95 B (128.3 M active)
    The paper:  figures; MoT with small experts matches the best sparse mixture of experts.
    Here:       not run.
    """
    return _base(MixtureOfTokensConfig(group_size=64, num_experts=1024))


def base_masked() -> Config:
    """A masked language model with the sizes of MoT-Base/32E that mixes across sequences.

    Command:    python train.py configs/v2.py:base_masked
    Parameters: 1.04 B (123.7 M active)
    The paper:  a table on mixing across and within sequences; the recipe here, MoT-Base/32E's, is our guess.
    Here:       not run.
    """
    return _masked(base_32e())


def base_masked_dense() -> Config:
    """A masked language model with the sizes of Transformer-Base, the FLOP-matched dense baseline of base_masked.

    Command:    python train.py configs/v2.py:base_masked_dense
    Parameters: 162.4 M (123.6 M active)
    The paper:  a table on mixing across and within sequences; the learning rate is Transformer-Base's, our guess.
    Here:       not run.
    """
    return _masked(base_dense())


def base_masked_within() -> Config:
    """A masked language model with the sizes of MoT-Base/32E that mixes 32 neighbors within each sequence.

    The batches are those of base_masked.

    Command:    python train.py configs/v2.py:base_masked_within
    Parameters: 1.04 B (123.7 M active)
    The paper:  a table on mixing across and within sequences; the recipe is our guess, as for base_masked.
    Here:       not run.
    """
    kind = MixtureOfTokensConfig(group_size=32, num_experts=32, mixing=MixingConfig(groups="within"))
    return _masked(_base(kind, shuffle_group_size=32))


VARIANTS = {
    "medium_dense": medium_dense,
    "medium_8e": medium_8e,
    "medium_32e": medium_32e,
    "medium_32e_8": medium_32e_8,
    "medium_32e_16": medium_32e_16,
    "medium_32e_32": medium_32e_32,
    "medium_128e": medium_128e,
    "base_dense": base_dense,
    "base_32e": base_32e,
    "base_64e_16": base_64e_16,
    "base_masked": base_masked,
    "base_masked_dense": base_masked_dense,
    "base_masked_within": base_masked_within,
}


def get_config(variant: str | None = None) -> Config:
    """The config of this variant, which must be named."""
    return select(VARIANTS, variant, has_default=False)
