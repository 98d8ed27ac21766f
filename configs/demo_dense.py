"""The dense twin of configs/demo.py: the same FLOPs in the feed-forward layers, the same rows in the same batches.

Command:    python train.py configs/demo_dense.py
Parameters: 0.4 M (0.4 M active)
Here:       2.174 bits per byte after 1,600 steps, see the README.
"""

import dataclasses
from pathlib import Path

from mot_jax.config import Config, DenseConfig, load_config


def get_config() -> Config:
    """The config of this experiment."""
    mot = load_config(Path(__file__).with_name("demo.py"))
    return dataclasses.replace(
        mot,
        model=dataclasses.replace(mot.model, feed_forward=DenseConfig()),
        data=dataclasses.replace(mot.data, shuffle_group_size=mot.model.group_size),
    )
