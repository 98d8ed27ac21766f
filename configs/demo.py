"""Small models of Python source, trained on two CPU cores in three to five minutes each.

`mot` is the default variant. The others are compared with it: they train on the same sequences in the same batches.
"""

import dataclasses

from mot_jax.config import (
    Config,
    DataConfig,
    DenseConfig,
    InitConfig,
    LossWeights,
    MeshConfig,
    MixtureOfTokensConfig,
    ModelConfig,
    OptimizerConfig,
    TokenChoiceConfig,
    TrainingConfig,
    select,
)

MIXTURE_OF_TOKENS = MixtureOfTokensConfig(
    group_size=32, num_experts=128, shared_expert_dim=96, controller_init_scale=3.0, save_for_backward="all"
)


def mot() -> Config:
    """A small Mixture-of-Tokens language model, with experts in the first of its three blocks.

    Command:    python train.py
    Parameters: 2.1 M (0.4 M active)
    Recipe:     small experts (granularity 4) next to a shared expert of a quarter of the dense width, and a controller
                whose initial standard deviation is three times the usual one, so that the mixing weights start far
                from uniform. Experts in the other blocks as well cost time, and did not lower the loss
                significantly (docs/results/recipe.md).
    Here:       2.095 bits per byte after 1,600 steps (Python 3.13), one seed.
    """
    config = all_blocks()
    model = dataclasses.replace(config.model, moe_blocks=(0,), dense_bias=False)
    return dataclasses.replace(config, model=model)


def all_blocks() -> Config:
    """The model of `mot` with experts in all of its blocks, as in the demo study.

    Command:    python train.py configs/demo.py:all_blocks
    Parameters: 5.6 M (0.4 M active)
    Here:       2.086 bits per byte after 1,600 steps (Python 3.13), one seed.
    """
    return Config(
        model=ModelConfig(
            num_blocks=3,
            d_model=96,
            d_ff=384,
            num_heads=4,
            context_length=64,
            feed_forward=MIXTURE_OF_TOKENS,
            final_norm=True,
            init=InitConfig(scale=1.0),
            loss_chunk=32,
            scan_layers=False,  # a fifth faster on CPUs
        ),
        data=DataConfig(validation_windows=512),
        training=TrainingConfig(
            steps=1600,
            batch_size=32,
            optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=50, beta2=0.95, clip_norm=1.0),
            log_every=20,
            validate_every=200,
            checkpoint_every=200,
        ),
        mesh=MeshConfig(data=1, expert=1),  # one device, since a batch has one group
    )


def dense() -> Config:
    """The dense baseline of `mot`, whose layers have the FLOPs of the experts of a token, without mixing.

    Command:    python train.py configs/demo.py:dense
    Parameters: 0.4 M (0.4 M active)
    Here:       2.149 bits per byte after 1,600 steps (Python 3.13), one seed.
    """
    config = mot()
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, feed_forward=DenseConfig(bias=False), dense_bias=True),
        data=dataclasses.replace(config.data, shuffle_group_size=config.group_size),
    )


def token_choice() -> Config:
    """Token choice with the experts of `mot`: in the first block, each token is routed to 4 of 128.

    Command:    python train.py configs/demo.py:token_choice
    Parameters: 2.1 M (0.4 M active)
    Recipe:     capacity factor 1.25 and load-balancing weight 0.01, the paper's for token choice; a batch is one
                routing group.
    Here:       trains, and has not been run to the end.
    """
    config = mot()
    kind = TokenChoiceConfig(
        num_experts=MIXTURE_OF_TOKENS.num_experts,
        top_k=MIXTURE_OF_TOKENS.num_experts // MIXTURE_OF_TOKENS.group_size,
        shared_expert_dim=MIXTURE_OF_TOKENS.shared_expert_dim,
        capacity_factor=1.25,
        routing_group_tokens=config.training.batch_size * config.model.context_length,
        controller_init_scale=MIXTURE_OF_TOKENS.controller_init_scale,
    )
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, feed_forward=kind),
        data=dataclasses.replace(config.data, shuffle_group_size=config.group_size),
        training=dataclasses.replace(config.training, losses=LossWeights(load_balancing=0.01)),
    )


def masked() -> Config:
    """A masked language model of the sizes of `all_blocks`, which also mixes across sequences.

    Command:    python train.py configs/demo.py:masked
    Parameters: 5.6 M (0.4 M active)
    Here:       predicts 54.5 % of the masked bytes of the validation split correctly after 1,300 steps; the most
                frequent byte is 27.5 % of them. `mot fill runs/demo_masked` fills gaps: docs/generate.md.
    """
    config = all_blocks()
    model = dataclasses.replace(config.model, objective="masked", vocab_size=258)  # one more entry, for the mask
    return dataclasses.replace(config, model=model, training=dataclasses.replace(config.training, steps=1_300))


VARIANTS = {"mot": mot, "all_blocks": all_blocks, "dense": dense, "token_choice": token_choice, "masked": masked}


def get_config(variant: str | None = None) -> Config:
    """The config of this variant, by default `mot`."""
    return select(VARIANTS, variant)
