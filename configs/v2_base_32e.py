"""MoT-Base/32E of version 2 of the paper: 12 blocks, d_model 768, 32 experts of the dense width.

Command:    python train.py configs/v2_base_32e.py   (prepare the text first: docs/reproduce.md)
Parameters: 1.04 B (123.7 M active)
The paper:  figures; the best MoT reaches the dense final loss with 33 % of the compute.
Here:       not run.
"""

import dataclasses
from pathlib import Path

from mot_jax.config import Config, load_config


def get_config() -> Config:
    """The config of this experiment."""
    base = load_config(Path(__file__).with_name("v2_medium_32e.py"))
    model = dataclasses.replace(base.model, num_blocks=12, d_model=768, d_ff=3072, num_heads=12)
    optimizer = dataclasses.replace(base.training.optimizer, learning_rate=2e-4)
    return dataclasses.replace(base, model=model, training=dataclasses.replace(base.training, optimizer=optimizer))
