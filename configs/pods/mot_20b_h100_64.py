"""A MoT of 20 B parameters for 64 H100 in eight hosts: the model of mot_20b_v5p_512.py, on an eighth of its batch.

Command:    mot train configs/pods/mot_20b_h100_64.py --workdir s3://BUCKET/runs/mot_20b   (launch/slurm.sh)
Parameters: 20.1 B (1.31 B active)
Plan:       mot plan configs/pods/mot_20b_h100_64.py --topology h100:8x8
            52.8 of 71.2 GiB a GPU, 323 ms a step without overlap, 187 with (docs/results/plans.md)
Here:       not run.
"""

import dataclasses
from pathlib import Path

from mot_jax.config import Config, MeshConfig, load_config


def get_config() -> Config:
    """The config of this experiment: experts are sharded over the GPUs of a host, so that all-to-alls use NVLink."""
    base = load_config(Path(__file__).with_name("mot_20b_v5p_512.py"))
    training = dataclasses.replace(base.training, batch_size=256)
    return dataclasses.replace(base, training=training, mesh=MeshConfig(data=-1, expert=8))
