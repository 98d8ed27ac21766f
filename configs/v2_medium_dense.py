"""Transformer-Medium of version 2 of the paper, the dense twin of the MoT-Medium models.

Command:    python train.py configs/v2_medium_dense.py   (prepare the text first: docs/reproduce.md)
Parameters: 76.8 M (50.9 M active)
The paper:  the baseline of its figures; the best MoT reaches its final loss with 33 % of the compute.
Here:       not run.
"""

import dataclasses
from pathlib import Path

from mot_jax.config import Config, DenseConfig, load_config


def get_config() -> Config:
    """The config of this experiment."""
    base = load_config(Path(__file__).with_name("v2_medium_32e.py"))
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, feed_forward=DenseConfig()),
        data=dataclasses.replace(base.data, shuffle_group_size=base.model.group_size),  # the same batches
    )
