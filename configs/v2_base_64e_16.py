"""MoT-Base/64E/16 of version 2 of the paper: groups of 64, 1,024 experts of width 192.

Command:    python train.py configs/v2_base_64e_16.py   (prepare the text first: docs/reproduce.md)
Parameters: 1.95 B (128.3 M active)
The paper:  figures; MoT with small experts matches the best sparse mixture of experts.
Here:       not run.
"""

import dataclasses
from pathlib import Path

from mot_jax.config import Config, MixtureOfTokensConfig, load_config


def get_config() -> Config:
    """The config of this experiment."""
    base = load_config(Path(__file__).with_name("v2_base_32e.py"))
    kind = MixtureOfTokensConfig(group_size=64, num_experts=1024)
    return dataclasses.replace(base, model=dataclasses.replace(base.model, feed_forward=kind))
