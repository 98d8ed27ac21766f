"""Layers of all kinds on their own: refused configs, the step in training, router state, precision of routers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mot_jax import (
    ExpertChoice,
    ExpertThreshold,
    ExpertThresholdConfig,
    FeedForwardContext,
    Hash,
    HashConfig,
    MixingConfig,
    MixtureOfTokens,
    MixtureOfTokensConfig,
    ReluRouting,
    ReluRoutingConfig,
    SoftMoE,
    SoftMoEConfig,
    TokenChoice,
    TokenChoiceConfig,
    update_router_state,
)
from mot_jax.errors import UserError

D, D_FF = 16, 32


@pytest.mark.parametrize(
    ("layer", "config", "words"),
    [
        (MixtureOfTokens, MixtureOfTokensConfig(8, 48), "num_experts = 48: must divide 256, by the rule num_experts x"),
        (MixtureOfTokens, MixtureOfTokensConfig(8, 8, 100, flop_matched=True), "expert_dim = 100: breaks the rule"),
        (
            MixtureOfTokens,
            MixtureOfTokensConfig(8, 8, shared_expert_dim=D_FF),
            "shared_expert_dim = 32: must be below d_ff = 32; try 8",
        ),
        (MixtureOfTokens, MixtureOfTokensConfig(8, 512), "num_experts = 512: must divide 256"),
        (
            MixtureOfTokens,
            MixtureOfTokensConfig(8, 8, mixing=MixingConfig(emit="softmax")),
            "mixing.emit = 'softmax': equals the merge weights",
        ),
        (TokenChoice, TokenChoiceConfig(8, balance="bias"), "balance = 'bias': requires scores = 'sigmoid'"),
        (TokenChoice, TokenChoiceConfig(8, top_k=3), "top_k = 3: must divide d_ff - shared_expert_dim = 32; try 2"),
        (ReluRouting, ReluRoutingConfig(4, 8, top_k=8), "top_k = 8: must be at most num_experts = 4; try 1"),
        (Hash, HashConfig(4, 8, top_k=8, vocab_size=9), "top_k = 8: must be at most num_experts = 4; try 1"),
        (
            SoftMoE,
            SoftMoEConfig(4, shared_expert_dim=D_FF, slots_per_expert=1),
            "shared_expert_dim = 32: must be below",
        ),
    ],
)
def test_a_config_that_a_model_refuses_is_refused_by_the_layer_in_the_names_of_its_fields(layer, config, words):
    with pytest.raises(UserError, match=f"^{re.escape(words)}|; {re.escape(words)}"):
        layer(D, D_FF, config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("layer", "config", "field"),
    [
        (
            MixtureOfTokens,
            MixtureOfTokensConfig(2, 4, mixing=MixingConfig(annealing="linear", annealing_steps=(0, 9))),
            "mixing.annealing = 'linear'",
        ),
        (
            MixtureOfTokens,
            MixtureOfTokensConfig(2, 4, mixing=MixingConfig(learned_temperature="scalar", frozen_steps=5)),
            "mixing.frozen_steps = 5",
        ),
        (
            ExpertThreshold,
            ExpertThresholdConfig(4, 8, routing_group_tokens=8, group_size=2, warmup_steps=3),
            "warmup_steps = 3",
        ),
    ],
)
def test_a_layer_that_depends_on_the_step_requires_it_in_training(layer, config, field):
    layer, x = layer(D, D_FF, config, rngs=nnx.Rngs(0)), jnp.ones((2, 4, D))
    with pytest.raises(UserError, match=f"^{field}: requires the step in training"):
        layer(x, FeedForwardContext(train=True))
    for context in (FeedForwardContext(), FeedForwardContext(train=True, step=jnp.int32(0))):
        assert layer(x, context).y.shape == x.shape


def test_router_state_is_updated_under_strict_promotion():
    config = ExpertThresholdConfig(4, 8, routing_group_tokens=8, group_size=2)
    layer = ExpertThreshold(D, D_FF, config, rngs=nnx.Rngs(0))
    with jax.numpy_dtype_promotion("strict"):
        out = layer(jnp.ones((2, 4, D)), FeedForwardContext(train=True, step=jnp.int32(0)))
        update_router_state([layer], [out.statistics])
    assert layer.num_updates[...] == 1 and np.isfinite(layer.thresholds()).all()


@pytest.mark.parametrize(
    ("layer", "config"),
    [
        (TokenChoice, TokenChoiceConfig(4, routing_group_tokens=8)),
        (ExpertThreshold, ExpertThresholdConfig(4, routing_group_tokens=8, group_size=2)),
        (ExpertChoice, None),
        (ReluRouting, ReluRoutingConfig(4)),
        (SoftMoE, SoftMoEConfig(4, slots_per_expert=1)),
    ],
)
def test_routers_have_the_precision_of_float32_on_every_device(layer, config):
    """The logits and both of their gradients; GPUs and TPUs would round float32 operands to fewer bits."""
    layer = layer(D, D_FF, config, rngs=nnx.Rngs(0))
    sequences = getattr(layer.config, "group_size", 2)
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    def loss(params, x):
        return nnx.merge(graph, params, rest)(x, FeedForwardContext(train=True, step=jnp.int32(0))).y.sum()

    program = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(params, jnp.ones((sequences, 8, D), "bfloat16")))
    assert len(re.findall(r"precision=\(?Precision.HIGHEST|precision=Precision.HIGHEST", program)) == 3
