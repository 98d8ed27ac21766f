"""The description of a whole experiment."""

import dataclasses
import json

import pytest
from paper_models import MEDIUM, PROBE, SAVE_POLICIES, V1, with_kind

from mot_jax.config import Config, TrainingConfig
from mot_jax.cost.describe import describe
from mot_jax.cost.flops import flops_per_token

EXAMPLE = Config(
    dataclasses.replace(with_kind(MEDIUM, 32, 256), dtype="bfloat16"),
    training=TrainingConfig(steps=1000, batch_size=256, gradient_accumulation_steps=2),
)


@pytest.mark.parametrize(
    ("model", "share"),
    [(with_kind(MEDIUM, 32, 32), 0.02), (with_kind(MEDIUM, 32, 512), 0.38), (with_kind(V1, 32, 512), 0.75)],
)
def test_mixing_share_matches_the_paper(model, share):
    description = describe(Config(model, training=TrainingConfig(batch_size=32)))
    assert round(description.mixing_share, 2) == share


def test_description_of_a_mixture():
    description = describe(EXAMPLE)
    data = json.loads(json.dumps(description.to_dict()))
    assert data["sizes"] == {
        "dense_blocks": 4,
        "mixture_of_tokens_blocks": 4,
        "group_size_G": 32,
        "experts_E": 256,
        "expert_dim_F": 256,
        "expert_dim_rule": "E F = G (d_ff - shared_expert_dim) = 65,536",
        "granularity_E/G": 8,
        "groups_per_batch": 8,
        "groups_per_microbatch": 4,
        "windows_per_step": 256,
        "tokens_per_step": 65_536,
        "steps": 1000,
        "windows_per_run": 256_000,
        "tokens_per_run": 65_536_000,
    }
    assert data["total_parameters"] == 337_357_824
    assert data["training_flops"] == 65_536_000 * flops_per_token(EXAMPLE)
    assert data["policy"] == "save_for_backward: pre_activations"
    assert data["policies"][data["policy"]][1] == sum(data["saved"].values())
    recomputed, saved = zip(*(data["policies"][f"save_for_backward: {s}"] for s in SAVE_POLICIES), strict=True)
    assert recomputed[0] > recomputed[1] > recomputed[2] == 0
    assert saved[0] < saved[1] < saved[2]
    lines = description.lines()
    assert max(map(len, lines)) <= 100
    assert "  total        337,357,824  100.0%" in lines
    assert "  mixing costs 18.8% of the experts' FLOPs" in lines
    assert any(line.startswith("  save_for_backward: pre_activations *") for line in lines)


@pytest.mark.parametrize("remat", ["none", "attention", "blocks"])
def test_description_of_a_dense_model(remat):
    description = describe(Config(dataclasses.replace(with_kind(MEDIUM), remat=remat)))
    assert description.policy == f"remat: {remat}"
    assert set(description.policies) == {"remat: none", "remat: attention", "remat: blocks"}
    assert description.mixing_share == 0
    assert not any("group" in line or "expert" in line for line in description.lines())


def test_attention_that_a_gpu_selects_is_a_row_of_its_own():
    """In bfloat16 only; its scores are not saved, as with `remat: attention`, but for one sum per row of scores."""
    model = dataclasses.replace(with_kind(MEDIUM), dtype="bfloat16")
    policies = describe(Config(model)).policies
    fused, scores = policies["remat: none, cudnn"], policies["remat: attention"]
    assert fused[0] == scores[0] and scores[1] < fused[1] < 1.01 * scores[1] < policies["remat: none"][1]


def test_an_explicit_expert_dim_follows_no_rule():
    sizes = describe(Config(with_kind(PROBE, 8, 4, expert_dim=32))).sizes
    assert sizes["expert_dim_F"] == 32 and "expert_dim_rule" not in sizes
    assert sizes["granularity_E/G"] == 0.5
