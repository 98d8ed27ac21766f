"""FLOPs of a model per token.

A multiply-add is 2 FLOPs, and only matrix products count (`feed_forward.py`). Attention scores are the full S x S
products that XLA computes, causal or not. Training is 3 x the forward pass, as in MFU; products that are executed a
second time to save memory are counted separately (`recomputed_flops`).
"""

from __future__ import annotations

from collections import defaultdict

from mot_jax.config import Config, ModelConfig
from mot_jax.cost.feed_forward import feed_forward_cost
from mot_jax.nn.transformer import scan_groups

# Attention kernels that save no scores, and the number of S x S products that their backward pass recomputes: the
# scores. Splash has separate kernels for the gradients of queries and of keys; both recompute the scores and the
# gradient of the attention weights.
FUSED_ATTENTION = {"cudnn": 1, "splash": 3}


def flops_per_token(config: Config) -> float:
    """Model FLOPs of training per token: 3 x the forward pass, recomputation not included."""
    return 3 * sum(forward_flops(config.model).values())


def executed_flops_per_token(config: Config) -> float:
    """FLOPs of training per token that are executed: also for empty slots and dispatch, none for dropped tokens.

    Recomputation is not included. Without a capacity, experts are taken to process a microbatch on one device.
    """
    return flops_per_token(config) + 3 * idle_flops(config)


def idle_flops(config: Config) -> float:
    """FLOPs of the forward pass per token that are executed and not useful: those of empty slots and of dispatch."""
    costs = [feed_forward_cost(config.model, kind, tokens_at_once(config)) for kind in config.model.block_kinds()]
    return sum(cost.executed_flops() - cost.flops() for cost in costs)


def tokens_at_once(config: Config) -> int:
    """Tokens of a microbatch."""
    return config.training.batch_size // config.training.gradient_accumulation_steps * config.model.context_length


def forward_flops(model: ModelConfig) -> dict[str, float]:
    """FLOPs of the forward pass per token, by part."""
    parts: defaultdict[str, float] = defaultdict(float)
    for kind in model.block_kinds():
        for name, flops in _attention_flops(model).items():
            parts[name] += flops
        for part in feed_forward_cost(model, kind).parts():
            parts[part.summary] += part.flops
    parts["head"] = 2 * model.d_model * model.vocab_size
    return {name: float(value) for name, value in parts.items() if value}


def _attention_flops(model: ModelConfig) -> dict[str, float]:
    d, kv_width = model.d_model, model.d_model * (model.num_kv_heads or model.num_heads) // model.num_heads
    return {"attention projections": 4 * d * (d + kv_width), "attention scores": 2 * _scores_flops(model)}


def _scores_flops(model: ModelConfig) -> float:
    """FLOPs per token of one S x S product of one block."""
    return 2.0 * model.context_length * model.d_model


def recomputed_flops(model: ModelConfig) -> float:
    """FLOPs per token that the backward pass spends on recomputing values that were not saved.

    Feed-forward layers recompute according to `save_for_backward` (`feed_forward.py`), and `remat: attention`
    recomputes the scores. `remat: blocks` replaces both: the whole forward pass of each stack's period is executed
    again, except for the products that end its last block, which no derivative reads. All are counted as executed, with
    empty slots, but without those of partly filled blocks. A fused attention kernel recomputes scores in addition
    (`FUSED_ATTENTION`); `attention_kernel: auto` counts as `xla`.
    """
    kinds, scores = model.block_kinds(), _scores_flops(model)
    fused = FUSED_ATTENTION.get(model.attention_kernel, 0)
    if model.remat == "blocks":
        attention = sum(_attention_flops(model).values()) + fused * scores
        total = sum(attention + feed_forward_cost(model, kind).executed_flops() for kind in kinds)
        for period, repeats in scan_groups(model):
            last = feed_forward_cost(model, period[-1])
            total -= repeats * last.executed_product_flops(*last.final_products())
        return total
    total = model.num_blocks * scores * (fused or model.remat == "attention")
    for kind in kinds:
        cost = feed_forward_cost(model, kind)
        total += cost.executed_product_flops(*cost.recomputed_products())
    return total
