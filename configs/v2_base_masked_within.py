"""A masked language model with the sizes of MoT-Base/32E, mixing 32 neighbours within each sequence.

Command:    python train.py configs/v2_base_masked_within.py   (prepare the text first: docs/reproduce.md)
Parameters: 1.04 B (123.7 M active)
The paper:  a table on mixing across and within sequences; the recipe is our guess, as in v2_base_masked.py.
Here:       not run.
"""

import dataclasses
from pathlib import Path

from mot_jax.config import Config, MixingConfig, MixtureOfTokensConfig, load_config


def get_config() -> Config:
    """The config of this experiment."""
    base = load_config(Path(__file__).with_name("v2_base_masked.py"))
    mixing = MixingConfig(groups="within")
    kind = MixtureOfTokensConfig(group_size=32, num_experts=32, mixing=mixing)
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, feed_forward=kind),
        data=dataclasses.replace(base.data, shuffle_group_size=base.model.group_size),  # the same batches
    )
