"""Minimum cost of one feed-forward layer: FLOPs and bytes of each of its parts, computed, nothing executed.

FLOPs and memory traffic are those of `feed_forward.py`. The layer *at once* is taken as two programs, forward and
backward: mixtures, logits and expert outputs never reach memory. If a backward pass follows, forward saves
pre-activations (`save_for_backward="pre_activations"`) in the activations' dtype, and mixing weights and router logits
in float32. A *floor* is the larger of FLOPs over a device's peak and bytes over its bandwidth.

*Product by product* is the layer as one program for each matrix product, which reads its operands once and writes its
result once, parameters in their own dtype. Elementwise operations are inside products, also the derivative of the
activation, for which a product reads the pre-activations; nothing is transposed. This is the bound of a compiler that
fuses elementwise operations, but no products.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from mot_jax.config import FeedForwardConfig, MixtureOfTokensConfig, ModelConfig, TokenChoiceConfig
from mot_jax.cost.feed_forward import Arrays, FeedForwardCost, feed_forward_cost, flop_matched_kinds
from mot_jax.cost.hardware import HARDWARE, peak_flops
from mot_jax.errors import UserError, nearest

MIXTURE, TOKEN_CHOICE = MixtureOfTokensConfig.kind, TokenChoiceConfig.kind
# Further implementations of a kind, by name: fields of its config. Token choice has other capacities.
IMPLEMENTATIONS: dict[str, dict[str, dict[str, Any]]] = {
    MIXTURE: {
        "all_saved": {"save_for_backward": "all"},
        "fused_mixture": {"kernel": "fused_mixture", "save_for_backward": "nothing"},
        "fused_experts": {"kernel": "fused_experts", "save_for_backward": "all"},
    },
    TOKEN_CHOICE: {"dropless": {"capacity_factor": None}, "capacity_1": {"capacity_factor": 1.0}},
}
TOKEN_IDS = 256
DROPLESS = f"{TOKEN_CHOICE}:dropless"
FLOORS = {"H100": "h100", "v5p": "v5p"}  # title in tables: key of `hardware.HARDWARE`


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one layer and of its input. F = G d_ff / E, by the paper's rule, unless `configs` has other widths.

    sequences: number of sequences, each of `length` tokens. gated, activation: those of all networks. configs: the
    kinds; empty for those with the FLOPs of the dense layer. vocab_size: number of token ids.
    """

    name: str
    d_model: int
    d_ff: int
    group_size: int
    num_experts: int
    sequences: int
    length: int
    gated: bool = False
    activation: str = "relu"
    configs: tuple[FeedForwardConfig, ...] = ()
    vocab_size: int = TOKEN_IDS

    @property
    def tokens(self) -> int:
        """Number of tokens of the input."""
        return self.sequences * self.length

    def kinds(self) -> dict[str, FeedForwardConfig]:
        """The feed-forward kinds that train, by name, each with the FLOPs of the dense layer in its experts.

        Token choice has the same experts as the mixture, and each token takes E / G of them, which cost as much as
        `d_ff` (one if the experts have that width). `companions` is for inference only, at G times the FLOPs: see
        `mot bench decoding`.
        """
        if self.configs:
            return {config.kind: config for config in self.configs}
        return flop_matched_kinds(self.group_size, self.num_experts, self.length)

    def implementations(self) -> dict[str, FeedForwardConfig]:
        """The kinds, and further implementations of them, named `KIND:NAME`.

        `token_choice:dropless` is comparable with grouped products such as `jax.lax.ragged_dot`.
        `token_choice:capacity_1` has no slots in excess of the assignments: as many FLOPs in experts as the mixture.
        """
        implementations = dict(self.kinds())
        for kind, config in self.kinds().items():
            others = {f"{kind}:{name}": fields for name, fields in IMPLEMENTATIONS.get(kind, {}).items()}
            implementations |= {name: dataclasses.replace(config, **fields) for name, fields in others.items()}
        return implementations


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
    """The default shapes of `mot bench layers`."""
    return [shape for name, shape in SHAPES.items() if name.startswith("cpu_") == on_cpu and name != "tiny"]


