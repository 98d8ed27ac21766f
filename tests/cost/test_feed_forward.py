"""The cost classes cover the feed-forward kinds, and the layer benchmark and the experiment's totals agree."""

import dataclasses

import pytest
from paper_models import with_kind

from mot_jax.config import (
    CompanionsConfig,
    DenseConfig,
    ExpertChoiceConfig,
    ExpertThresholdConfig,
    HashConfig,
    MixingConfig,
    MixtureOfTokensConfig,
    ModelConfig,
    ReluRoutingConfig,
    SoftMoEConfig,
    ThresholdConfig,
    TokenChoiceConfig,
)
from mot_jax.cost.feed_forward import feed_forward_cost, flop_matched_kinds
from mot_jax.cost.flops import forward_flops
from mot_jax.nn.feed_forward import KINDS

MODEL = ModelConfig(num_blocks=1, d_model=48, d_ff=96, num_heads=4, context_length=64)
SEPARATE = MixingConfig(emit="softmax", controllers="separate")


def test_every_kind_has_a_cost():
    for kind in KINDS:
        assert feed_forward_cost(MODEL, kind()).flops() > 0
    kinds = flop_matched_kinds(4, 8, 64)
    assert {type(config) for config in kinds.values()} == set(KINDS) - {CompanionsConfig, ThresholdConfig}


@pytest.mark.parametrize(
    ("kind", "per_token"),
    [
        (DenseConfig(), {"dense FFN": 4 * 48 * 96}),
        (MixtureOfTokensConfig(4, 8), {"mixing": 3 * 2 * 48 * 8, "experts": 4 * 48 * 96}),
        (MixtureOfTokensConfig(4, 8, mixing=SEPARATE), {"mixing": 4 * 2 * 48 * 8, "experts": 4 * 48 * 96}),
        (MixtureOfTokensConfig(12, 8, expert_dim=9), {"mixing": 3 * 2 * 48 * 8, "experts": 4 * 48 * 9 * 8 / 12}),
        (
            TokenChoiceConfig(8, top_k=2, shared_expert_dim=32),
            {"router": 2 * 48 * 8, "experts": 4 * 48 * 64, "shared experts": 4 * 48 * 32},
        ),
        (  # F = 96 / 3 and a shared expert of the same width
            ExpertThresholdConfig(8, top_k=2),
            {"router": 2 * 48 * 8, "experts": 4 * 48 * 64, "shared experts": 4 * 48 * 32},
        ),
        (
            ExpertChoiceConfig(4, 8, top_k=4),  # each expert takes 2 of 4 tokens, and a token has 4 experts
            {"router": 2 * 48 * 8, "experts": 4 * 48 * 96},
        ),
        (ExpertChoiceConfig(4, 8, over="tokens"), {"router": 2 * 48 * 8, "experts": 4 * 48 * 96}),
        (
            ReluRoutingConfig(8, top_k=2, shared_expert_dim=32),
            {"router": 2 * 48 * 8, "experts": 4 * 48 * 64, "shared experts": 4 * 48 * 32},
        ),
        (HashConfig(8, top_k=2, shared_expert_dim=32), {"experts": 4 * 48 * 64, "shared experts": 4 * 48 * 32}),
        (SoftMoEConfig(8), {"mixing": 3 * 2 * 48 * 64, "experts": 4 * 48 * 96}),
        (
            SoftMoEConfig(24, shared_expert_dim=32),  # 3 slots an expert, 72 in all for 64 tokens
            {"mixing": 3 * 2 * 48 * 72, "experts": 4 * 48 * 64 * 72 / 64, "shared experts": 4 * 48 * 32},
        ),
    ],
)
def test_flops_of_each_kind_by_hand(kind, per_token):
    flops = forward_flops(dataclasses.replace(MODEL, feed_forward=kind))
    assert {name: flops[name] for name in per_token} == per_token
    assert set(flops) == {"attention projections", "attention scores", "head", *per_token}


@pytest.mark.parametrize("gated", [False, True])
def test_products_recomputed_by_each_policy(gated):
    """The merge always, the experts' output product if not `all`, and every expert product for `nothing`."""
    model = dataclasses.replace(with_kind(MODEL, 4, 8), gated=gated)
    experts, products = forward_flops(model)["experts"], 3 if gated else 2
    merge = 2 * 48 * 8
    expected = {"nothing": merge + experts, "pre_activations": merge + experts / products, "all": 0}
    for policy, flops in expected.items():
        kind = dataclasses.replace(model.feed_forward, save_for_backward=policy)
        cost = feed_forward_cost(model, kind)
        assert cost.product_flops(*cost.recomputed_products()) == flops


def test_products_of_expert_choice_recomputed_by_each_policy():
    """Dispatch, a product with 8 one-hot vectors per group, which is not useful work, and those of the experts."""
    kind = ExpertChoiceConfig(4, 8, top_k=2, save_for_backward="nothing")
    experts, dispatch = forward_flops(dataclasses.replace(MODEL, feed_forward=kind))["experts"], 2 * 48 * 8
    expected = {"nothing": dispatch + experts, "pre_activations": dispatch + experts / 2, "all": 0}
    for policy, config in feed_forward_cost(MODEL, kind).save_policies().items():
        cost = feed_forward_cost(MODEL, config)
        flops = cost.executed_product_flops(*cost.recomputed_products())
        assert flops == expected[policy.removeprefix("save_for_backward: ")]


def test_relu_routing_executes_and_saves_all_experts():
    """Experts of width 32, of which 2 of 8 are the target."""
    cost = feed_forward_cost(MODEL, ReluRoutingConfig(8, top_k=2, shared_expert_dim=32))
    assert cost.flops() == 2 * 48 * 8 + 4 * 48 * (2 * 32 + 32)
    assert cost.executed_flops() == 2 * 48 * 8 + 4 * 48 * (8 * 32 + 32)
    saved = cost.saved()
    assert (saved.activations, saved.logits, saved.parameters) == (8 * 32 + 32, 8, 0)
    assert cost.active_experts(800) == 200


def test_experts_with_thresholds_execute_slots_or_every_expert():
    """Two of eight experts per token on average: four slots per token, or without a capacity all eight."""
    for factor, executed in ((2.0, 4), (None, 8)):
        kind = ExpertThresholdConfig(8, top_k=2, capacity_factor=factor, routing_group_tokens=64)
        cost = feed_forward_cost(MODEL, kind)
        assert cost.executed_flops() - cost.flops() == 4 * 48 * 32 * (executed - 2)
