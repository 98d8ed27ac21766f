"""MoT-Medium/32E/16 of version 2 of the paper: granularity 16, 512 experts of width 128.

Command:    python train.py configs/v2_medium_32e_16.py   (prepare the text first: docs/reproduce.md)
Parameters: 337.9 M (52.0 M active)
The paper:  figures; more and smaller mixtures help, here of granularities 1, 8, 16 and 32.
Here:       not run.
"""

import dataclasses
from pathlib import Path

from mot_jax.config import Config, MixtureOfTokensConfig, load_config


def get_config() -> Config:
    """The config of this experiment."""
    base = load_config(Path(__file__).with_name("v2_medium_32e.py"))
    kind = MixtureOfTokensConfig(group_size=32, num_experts=512)
    return dataclasses.replace(base, model=dataclasses.replace(base.model, feed_forward=kind))
