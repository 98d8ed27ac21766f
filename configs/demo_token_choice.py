"""The token-choice twin of configs/demo.py: the same experts, a token to 4 of 128; the same rows in the same batches.

Command:    python train.py configs/demo_token_choice.py
Parameters: 5.6 M (0.4 M active)
Recipe:     capacity 1.25 and a load-balancing weight of 0.01, the paper's for token choice; the tokens of a batch share
            the slots.
Here:       trains, and has not been run to the end.
"""

import dataclasses
from pathlib import Path

from mot_jax.config import Config, LossWeights, MixtureOfTokensConfig, TokenChoiceConfig, load_config


def get_config() -> Config:
    """The config of this experiment."""
    mot = load_config(Path(__file__).with_name("demo.py"))
    kind = mot.model.feed_forward
    assert isinstance(kind, MixtureOfTokensConfig)
    routed = TokenChoiceConfig(
        num_experts=kind.num_experts,
        top_k=kind.num_experts // kind.group_size,
        shared_expert_dim=kind.shared_expert_dim,
        capacity_factor=1.25,
        routing_group_tokens=mot.training.batch_size * mot.model.context_length,
        controller_init_scale=kind.controller_init_scale,
    )
    return dataclasses.replace(
        mot,
        model=dataclasses.replace(mot.model, feed_forward=routed),
        data=dataclasses.replace(mot.data, shuffle_group_size=mot.group_size),
        training=dataclasses.replace(mot.training, losses=LossWeights(load_balancing=0.01)),
    )
