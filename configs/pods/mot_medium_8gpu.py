"""MoT-Medium/32E/8 of version 2 of the paper on eight GPUs of one host, with the paper's recipe.

Command:    python train.py configs/pods/mot_medium_8gpu.py   (prepare the dataset first: docs/reproduce.md)
Parameters: 337.4 M (51.4 M active)
Plan:       mot plan configs/pods/mot_medium_8gpu.py --topology h100:8
            2.9 of 71.2 GiB a GPU, 15.5 ms a step without overlap, 11.5 with (docs/results/plans.md)
Here:       not run.
"""

import dataclasses
from pathlib import Path

from mot_jax.config import Config, MeshConfig, load_config


def get_config() -> Config:
    """The config of this experiment: each GPU has 32 of the 256 sequences and 32 of the 256 experts."""
    base = load_config(Path(__file__).parents[1] / "v2.py:medium_32e_8")
    return dataclasses.replace(base, mesh=MeshConfig(data=1, expert=8))
