"""The configs: valid, and what their docstrings say of them."""

import re
from pathlib import Path

import pytest

from mot_jax import accounting
from mot_jax.config import DenseConfig, check, load_config

CONFIGS = Path(__file__).parents[1] / "configs"


def words(count: int) -> str:
    return f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_a_docstring_says_command_parameters_and_results(path):
    text, config = path.read_text(), load_config(path)
    check(config)
    total = sum(accounting.count_parameters(config.model).values())
    assert f"Parameters: {words(total)} ({words(accounting.active_parameters(config.model))} active)" in text
    command = "python train.py" + ("" if path.stem == "demo" else f" configs/{path.name}")
    assert re.search(rf"^Command:    {re.escape(command)}\b", text, re.MULTILINE)
    assert re.search(r"^Here:       \S", text, re.MULTILINE)
    if path.stem.startswith("v"):
        assert re.search(r"^The paper:  \S", text, re.MULTILINE)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*dense.py")), ids=lambda path: path.stem)
def test_a_dense_twin_sees_the_batches_of_its_mixture(path):
    names = {"demo_dense": "demo", "v1_dense": "v1_mot", "v2_medium_dense": "v2_medium_32e"}
    names |= {"v2_base_dense": "v2_base_32e", "v2_base_masked_dense": "v2_base_masked"}
    dense, mixture = load_config(path), load_config(CONFIGS / f"{names[path.stem]}.py")
    assert isinstance(dense.model.feed_forward, DenseConfig) and dense.group_size == mixture.group_size
    assert dense.training.batch_size == mixture.training.batch_size and dense.training.steps == mixture.training.steps
