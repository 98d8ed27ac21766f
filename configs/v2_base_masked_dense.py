"""A masked language model with the sizes of Transformer-Base, the dense twin of v2_base_masked.py.

Command:    python train.py configs/v2_base_masked_dense.py   (prepare the text first: docs/reproduce.md)
Parameters: 162.4 M (123.6 M active)
The paper:  a table on mixing across and within sequences; the learning rate is Transformer-Base's, our guess.
Here:       not run.
"""

import dataclasses
from pathlib import Path

from mot_jax.config import Config, DenseConfig, load_config


def get_config() -> Config:
    """The config of this experiment."""
    base = load_config(Path(__file__).with_name("v2_base_masked.py"))
    optimizer = dataclasses.replace(base.training.optimizer, learning_rate=4e-4)
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, feed_forward=DenseConfig()),
        data=dataclasses.replace(base.data, shuffle_group_size=base.model.group_size),  # the same batches
        training=dataclasses.replace(base.training, optimizer=optimizer),
    )