def shape_of(name: str) -> Shape:
    """Look up a shape of `SHAPES`. Raises UserError."""
    if name not in SHAPES:
        raise UserError(f"--shapes = {name}: no such shape{nearest(name, SHAPES)}")
    return SHAPES[name]


@dataclasses.dataclass(frozen=True)
class LayerPart:
    """A part of a layer at a shape.

    flops, bytes: (forward, backward). saved: bytes that forward writes in addition if a backward pass follows.
    """

    name: str
    flops: tuple[float, float]
    bytes: tuple[float, float]
    saved: float = 0.0

    @property
    def training_bytes(self) -> float:
        """Bytes of forward and backward."""
        return sum(self.bytes) + self.saved

    def of(self, direction: str) -> tuple[float, float]:
        """FLOPs and bytes of `forward` or `forward_backward`."""
        if direction == "forward":
            return self.flops[0], self.bytes[0]
        return sum(self.flops), self.training_bytes

    def floor(self, peak: float, bandwidth: float, direction: str = "forward_backward") -> float:
        """Seconds at a peak in FLOP/s and a bandwidth in bytes/s; forward and backward do not overlap."""
        forward = self.bytes[0] if direction == "forward" else self.bytes[0] + self.saved
        passes = [(self.flops[0], forward), (self.flops[1], self.bytes[1])]
        passes = passes[:1] if direction == "forward" else passes
        return sum(max(flops / peak, size / bandwidth) for flops, size in passes)


@dataclasses.dataclass(frozen=True)
class ProductByProduct(LayerPart):
    """A layer as one program for each product. passes: of forward and backward, FLOPs and bytes of each program."""

    passes: tuple[tuple[tuple[float, float], ...], ...] = ()

    def floor(self, peak: float, bandwidth: float, direction: str = "forward_backward") -> float:
        """Seconds at a peak in FLOP/s and a bandwidth in bytes/s; programs do not overlap."""
        passes = self.passes[:1] if direction == "forward" else self.passes
        return sum(max(flops / peak, size / bandwidth) for products in passes for flops, size in products)


# The programs of both passes: FLOPs as those of a product of the networks (n), of the mixing (m) or none, and the
# arrays that they read or write: tokens (a), the networks' inputs or outputs (u), hidden arrays (h), logits or mixing
# weights (l), a weight of the networks (w). A controller is small and is not counted.
_NETWORKS = ("nuhw nhuw", "nuwhh nhuw nhwu nuhw")  # the third one reads h to mask its result
_MIXING = ("mal ll malu mlua", "mlau maul maul mlua ll mal mlaa")  # the last one adds the other part of x's cotangent
# Mixtures and outputs once more. W_out and the mixing weights are counted with the products that read them next.
_RECOMPUTED = ("", "mau nhu")


