"""Times of attention by XLA and by the device's fused kernel (cuDNN's or splash attention), forward and backward.

One attention layer with its projections, as in the models. Its correctness is a part of `numerics`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mot_jax.benchmark.calibration import Model, modeled
from mot_jax.benchmark.layers import forward_and_backward
from mot_jax.benchmark.report import Column, number
from mot_jax.benchmark.timing import Program, in_turns
from mot_jax.config import ModelConfig
from mot_jax.nn.attention import Attention
from mot_jax.nn.kernels import fused_attention

Row = dict[str, Any]
# Sequences, tokens, and the model: the attention of v1 and of Base/32E, and one of long sequences.
_SIZES = {
    "v1": (256, 256, ModelConfig(d_model=256, num_heads=4)),
    "base_32e": (256, 256, ModelConfig(d_model=768, num_heads=12)),
    "2,048 tokens": (16, 2048, ModelConfig(d_model=2048, num_heads=16)),
}
_SMALL = {"tiny": (2, 128, ModelConfig(d_model=32, num_heads=2))}


def bench_attention(small: bool, rounds: int, model: Model, progress: Callable[[str], None]) -> list[Row]:
    """Time causal attention in bfloat16 at a few sizes.

    Rows: size; kernel, the one in use for `attention_kernel`, a fused one only if the device has it; median_s, spread;
    ratio_to_xla; temporaries, bytes; compile_s; modeled_s, by class of kernel.
    """
    rows = []
    for size, (sequences, length, sizes) in (_SMALL if small else _SIZES).items():
        programs: dict[str, Program] = {}
        for setting in ("xla", "auto"):
            config = dataclasses.replace(
                sizes, context_length=length, dtype="bfloat16", attention_kernel=setting, loss_chunk=length
            )
            kernel = fused_attention.choose_kernel(config, length)
            if kernel not in programs:
                progress(f"attention, {size}: compiling {kernel}")
                programs[kernel] = _program(config, sequences)
        timings = in_turns(programs, rounds, f"attention, {size}: timing")
        for kernel, program in programs.items():
            row: Row = {"size": size, "kernel": kernel, "median_s": timings[kernel].median}
            row |= {"spread": timings[kernel].spread, "ratio_to_xla": timings[kernel].median / timings["xla"].median}
            row |= {"temporaries": program.temporaries, "compile_s": program.seconds_to_compile}
            rows.append(row | modeled(model, program.compiled, "bfloat16"))
    return rows


def _program(config: ModelConfig, sequences: int) -> Program:
    graph, params = nnx.split(Attention(config, rngs=nnx.Rngs(params=0)))

    def forward(variables: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, variables[0])(x, train=True)

    size = (sequences, config.context_length, config.d_model)
    x, dy = (jax.random.normal(jax.random.key(seed), size, jnp.dtype(config.dtype)) for seed in (0, 1))
    return Program(forward_and_backward(forward), (params, ()), x, dy)


COLUMNS: list[Column] = [
    ("size", lambda row: row["size"]),
    ("kernel", lambda row: row["kernel"]),
    ("ms", partial(number, "median_s", 1e3, ",.2f")),
    ("spread", partial(number, "spread", 1, ".0%")),
    ("ratio to xla", partial(number, "ratio_to_xla", 1, ".2f")),
    ("MB of temporaries", partial(number, "temporaries", 1e-6, ",.1f")),
    ("s to compile", partial(number, "compile_s", 1, ".1f")),
]
