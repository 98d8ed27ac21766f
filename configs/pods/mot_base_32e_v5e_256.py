"""MoT-Base/32E of version 2 of the paper on 256 v5e chips: the paper's model, 32 sequences a chip.

Command:    mot train configs/pods/mot_base_32e_v5e_256.py --workdir gs://BUCKET/runs/base   (launch/: on every host)
Parameters: 1.04 B (123.7 M active)
Plan:       mot plan configs/pods/mot_base_32e_v5e_256.py --topology v5e:16x16
            5.6 of 15.75 GiB a chip, 68 ms a step without overlap, 47 with (docs/results/plans.md)
Here:       not run.
"""

import dataclasses
from pathlib import Path

from mot_jax.config import Config, MeshConfig, load_config


def get_config() -> Config:
    """The config of this experiment: as many tokens as in the paper in a 32nd of its steps, so not its recipe."""
    base = load_config(Path(__file__).parents[1] / "v2.py:base_32e")
    model = dataclasses.replace(base.model, remat="attention")
    optimizer = dataclasses.replace(base.training.optimizer, warmup_steps=500)
    training = dataclasses.replace(
        base.training,
        steps=4_688,
        batch_size=8192,
        optimizer=optimizer,
        log_every=10,
        validate_every=250,
        checkpoint_every=250,
    )
    return dataclasses.replace(base, model=model, training=training, mesh=MeshConfig(data=-1, expert=8))