def product_by_product(
    shape: Shape, kind: str, dtype: str = "bfloat16", param_dtype: str = "float32"
) -> list[ProductByProduct]:
    """The least bytes of a layer without fusion of products: of `dense`, or of the mixture by `save_for_backward`.

    Empty for other kinds, and for gated networks.
    """
    config = shape.kinds()[kind]
    if shape.gated or kind not in ("dense", MIXTURE):
        return []
    wide, (t, d) = jnp.promote_types(dtype, "float32"), (shape.tokens, shape.d_model)
    experts = config.num_experts if isinstance(config, MixtureOfTokensConfig) else 1
    per_token = experts / shape.group_size if kind == MIXTURE else 1
    width = config.hidden_dim(shape.d_ff) if isinstance(config, MixtureOfTokensConfig) else shape.d_ff
    item = jnp.dtype(dtype).itemsize
    sizes = {"a": t * d * item, "u": t * per_token * d * item, "h": t * per_token * width * item}
    sizes |= {"l": t * experts * wide.itemsize, "w": experts * d * width * jnp.dtype(param_dtype).itemsize}
    flops = {"n": 2.0 * t * per_token * d * width, "m": 2.0 * t * d * experts}

    def bound(name: str, *groups: tuple[str, str]) -> ProductByProduct:
        passes = tuple(
            tuple(
                (flops.get(program[0], 0.0), float(sum(sizes.get(letter, 0) for letter in program)))
                for group in groups
                for program in group[direction].split()
            )
            for direction in (0, 1)
        )
        totals = [tuple(map(sum, zip(*programs, strict=True))) for programs in passes]
        (forward, forward_bytes), (backward, backward_bytes) = totals
        return ProductByProduct(name, (forward, backward), (forward_bytes, backward_bytes), passes=passes)

    if kind == "dense":
        return [bound("product by product", _NETWORKS)]
    saved = ("product by product, all saved", _NETWORKS, _MIXING)
    return [bound(*saved), bound("product by product, pre-activations saved", *saved[1:], _RECOMPUTED)]


def layer_cost(shape: Shape, config: FeedForwardConfig) -> FeedForwardCost:
    """The cost of a layer per token."""
    model = ModelConfig(1, shape.d_model, shape.d_ff, 1, context_length=shape.length, gated=shape.gated)
    return feed_forward_cost(model, config, shape.tokens)


def layer_parts(shape: Shape, kind: str, dtype: str = "bfloat16", param_dtype: str = "float32") -> list[LayerPart]:
    """The parts of one layer, each executed separately, and last the layer `at once`.

    A layer of a single part has only the last entry.
    """
    dtypes = (dtype, jnp.promote_types(dtype, "float32"), param_dtype)
    itemsizes = [jnp.dtype(name).itemsize for name in dtypes]
    cost = layer_cost(shape, shape.kinds()[kind])
    parts = cost.parts()

    def part_of(name: str, flops: float, forward: Arrays, backward: Arrays, saved: Arrays) -> LayerPart:
        sizes = [arrays.bytes(shape.tokens, *itemsizes) for arrays in (forward, backward, saved)]
        return LayerPart(name, (shape.tokens * flops, 2 * shape.tokens * flops), (sizes[0], sizes[1]), sizes[2])

    separate = [part_of(p.name, p.flops, p.forward, p.backward, p.saved) for p in parts] if len(parts) > 1 else []
    # Forward reads x and the parameters and writes y. Backward reads x, dy, the parameters and the saved arrays, and
    # writes dx and the gradients of the parameters.
    x, parameters = Arrays(shape.d_model), Arrays(parameters=sum(part.forward.parameters for part in parts))
    saved = cost.saved()
    at_once = part_of("at once", cost.flops(), x * 2 + parameters, x * 3 + parameters * 2 + saved, saved)
    return [*separate, at_once]


def count_rows(shapes: Iterable[Shape], dtype: str, param_dtype: str = "float32") -> list[dict[str, Any]]:
    """A row for each part of each kind at each shape, with its floors in seconds, forward and backward together."""
    rows = []
    for shape in shapes:
        for kind in shape.kinds():
            parts = layer_parts(shape, kind, dtype, param_dtype)
            for part in [*parts, *product_by_product(shape, kind, dtype, param_dtype)]:
                row = {"shape": shape.name, "kind": kind, "part": part.name, "flops": part.flops, "bytes": part.bytes}
                floors = {}
                for title, hardware in ((title, HARDWARE[name]) for title, name in FLOORS.items()):
                    if peak := peak_flops(hardware.device_kind, dtype):
                        floors[title] = part.floor(peak, hardware.hbm_bandwidth)
                rows.append(row | {"saved": part.saved, "floors": floors})
    return rows
