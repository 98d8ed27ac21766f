"""MoT-Medium/8E of version 2 of the paper: groups of 8, 8 experts of the dense width.

Command:    python train.py configs/v2_medium_8e.py   (prepare the text first: docs/reproduce.md)
Parameters: 135.5 M (50.9 M active)
The paper:  figures; more experts help, and of 8, 32 and 128 these are the fewest.
Here:       not run.
"""

import dataclasses
from pathlib import Path

from mot_jax.config import Config, MixtureOfTokensConfig, load_config


def get_config() -> Config:
    """The config of this experiment."""
    base = load_config(Path(__file__).with_name("v2_medium_32e.py"))
    kind = MixtureOfTokensConfig(group_size=8, num_experts=8)
    return dataclasses.replace(base, model=dataclasses.replace(base.model, feed_forward=kind))
