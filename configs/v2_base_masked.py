"""A masked language model with the sizes of MoT-Base/32E, mixing across sequences.

Command:    python train.py configs/v2_base_masked.py   (prepare the text first: docs/reproduce.md)
Parameters: 1.04 B (123.7 M active)
The paper:  a table on mixing across and within sequences; the recipe here, MoT-Base/32E's, is our guess.
Here:       not run.
"""

import dataclasses
from pathlib import Path

from mot_jax.config import Config, load_config


def get_config() -> Config:
    """The config of this experiment."""
    base = load_config(Path(__file__).with_name("v2_base_32e.py"))
    # Room for the mask token, which the GPT-2 vocabulary does not have.
    model = dataclasses.replace(base.model, objective="masked", vocab_size=50_258)
    return dataclasses.replace(base, model=model)
