"""Helpers of the tests of export and import."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from etils import epath

from mot_jax.config import Config, DataConfig, ModelConfig, TrainingConfig
from mot_jax.runs.tensor_files import open_tensors


def config_of(model: ModelConfig, **data) -> Config:
    return Config(model=model, data=DataConfig(**data), training=TrainingConfig(batch_size=8))


def tensors_of(export: Path) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in open_tensors(epath.Path(export)).tensors.items()}


def assert_same(params: dict, expected: dict) -> None:
    """Assert equal names, dtypes and bits."""
    assert params.keys() == expected.keys()
    for name, value in expected.items():
        assert params[name].dtype == value.dtype
        assert np.asarray(params[name]).tobytes() == np.asarray(value).tobytes()
