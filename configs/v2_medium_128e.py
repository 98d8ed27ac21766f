"""MoT-Medium/128E of version 2 of the paper: groups of 128, 128 experts of the dense width.

Command:    python train.py configs/v2_medium_128e.py   (prepare the text first: docs/reproduce.md)
Parameters: 1.14 B (51.2 M active)
The paper:  figures; more experts help, and of 8, 32 and 128 these are the most.
Here:       not run.
"""

import dataclasses
from pathlib import Path

from mot_jax.config import Config, MixtureOfTokensConfig, load_config


def get_config() -> Config:
    """The config of this experiment."""
    base = load_config(Path(__file__).with_name("v2_medium_32e.py"))
    kind = MixtureOfTokensConfig(group_size=128, num_experts=128)
    return dataclasses.replace(base, model=dataclasses.replace(base.model, feed_forward=kind))
