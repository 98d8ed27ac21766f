"""Three training steps on a corpus in the repository, compared with the committed losses.

The corpus is the text of LICENSE, one document per paragraph. As a script, this file renews the committed losses.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import pytest

if __name__ == "__main__":  # as in conftest.py, before JAX is imported
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}

import mot_jax
from mot_jax import cli
from mot_jax.config import (
    Config,
    DataConfig,
    LoggingConfig,
    MeshConfig,
    MixtureOfTokensConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)

GOLDEN = Path(__file__).with_suffix(".json")
CORPUS = Path(__file__).parents[2] / "LICENSE"
COMMAND = "python tests/training/test_golden.py"
COMPARED = ("loss", "gradient_rms", "parameter_rms")


def losses(directory: Path) -> list[dict[str, float]]:
    """One dictionary per step with the numbers named in COMPARED."""
    text = directory / "license.txt"
    text.write_text(CORPUS.read_text())
    cli.main(["data", "build", "license", str(text), "--documents", "paragraph", "--directory", str(directory)])
    config = Config(
        model=ModelConfig(
            num_blocks=2,
            d_model=16,
            d_ff=32,
            num_heads=2,
            context_length=16,
            loss_chunk=8,
            feed_forward=MixtureOfTokensConfig(group_size=4, num_experts=8, shared_expert_dim=8),
        ),
        data=DataConfig(corpus=("license",), train_split="train", validation_split="train", directory=str(directory)),
        training=TrainingConfig(
            steps=3, batch_size=8, optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=1), log_every=1
        ),
        mesh=MeshConfig(data=1, expert=1),
        logging=LoggingConfig(tensorboard=False, sample_tokens=0),
    )
    mot_jax.train(config, directory / "run")
    rows = [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in COMPARED} for row in rows if row["split"] == "train"]


def test_three_steps_give_the_committed_losses(tmp_path: Path) -> None:
    expected = json.loads(GOLDEN.read_text())
    for step, (row, golden) in enumerate(zip(losses(tmp_path), expected, strict=True), 1):
        assert row == pytest.approx(golden, rel=1e-5), (
            f"step {step} of three trains to other numbers than {GOLDEN.name} has. If the change is intended, "
            f"renew the file with `{COMMAND}`, and state the reason and both losses in the commit message"
        )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        GOLDEN.write_text(json.dumps(losses(Path(directory)), indent=1) + "\n")
    sys.stdout.write(GOLDEN.read_text())
