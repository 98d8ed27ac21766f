"""Numbers of parameters.

Active parameters are those that a token pays FLOPs for. Of the experts that is a share (`feed_forward.py`); by the
paper's rule E F = G d_ff a mixture has the active parameters of its dense layer. Embeddings are looked up and so not
active, except for a token embedding that is the head as well.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import jax

from mot_jax.config import ModelConfig
from mot_jax.cost.feed_forward import feed_forward_cost
from mot_jax.nn.transformer import init_params

# Each part of a model, with a pattern of its parameters' names.
_PATTERNS = {
    "embeddings": "embedding",
    "attention": "/attention/",
    "norms": "norm",
    "dense FFN": "forward/(kernel|bias)_",
    "controllers": "forward/(?!w_|kernel_|bias_|shared/|.*norm)",
    "experts": "forward/w_",
    "shared experts": "/shared/",
    "head": "^head$",
}


def count_parameters(model: ModelConfig) -> dict[str, int]:
    """Numbers of parameters by part."""
    # Scanned layers have the same number of parameters, and each kind of block is traced once.
    shapes = parameter_shapes(dataclasses.replace(model, scan_layers=True))
    sizes = {name: math.prod(shape.shape) for name, shape in shapes.items()}
    counts = {
        part: sum(size for name, size in sizes.items() if re.search(pattern, name))
        for part, pattern in _PATTERNS.items()
    }
    return {part: count for part, count in counts.items() if count}


def active_parameters(model: ModelConfig) -> int:
    """Number of parameters that a token pays FLOPs for."""
    parts = count_parameters(model)
    experts = feed_forward_cost(model, model.feed_forward).active_experts(parts.pop("experts", 0))
    head = model.vocab_size * model.d_model if model.tie_embeddings else 0
    return sum(parts.values()) - parts["embeddings"] + experts + head


@functools.lru_cache(maxsize=64)
def parameter_shapes(model: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of each parameter, by name."""
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
