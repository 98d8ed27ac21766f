"""Tests for an NVIDIA GPU, `pytest -m gpu`: numerics of every kind, the mesh, resuming to the last bit.

On the CPU the same functions run at small sizes, as slow tests, or with `MOT_TEST_DEVICE=cpu pytest -m gpu`; `.ci/run`
leaves them out. Cases that only a GPU has, such as cuDNN's attention, are skipped there.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny_run import numbers

from mot_jax.benchmark import numerics
from mot_jax.benchmark.mesh import train_on
from mot_jax.benchmark.workloads import SMALL
from mot_jax.config import Config, MeshConfig, TokenChoiceConfig
from mot_jax.nn.sharding import AXES

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
GPU = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")  # its cases are collected on every machine
KINDS = [*numerics.configs_to_check(numerics.SHAPE, GPU), *numerics.attention_to_check("cudnn")]


@pytest.mark.parametrize("dtype", numerics.TOLERANCES)
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_float64_on_a_cpu(kind, dtype):
    checks = numerics.checks(small=jax.default_backend() == "cpu")
    if (kind, dtype) not in checks:
        pytest.skip(f"{kind} does not run in {dtype} on a {jax.default_backend()}")
    row = checks[kind, dtype]()
    assert row["ok"], row


# Every axis can shard it over eight devices.
MODEL = dataclasses.replace(SMALL.model, d_model=64, d_ff=64, num_heads=8, num_blocks=2)
MIXTURE = dataclasses.replace(SMALL, model=MODEL, training=dataclasses.replace(SMALL.training, batch_size=32))
KIND = TokenChoiceConfig(8, top_k=2, routing_group_tokens=32)
ROUTED = dataclasses.replace(MIXTURE, model=dataclasses.replace(MODEL, feed_forward=KIND))


@functools.cache
def losses_of(config: Config, axis: str, devices: int) -> list[float]:
    """Losses of eight steps; products in full float32, so that only the order of sums depends on the mesh."""
    with jax.default_matmul_precision("highest"):
        return train_on(config, dataclasses.replace(MeshConfig(data=1), **{axis: devices}), 8)[1]


@pytest.mark.parametrize(
    ("config", "axis"),
    [*((MIXTURE, axis) for axis in AXES), (ROUTED, "expert")],
    ids=lambda value: value if isinstance(value, str) else value.model.feed_forward.kind,
)
def test_losses_on_all_devices_are_those_of_one(config, axis):
    if jax.device_count() == 1:
        pytest.skip("needs several devices")
    losses = losses_of(config, axis, jax.device_count())
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(losses, losses_of(config, "data", 1), rtol=1e-5)


def test_a_new_process_resumes_a_run_bit_for_bit(finished, tmp_path):
    """Its programs are compiled, and on a GPU tuned, again."""
    workdir = shutil.copytree(finished, tmp_path / "copy")
    (workdir / "result.json").unlink()
    shutil.rmtree(workdir / "checkpoints" / "12")
    subprocess.run([sys.executable, "-m", "mot_jax.cli", "train", str(workdir)], check=True, capture_output=True)
    assert numbers(workdir) == numbers(finished)
