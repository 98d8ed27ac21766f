"""A MoT of 20 B parameters for 512 v5p chips: 24 blocks, d_model 2048, the last 18 with 32 experts, context 2,048.

Command:    mot train configs/pods/mot_20b_v5p_512.py --workdir gs://BUCKET/runs/mot_20b   (launch/: on every host)
Parameters: 20.1 B (1.31 B active)
Plan:       mot plan configs/pods/mot_20b_v5p_512.py --topology v5p:8x8x8
            29.1 of 95.7 GiB a chip, 273 ms a step without overlap, 202 with (docs/results/plans.md)
Here:       not run.
"""

import dataclasses
from pathlib import Path

from mot_jax.config import Config, MeshConfig, MixtureOfTokensConfig, load_config


def get_config() -> Config:
    """The config of this experiment: 4 sequences of 2,048 tokens a chip, so that a group of 32 spans 8 chips."""
    base = load_config(Path(__file__).parents[1] / "v2.py:medium_32e")
    model = dataclasses.replace(
        base.model,
        feed_forward=MixtureOfTokensConfig(group_size=32, num_experts=32, save_for_backward="all"),
        num_blocks=24,
        d_model=2048,
        d_ff=8192,
        num_heads=16,
        context_length=2048,
        moe_blocks=tuple(range(6, 24)),
        final_norm=True,
        remat="attention",
    )
    optimizer = dataclasses.replace(base.training.optimizer, learning_rate=1e-4)
    training = dataclasses.replace(base.training, steps=100_000, batch_size=2048, optimizer=optimizer)
    mesh = MeshConfig(data=-1, expert=32)  # less to move than with fsdp: docs/notes/2026-11-26-pods-planned.md
    return dataclasses.replace(base, model=model, training=training, mesh=mesh)
