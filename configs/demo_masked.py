"""A small masked language model with mixing across sequences fills gaps in Python source, on two CPU cores.

Command:    python train.py configs/demo_masked.py
Parameters: 5.6 M (0.4 M active)
Here:       54.5 % of the masked bytes of the validation split right after 1,300 steps; the commonest byte
            is 27.5 % of them. See the README.
"""

import dataclasses
from pathlib import Path

from mot_jax.config import Config, load_config


def get_config() -> Config:
    """The config of this experiment."""
    causal = load_config(Path(__file__).with_name("demo.py"))
    model = dataclasses.replace(causal.model, objective="masked", vocab_size=258)  # one more entry: the mask
    return dataclasses.replace(causal, model=model, training=dataclasses.replace(causal.training, steps=1_300))
