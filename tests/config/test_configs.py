"""The configs: valid, and what their docstrings say of them."""

import re
from pathlib import Path

import pytest

from mot_jax.config import (
    DenseConfig,
    InitConfig,
    MixtureOfTokensConfig,
    ModelConfig,
    OptimizerConfig,
    check,
    load_config,
)
from mot_jax.cost.parameters import active_parameters, count_parameters

CONFIGS = Path(__file__).parents[2] / "configs"


def words(count: int) -> str:
    return f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.py")), ids=lambda path: path.stem)
def test_a_docstring_says_command_parameters_and_results(path):
    text, config = path.read_text(), load_config(path)
    check(config)
    assert config.training.checkpoint_every < config.training.steps
    total = sum(count_parameters(config.model).values())
    assert f"Parameters: {words(total)} ({words(active_parameters(config.model))} active)" in text
    command = "" if path.stem == "demo" else re.escape(f" {path.relative_to(CONFIGS.parent)}")
    assert re.search(rf"^Command:    (python train\.py|mot train){command}\b", text, re.MULTILINE)
    assert re.search(r"^Here:       \S", text, re.MULTILINE)
    if path.stem.startswith("v"):
        claim = re.search(r"^The paper:  ((?:.+\n)(?: {12}.+\n)*)", text, re.MULTILINE)
        assert claim and len(claim[1].split()) >= 8, "a sentence of what the paper says, or that it says nothing"


# PAPER.md section 5: millions of parameters, blocks, d_model, d_ff, heads, G, E, F, peak learning rate.
V2 = {
    "medium_dense": (77, 8, 512, 2048, 8, None, None, None, 7e-4),
    "medium_8e": (136, 8, 512, 2048, 8, 8, 8, 2048, 7e-4),
    "medium_32e": (337, 8, 512, 2048, 8, 32, 32, 2048, 7e-4),
    "medium_32e_8": (338, 8, 512, 2048, 8, 32, 256, 256, 7e-4),
    "medium_32e_16": (338, 8, 512, 2048, 8, 32, 512, 128, 7e-4),
    "medium_32e_32": (338, 8, 512, 2048, 8, 32, 1024, 64, 7e-4),
    "medium_128e": (1_140, 8, 512, 2048, 8, 128, 128, 2048, 7e-4),
    "base_dense": (162, 12, 768, 3072, 12, None, None, None, 4e-4),
    "base_32e": (1_040, 12, 768, 3072, 12, 32, 32, 3072, 2e-4),
    "base_64e_16": (1_950, 12, 768, 3072, 12, 64, 1024, 192, 2e-4),
}
V2 |= {f"base_masked{name}": V2["base_32e"] for name in ("", "_within")} | {"base_masked_dense": V2["base_dense"]}


def sizes(model: ModelConfig) -> tuple:
    kind, mixture = model.feed_forward, (None, None, None)
    if isinstance(kind, MixtureOfTokensConfig):
        mixture = (kind.group_size, kind.num_experts, kind.hidden_dim(model.d_ff))
    return model.num_blocks, model.d_model, model.d_ff, model.num_heads, *mixture


def test_every_config_of_version_2_is_in_the_table():
    assert {path.stem for path in CONFIGS.glob("v2_*.py")} == {f"v2_{name}" for name in V2}


@pytest.mark.parametrize("name", V2)
def test_configs_of_version_2_are_the_papers(name):
    config = load_config(CONFIGS / f"v2_{name}.py")
    (millions, *expected, rate), model, training = V2[name], config.model, config.training
    total = sum(count_parameters(model).values())
    assert total == pytest.approx(millions * 1e6, rel=0.01) and sizes(model) == tuple(expected)
    masked = "masked" in name
    assert model == ModelConfig(
        *sizes(model)[:4],
        context_length=256,
        vocab_size=50_257 + masked,
        objective="masked" if masked else "causal",
        feed_forward=model.feed_forward,
        moe_blocks="last_half",
        init=InitConfig("truncated_normal", scale=0.1, cut=0.2),
        positions="learned",
        activation="relu",
        norm="layer",
        norm_epsilon=1e-5,
        final_norm=False,
        tie_embeddings=False,
        dtype="bfloat16",
        dense_bias=True,
        scan_layers=False,
    )
    assert (training.steps, training.batch_size) == (150_000, 256)
    assert training.optimizer == OptimizerConfig(
        "adamw", rate, 2_500, 0.1, beta1=0.9, beta2=0.999, weight_decay=0.1, decay="all", clip_norm=0.5
    )


@pytest.mark.parametrize(("name", "mixture", "rate"), [("mot", (32, 512, 64), 2e-3), ("dense", (None,) * 3, 4e-3)])
def test_configs_of_version_1_are_the_papers(name, mixture, rate):
    config = load_config(CONFIGS / f"v1_{name}.py")
    model, training = config.model, config.training
    assert sizes(model) == (4, 256, 1024, 4, *mixture) and (model.moe_blocks, model.context_length) == ("all", 256)
    assert model.init == InitConfig("uniform", scale=1.0, cut=None) and not model.final_norm  # between ±√(3 / fan_in)
    assert (training.steps, training.batch_size) == (250_000, 256)
    optimizer = training.optimizer
    assert optimizer.warmup_steps == 0.01 * training.steps and optimizer.min_lr_ratio == 0.1
    assert optimizer.learning_rate == rate and optimizer.decay == "all"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*dense.py")), ids=lambda path: path.stem)
def test_a_dense_twin_sees_the_batches_of_its_mixture(path):
    names = {"demo_dense": "demo", "v1_dense": "v1_mot", "v2_medium_dense": "v2_medium_32e"}
    names |= {"v2_base_dense": "v2_base_32e", "v2_base_masked_dense": "v2_base_masked"}
    dense, mixture = load_config(path), load_config(CONFIGS / f"{names[path.stem]}.py")
    assert isinstance(dense.model.feed_forward, DenseConfig) and dense.group_size == mixture.group_size
    assert dense.training.batch_size == mixture.training.batch_size and dense.training.steps == mixture.training.steps
