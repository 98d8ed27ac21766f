"""A run so small that a step takes milliseconds, with everything in it that a large one has."""

from __future__ import annotations

from pathlib import Path

import pytest
from etils import epath

from mot_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    LoggingConfig,
    MeshConfig,
    MixtureOfTokensConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)
from mot_jax.inference.sample import SampleHook
from mot_jax.runs.metrics import Row, read_rows
from mot_jax.training import Hook, Trainer, train

# Values of a row that depend on the speed of the machine.
TIMES = ("tokens_per_second", "model_flops_per_second", "data_wait", "seconds_left", "mfu")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Two blocks, groups of 4, batches of 32 sequences of 16 bytes of the standard library."""
    data: Path = tmp_path_factory.mktemp("data")
    return Config(
        model=ModelConfig(
            num_blocks=2,
            d_model=16,
            d_ff=32,
            num_heads=4,
            context_length=16,
            loss_chunk=8,
            feed_forward=MixtureOfTokensConfig(
                group_size=4, num_experts=8, shared_expert_dim=8, controller_init_scale=3.0
            ),
        ),
        data=DataConfig(directory=str(data), validation_split="validation[:10%]", validation_windows=64),
        training=TrainingConfig(
            steps=12,
            batch_size=32,
            optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=4),
            log_every=1,
            validate_every=6,
            checkpoint_every=4,
        ),
        mesh=MeshConfig(data=1, expert=1),
        checkpoint=CheckpointConfig(max_to_keep=2),
        logging=LoggingConfig(tensorboard=True, sample_tokens=8),
    )


@pytest.fixture(scope="session")
def finished(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> epath.Path:
    """The workdir of an undisturbed run of `tiny`; tests must not change it."""
    workdir = epath.Path(tmp_path_factory.mktemp("runs")) / "undisturbed"
    train(tiny, workdir, [SampleHook()])
    return workdir


def numbers(workdir: epath.PathLike) -> list[Row]:
    """The logged rows without their timings."""
    rows = read_rows(epath.Path(workdir))
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


class StoppedError(Exception):
    pass


class StopAt(Hook):
    """Ends a run with an error in the middle of a step, before its metrics are logged."""

    def __init__(self, step: int):
        self._step = step

    def after_step(self, trainer: Trainer, metrics: dict) -> None:
        if trainer.step == self._step:
            raise StoppedError
