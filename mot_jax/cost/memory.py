"""Bytes of a training step.

Bytes are totals over all devices, replicated arrays counted once; 1 MiB is 2**20. *Saved* are the arrays that the
forward pass of one microbatch saves for its backward pass. They are read off the residuals of JAX's own derivative of
each sub-layer, traced on shapes, and so are correct for any feed-forward kind. Saved bytes that do not grow with the
batch are copies of parameters in the activations' dtype. Masks and zeros that all blocks of a stack share are not
counted.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from typing import Any

import jax
import jax.core
import jax.extend.core
import jax.numpy as jnp
from flax import nnx

from mot_jax.config import Config, DenseConfig, FeedForwardConfig, ModelConfig
from mot_jax.cost.feed_forward import feed_forward_cost
from mot_jax.cost.flops import FUSED_ATTENTION
from mot_jax.cost.parameters import count_parameters, parameter_shapes
from mot_jax.nn.feed_forward import FeedForwardContext
from mot_jax.nn.transformer import Block, scan_groups
from mot_jax.runs.optimizer import make_optimizer

_SCAN_LENGTH = 1_000_003  # of a scan that is only traced; it marks stacked residuals, as no other dimension is as large


@functools.lru_cache(maxsize=64)
def _trace_saved(model: ModelConfig, kind: FeedForwardConfig, sublayer: str, sequences: int) -> tuple[int, int]:
    """Bytes that x + sublayer(norm(x)) saves in each block: in proportion to a microbatch, and independent of its size.

    Those of experts that run in blocks all count as the former.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: Block(model, kind, rngs=nnx.Rngs(params=0))))
    stack = jax.tree.map(lambda a: jax.ShapeDtypeStruct((_SCAN_LENGTH, *a.shape), a.dtype), state)

    def step(x: jax.Array, state: nnx.State) -> tuple[jax.Array, None]:
        block = nnx.merge(graph, state)
        norm = getattr(block, sublayer + "_norm", lambda x: x)
        zeros = jnp.zeros(x.shape[:2], jnp.int32)
        context = FeedForwardContext(token_ids=zeros, step=jnp.zeros((), jnp.int32), train=True)
        inputs: dict[str, dict[str, Any]] = {"attention": {"segments": zeros}, "feed_forward": {"context": context}}
        extra = inputs.get(sublayer, {})
        out = getattr(block, sublayer)(norm(x), **extra)
        return x + getattr(out, "y", out), None

    def residuals(stack: nnx.State, x: jax.Array) -> list[jax.Array]:
        return jax.tree.leaves(jax.vjp(lambda stack, x: jax.lax.scan(step, x, stack)[0], stack, x)[1])

    def size(sequences: int) -> int:
        x = jax.ShapeDtypeStruct((sequences, model.context_length, model.d_model), model.dtype)
        jaxpr = jax.make_jaxpr(residuals)(stack, x).jaxpr
        # Residuals that are the parameters themselves take no memory of their own; unstacked ones are constants.
        saved = {v for v in jaxpr.outvars if not isinstance(v, jax.extend.core.Literal)} - set(jaxpr.invars)
        arrays = [v.aval for v in saved if isinstance(v.aval, jax.core.ShapedArray)]
        stacked = [array for array in arrays if array.shape[:1] == (_SCAN_LENGTH,)]
        return sum(math.prod(array.shape[1:]) * array.dtype.itemsize for array in stacked)

    cost = feed_forward_cost(model, kind)
    g = cost.sequences_per_group()
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):  # independent of the caller's mesh
        one, two, total = (size(n) for n in (g, 2 * g, sequences))
    copies = 0 if cost.runs_in_blocks() else 2 * one - two
    return total - copies, copies


def saved_bytes(model: ModelConfig, sequences: int) -> dict[str, int]:
    """Bytes that a microbatch saves for its backward pass, by part; a sub-layer's norm belongs to the sub-layer.

    With `remat: blocks`: the input of each period of blocks, and all that the largest period saves, as the periods are
    recomputed one at a time.
    """
    itemsize = jnp.dtype(model.dtype).itemsize
    hidden = sequences * model.context_length * model.d_model * itemsize
    parts: Counter[str] = Counter()
    largest_period = 0  # only with `remat: blocks`
    # Keep only the fields that a block depends on, so that equal blocks are traced once.
    base = dataclasses.replace(model, moe_blocks="all", feed_forward=DenseConfig(), attention_kernel="xla")
    kernel_bytes = 0  # per sequence, in place of the scores: their float32 sums; for splash also its output's layout
    if model.attention_kernel in FUSED_ATTENTION:
        base = dataclasses.replace(base, remat="attention")
        kernel_bytes = model.num_heads * model.context_length * 4
        kernel_bytes += hidden // sequences if model.attention_kernel == "splash" else 0
    elif model.remat == "blocks":
        base = dataclasses.replace(base, remat="none")
    for period, repeats in scan_groups(model):
        saved: Counter[str] = Counter()
        for kind in period:
            traced = {"attention": _trace_saved(base, DenseConfig(), "attention", sequences)}
            traced[kind.kind] = _trace_saved(base, kind, "feed_forward", sequences)
            for name, (proportional, copies) in traced.items():
                saved.update({name: proportional, "copies of parameters": copies})
            saved["attention"] += sequences * kernel_bytes
        if model.remat == "blocks":
            saved, largest_period = Counter({"block inputs": hidden}), max(largest_period, saved.total())
        parts.update({name: repeats * size for name, size in saved.items()})
    if largest_period:
        parts["one period at a time"] = largest_period
    if model.final_norm:
        parts["final norm"] = _trace_saved(base, DenseConfig(), "attention_norm", sequences)[0]
    # The loss saves the gradients of its inputs, which its forward pass computes.
    parts["head"] = hidden + model.d_model * model.vocab_size * jnp.dtype(model.param_dtype).itemsize
    return dict(parts)


def memory_bytes(config: Config) -> dict[str, int]:
    """Bytes of a training step by part: persistent arrays, gradients, and the saved arrays of one microbatch."""
    m, t = config.model, config.training
    count = sum(count_parameters(m).values())
    parameters = count * jnp.dtype(m.param_dtype).itemsize
    optimizer = make_optimizer(t.optimizer, t.steps)
    state = jax.tree.leaves(jax.eval_shape(optimizer.init, parameter_shapes(m)))
    parts = {"parameters": parameters, "optimizer state": sum(leaf.size * leaf.dtype.itemsize for leaf in state)}
    parts["gradients"] = parameters
    if t.gradient_accumulation_steps > 1:  # summed in float32, whatever the dtype of the parameters
        parts["accumulated gradients"] = count * jnp.promote_types(m.param_dtype, jnp.float32).itemsize
    saved = saved_bytes(m, t.batch_size // t.gradient_accumulation_steps)
    return parts | {"saved for backward": sum(saved.values())}


def adamw_bytes(parameters: int, param_dtype: str = "float32", mu_dtype: str = "float32") -> float:
    """Bytes of a one-pass AdamW update: reads gradient, parameter and both moments; writes all but the gradient.

    The second moment is in float32 or wider.
    """
    nu_dtype = jnp.promote_types(param_dtype, jnp.float32)
    size, mu, nu = (jnp.dtype(dtype).itemsize for dtype in (param_dtype, mu_dtype, nu_dtype))
    return float(parameters * (3 * size + 2 * mu + 2 * nu))
