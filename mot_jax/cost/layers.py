"""What a feed-forward layer must cost: the FLOPs and the fewest bytes of each of its parts, worked out, nothing run.

FLOPs are `accounting`'s: matrix products alone, a multiply-add being 2, and nothing that is computed again.
Bytes: a *part* is taken as one program that reads each of its arguments once and writes each of its results once, all
    else staying on the chip. The layer *at once* is taken as two programs, forward and backward: mixtures, logits and
    expert outputs never reach memory. Neither norm nor residual belongs to the layer.
Kept: what forward writes for backward, when a backward pass follows: the pre-activations (`save_for_backward="pre_activations"`)
    in the activations' dtype, mixing weights and the router's logits in float32.
A *floor* is the larger of FLOPs over a machine's peak and bytes over its bandwidth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from mot_jax.config import DenseConfig, FeedForwardConfig, MixtureOfTokensConfig, TokenChoiceConfig
from mot_jax.cost.accounting import peak_flops
from mot_jax.cost.hardware import HARDWARE
from mot_jax.errors import UserError, nearest

MIXTURE = MixtureOfTokensConfig.kind
WAYS: dict[str, dict[str, Any]] = {
    "all_kept": {"save_for_backward": "all"},
    "fused_mixture": {"kernel": "fused_mixture", "save_for_backward": "nothing"},
    "fused_experts": {"kernel": "fused_experts", "save_for_backward": "all"},
}
FLOORS = {"H100": "h100", "v5p": "v5p"}  # in tables, and in `hardware.HARDWARE`


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one layer and of its input: `rows` sequences of `length` tokens. F = G d_ff / E, by the paper's rule."""

    name: str
    d_model: int
    d_ff: int
    group_size: int
    num_experts: int
    rows: int
    length: int

    @property
    def tokens(self) -> int:
        """T."""
        return self.rows * self.length

    def kinds(self) -> dict[str, FeedForwardConfig]:
        """The feed-forward kinds that train, by name, each with the FLOPs of the dense layer in its experts.

        Token choice has the same experts, and each token takes the E / G of them that cost as much as `d_ff` (one, if
        experts are as wide as that). `companions` is for inference alone, at G times the FLOPs: `mot bench decoding`.
        """
        e, k = self.num_experts, max(1, self.num_experts // self.group_size)
        return {
            "dense": DenseConfig(),
            MIXTURE: MixtureOfTokensConfig(self.group_size, e),
            "token_choice": TokenChoiceConfig(e, top_k=k, routing_group_tokens=max(256, self.length)),
        }

    def ways(self) -> dict[str, FeedForwardConfig]:
        """The kinds, and the mixture as it can be computed otherwise, by `mixture_of_tokens:` and a name of `WAYS`."""
        kinds = self.kinds()
        others = {name: dataclasses.replace(kinds[MIXTURE], **fields) for name, fields in WAYS.items()}
        return kinds | {f"{MIXTURE}:{name}": config for name, config in others.items()}


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("d2048", 2048, 8192, 32, 32, 128, 256),
        Shape("base_32e", 768, 3072, 32, 32, 256, 256),
        Shape("medium_32e_8", 512, 2048, 32, 256, 256, 256),
        Shape("v1", 256, 1024, 32, 512, 256, 256),
        Shape("cpu_e32", 256, 1024, 32, 32, 32, 128),
        Shape("cpu_e128", 256, 1024, 32, 128, 32, 128),
        Shape("tiny", 32, 64, 4, 8, 8, 32),
    )
}


def paper_shapes(on_cpu: bool) -> list[Shape]:
    """What `mot bench layers` times unless told otherwise."""
    return [shape for name, shape in SHAPES.items() if name.startswith("cpu_") == on_cpu and name != "tiny"]


def shape_of(name: str) -> Shape:
    """By name. Raises UserError."""
    if name not in SHAPES:
        raise UserError(f"--shapes = {name}: no such shape{nearest(name, SHAPES)}")
    return SHAPES[name]


