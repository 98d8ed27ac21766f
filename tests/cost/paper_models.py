"""Models of the paper (`docs/paper.md`, section 5), and small models whose compiled programs the tests examine."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from mot_jax.config import (
    DenseConfig,
    ExpertChoiceConfig,
    ExpertThresholdConfig,
    HashConfig,
    MixtureOfTokensConfig,
    ModelConfig,
    ReluRoutingConfig,
    SoftMoEConfig,
    TokenChoiceConfig,
)
from mot_jax.nn.feed_forward import FeedForwardContext
from mot_jax.nn.transformer import bind, init_params, init_router

SAVE_POLICIES = ("nothing", "pre_activations", "all")

MEDIUM = ModelConfig(
    num_blocks=8, d_model=512, d_ff=2048, num_heads=8, vocab_size=50257, context_length=256, moe_blocks="last_half"
)
BASE = dataclasses.replace(MEDIUM, num_blocks=12, d_model=768, d_ff=3072, num_heads=12)
V1 = ModelConfig(num_blocks=4, d_model=256, d_ff=1024, num_heads=4, vocab_size=50257, context_length=256)

# Every architectural choice that the paper does not make.
CHOICES = {"num_kv_heads": 1, "positions": "rotary", "document_mask": True, "norm": "rms", "final_norm": True}
CHOICES |= {"activation": "silu", "gated": True, "tie_embeddings": True}

# Matrix products dominate: everything else that the compiler counts is below 2 % of the FLOPs.
BATCH, PROBE = 8, ModelConfig(d_model=256, d_ff=1024, num_heads=4, context_length=64, vocab_size=256)
PROBE_MIXTURE = {"group_size": 4, "num_experts": 16, "shared_expert_dim": 256}
# The kinds that do not mix, with the same experts.
ROUTED = {
    "token_choice": TokenChoiceConfig(16, top_k=2, routing_group_tokens=64),
    "token_choice, dropless": TokenChoiceConfig(16, top_k=2, capacity_factor=None, routing_group_tokens=64),
    "expert_threshold": ExpertThresholdConfig(16, top_k=2, routing_group_tokens=64, group_size=4),
    "expert_threshold, unlimited": ExpertThresholdConfig(
        16, top_k=2, capacity_factor=None, routing_group_tokens=64, group_size=4
    ),
    "expert_choice": ExpertChoiceConfig(4, 16, top_k=4),
    "relu_routing": ReluRoutingConfig(16, top_k=2),
    "hash": HashConfig(16, top_k=2),
    "soft_moe": SoftMoEConfig(16),
}


def with_kind(model, group_size=None, num_experts=None, **fields):
    """`model` with a mixture if `group_size` is given, else dense."""
    kind = MixtureOfTokensConfig(group_size, num_experts, **fields) if group_size else DenseConfig()
    return dataclasses.replace(model, feed_forward=kind)


def probe(num_blocks, save_for_backward=None, **fields):
    """`PROBE` of so many blocks: with a mixture if `save_for_backward` is given, else dense."""
    model = dataclasses.replace(PROBE, num_blocks=num_blocks, **fields)
    if save_for_backward is None:
        return with_kind(model)
    return with_kind(model, **PROBE_MIXTURE, save_for_backward=save_for_backward)


def routed(name, num_blocks=1):
    """`PROBE` with a kind of `ROUTED`."""
    kind = ROUTED[name]
    objective = "masked" if isinstance(kind, SoftMoEConfig) else "causal"
    return dataclasses.replace(PROBE, num_blocks=num_blocks, objective=objective, feed_forward=kind)


def loss_of(model, params, tokens, targets, mask):
    """The loss of a training step after all warmups."""
    bound, context = bind(model, params), FeedForwardContext(None, tokens, step=jnp.int32(10**6), train=True)
    return bound.loss_sum(bound(tokens, context, segments=jnp.zeros_like(tokens)).hidden, targets, mask).loss


def abstract_inputs(model, batch):
    """Shapes of the parameters with the router state, tokens, targets and target mask."""
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)) | init_router(model))
    tokens = jax.ShapeDtypeStruct((batch, model.context_length), jnp.int32)
    return params, tokens, tokens, jax.ShapeDtypeStruct(tokens.shape, jnp.bool)


@functools.cache
def compiled_cost(model, backward):
    """(FLOPs per token, bytes of temporaries) reported by the compiler, which counts the body of a scan once."""
    loss = functools.partial(loss_of, model)
    lowered = jax.jit(jax.grad(loss, allow_int=True) if backward else loss).lower(*abstract_inputs(model, BATCH))
    # The program is not executed, so its machine code need not be optimized.
    program = lowered.compile({"xla_backend_optimization_level": 0})
    flops = program.cost_analysis()["flops"] / (BATCH * model.context_length)
    return flops, program.memory_analysis().temp_size_in_bytes
