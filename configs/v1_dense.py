"""The dense twin of configs/v1_mot.py: the same FLOPs in the feed-forward layers, and twice its learning rate.

Command:    python train.py configs/v1_dense.py   (prepare the text first: docs/reproduce.md)
Parameters: 29.0 M (16.0 M active)
The paper:  final loss 4.0026 on C4 after 250,000 steps.
Here:       not run.
"""

import dataclasses
from pathlib import Path

from mot_jax.config import Config, DenseConfig, load_config


def get_config() -> Config:
    """The config of this experiment."""
    mot = load_config(Path(__file__).with_name("v1_mot.py"))
    optimizer = dataclasses.replace(mot.training.optimizer, learning_rate=4e-3)
    return dataclasses.replace(
        mot,
        model=dataclasses.replace(mot.model, feed_forward=DenseConfig()),
        data=dataclasses.replace(mot.data, shuffle_group_size=mot.model.group_size),  # the same batches
        training=dataclasses.replace(mot.training, optimizer=optimizer),
    )