@dataclasses.dataclass(frozen=True)
class Part:
    """flops, bytes: (forward, backward). kept: bytes that forward writes besides, where a backward pass follows."""

    name: str
    flops: tuple[float, float]
    bytes: tuple[float, float]
    kept: float = 0.0

    @property
    def training_bytes(self) -> float:
        """Of forward and backward."""
        return sum(self.bytes) + self.kept

    def of(self, direction: str) -> tuple[float, float]:
        """FLOPs and bytes of `forward` or `forward_backward`."""
        if direction == "forward":
            return self.flops[0], self.bytes[0]
        return sum(self.flops), self.training_bytes

    def floor(self, peak: float, bandwidth: float, direction: str = "forward_backward") -> float:
        """Seconds at FLOP/s and bytes/s; forward and backward are one after the other."""
        forward = self.bytes[0] if direction == "forward" else self.bytes[0] + self.kept
        passes = [(self.flops[0], forward), (self.flops[1], self.bytes[1])]
        passes = passes[:1] if direction == "forward" else passes
        return sum(max(flops / peak, size / bandwidth) for flops, size in passes)


def layer_parts(shape: Shape, kind: str, dtype: str = "bfloat16", param_dtype: str = "float32") -> list[Part]:
    """The parts of one layer, each by itself; the last one is the layer `at once`."""
    t, d, config = shape.tokens, shape.d_model, shape.kinds()[kind]
    size, wide, of_param = (jnp.dtype(n).itemsize for n in (dtype, jnp.promote_types(dtype, "float32"), param_dtype))
    x = t * d * size  # the input, the update, and their cotangents
    if isinstance(config, DenseConfig):
        return [_experts("at once", t, d, shape.d_ff, 1, size, of_param)]
    e, f, runs = shape.num_experts, config.hidden_dim(shape.d_ff), t * shape.num_experts // shape.group_size
    product, controller, said = 2.0 * t * d * e, d * e * of_param, t * e * wide
    if isinstance(config, TokenChoiceConfig):
        runs = t * config.top_k
    u = runs * d * size  # all that the experts read, and all that they write
    experts = _experts("experts", runs, d, f, e, size, of_param)
    if isinstance(config, TokenChoiceConfig):
        parts = [
            Part("router", (product, 2 * product), (x + controller, said + 2 * (x + controller)), said),
            Part("dispatch", (0.0, 0.0), (x + u, u + x)),
            experts,
            Part("combine", (0.0, 0.0), (u + x, x + 2 * u)),
        ]
    else:
        into, out = (x + controller + said + u, 2 * (x + controller) + u + 2 * said), (u + said + x, x + 2 * (u + said))
        parts = [
            Part("controller, softmax, merge", (2 * product, 4 * product), into),
            experts,
            Part("emit", (product, 2 * product), out),
        ]
    return [*parts, _at_once(parts, x, controller + 2 * e * d * f * of_param, experts.kept + said)]


def _experts(name: str, runs: int, d: int, f: int, e: int, size: int, of_param: int) -> Part:
    """`runs` inputs through E experts of width F: inputs and weights in, outputs out, pre-activations kept.

    Backward reads inputs, pre-activations, cotangents and weights; it writes the inputs' cotangents and the weights'.
    """
    products, weights = 4.0 * runs * d * f, 2 * e * d * f * of_param
    inputs, hidden = runs * d * size, runs * f * size
    return Part(name, (products, 2 * products), (2 * inputs + weights, 3 * inputs + hidden + 2 * weights), hidden)


def _at_once(parts: list[Part], x: int, parameters: int, kept: float) -> Part:
    """x and parameters in, y out; then x, dy, parameters and what was kept in, dx and the gradients out."""
    flops = (sum(part.flops[0] for part in parts), sum(part.flops[1] for part in parts))
    return Part("at once", flops, (2 * x + parameters, 3 * x + 2 * parameters + kept), kept)


def optimizer_bytes(parameters: int, param_dtype: str = "float32") -> float:
    """Of an AdamW update in one pass: gradient, parameter and both moments in; parameter and both moments out."""
    return 7.0 * parameters * jnp.dtype(param_dtype).itemsize


def count_rows(shapes: Iterable[Shape], dtype: str, param_dtype: str = "float32") -> list[dict[str, Any]]:
    """A row for each part of each kind at each shape, with its floors in seconds, forward and backward together."""
    rows = []
    for shape in shapes:
        for kind in shape.kinds():
            for part in layer_parts(shape, kind, dtype, param_dtype):
                row = {"shape": shape.name, "kind": kind, "part": part.name, "flops": part.flops, "bytes": part.bytes}
                floors = {}
                for name, hardware in ((name, HARDWARE[key]) for name, key in FLOORS.items()):
                    if peak := peak_flops(hardware.device_kind, dtype):
                        floors[name] = part.floor(peak, hardware.hbm_bandwidth)
                rows.append(row | {"kept": part.kept, "floors": floors})
    return rows
