"""Parameters, FLOPs and bytes of every part of an experiment, worked out from its `Config`. No array is ever built.

FLOPs: a multiply-add is 2. Only matrix products count: no norms, softmax, activations, optimizer. Attention scores are
    the full S x S products that XLA computes, causal or not. Mixing is 3 D E multiply-adds per token (controller,
    merge, emit; PAPER.md section 2), learned or not, and D E more where emit has a controller of its own. Token choice
    costs D E for the router, and k experts: neither empty slots nor dropped tokens are counted apart. Training is
    3 x the forward pass, as in MFU; what is computed a second time to save memory is *recomputed*, and apart.
Active parameters: those that a token pays FLOPs for. The G tokens of a group share the runs of its E experts, so
    experts count 1/G (by the paper's rule E F = G d_ff: the dense layer's), in token choice k/E; the embeddings, looked
    up, not at all, but for one that is the head as well.
Bytes: of all devices together, replicated arrays once; 1 MiB is 2**20.
Kept: what the forward pass leaves for the backward pass of one microbatch. Read off the residuals of JAX's own
    derivative of each part, traced on shapes, and so true of any feed-forward kind. What does not grow with the batch
    is a copy of a parameter in the activations' dtype. Not counted: masks and zeros that all blocks of a stack share.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from flax import nnx

from mot_jax.config import Config, DenseConfig, FeedForwardConfig, MixtureOfTokensConfig, ModelConfig, TokenChoiceConfig
from mot_jax.nn import routing
from mot_jax.nn.transformer import Block, init_params, scan_groups
from mot_jax.runs.optimizer import make_optimizer

# --- FLOPs ------------------------------------------------------------------------------------------------------------

# The kernels of attention that keep no scores, and the products of S x S that their backward pass makes again: the
# scores; splash, whose gradients of queries and of keys are kernels apart, makes them and their gradient in both.
FUSED = {"cudnn": 1, "splash": 3}


def flops_per_token(config: Config) -> float:
    """Model FLOPs of training per token: 3 x the forward pass, nothing that is computed again."""
    return 3 * sum(forward_flops(config.model).values())


def forward_flops(model: ModelConfig) -> dict[str, float]:
    """FLOPs of the forward pass per token, by part."""
    parts: Counter[str] = Counter()
    for kind in model.block_kinds():
        parts.update(_block_flops(model, kind))
    parts["head"] = 2 * model.d_model * model.vocab_size
    return {name: float(value) for name, value in parts.items() if value}


def _block_flops(model: ModelConfig, kind: FeedForwardConfig) -> dict[str, float]:
    d, product = model.d_model, 2 * model.d_model
    d_kv = d * (model.num_kv_heads or model.num_heads) // model.num_heads
    parts: dict[str, float] = {"attention projections": 2 * product * (d + d_kv)}
    parts["attention scores"] = 2 * product * model.context_length
    layer = product * (3 if model.gated else 2)  # per number of the hidden width
    if isinstance(kind, DenseConfig):
        return parts | {"dense FFN": layer * model.d_ff}
    if isinstance(kind, TokenChoiceConfig):
        parts |= {"router": product * kind.num_experts, "shared experts": layer * kind.shared_expert_dim}
        return parts | {"experts": layer * kind.hidden_dim(model.d_ff) * kind.top_k}
    experts = layer * kind.hidden_dim(model.d_ff) * kind.num_experts / kind.group_size
    mixing = (3 + (kind.mixing.controllers != "shared")) * product * kind.num_experts
    return parts | {"mixing": mixing, "experts": experts, "shared experts": layer * kind.shared_expert_dim}


def recomputed_flops(model: ModelConfig) -> float:
    """FLOPs per token that the backward pass spends on computing again what was not kept.

    By `save_for_backward` (`mixing.mix_through`): `all` nothing; `pre_activations` the merge and the experts' output products;
    `nothing` their input products as well, of which gated ones have two. With `remat: attention` the scores. With
    `remat: blocks`, whatever `save_for_backward`, each stack's period runs forward again, but for the product that ends its last
    block, which no derivative reads. And always what the backward pass of a fused attention makes (`FUSED`; `auto`
    counts as `xla`).
    """
    d, kinds = model.d_model, model.block_kinds()
    fused = FUSED.get(model.attention_kernel, 0)
    scores = 2.0 * model.context_length * d  # of one product of S x S
    if model.remat == "blocks":
        total = sum(sum(_block_flops(model, kind).values()) + fused * scores for kind in kinds)
        for period, repeats in scan_groups(model):
            last = period[-1]
            width = model.d_ff if isinstance(last, DenseConfig) else last.shared_expert_dim
            width += last.num_experts if isinstance(last, MixtureOfTokensConfig) else 0
            total -= repeats * 2 * d * width
        return total
    total = model.num_blocks * scores * (fused or model.remat == "attention")
    for kind in kinds:
        if isinstance(kind, TokenChoiceConfig) and kind.capacity_factor is None:  # `routing.sum_experts`
            total += _block_flops(model, kind)["experts"] / (3 if model.gated else 2)
        if isinstance(kind, MixtureOfTokensConfig):
            merge, products = 2 * d * kind.num_experts, _block_flops(model, kind)["experts"]
            output = products / (3 if model.gated else 2)
            total += {"nothing": merge + products, "pre_activations": merge + output, "all": 0}[kind.save_for_backward]
    return total


# --- parameters -------------------------------------------------------------------------------------------------------

_PARTS = {"embeddings": "embedding", "attention": "/attention/", "norms": "norm", "dense FFN": "forward/(kernel|bias)_"}
_PARTS |= {
    "controllers": "forward/(?!w_|kernel_|bias_|shared/|.*norm)",
    "experts": "forward/w_",
    "shared experts": "/shared/",
}
_PARTS |= {"head": "^head$"}


def count_parameters(model: ModelConfig) -> dict[str, int]:
    """Numbers of parameters by part."""
    whole = _shapes(dataclasses.replace(model, scan_layers=True))  # the same numbers, traced once a kind of block
    sizes = {name: math.prod(shape.shape) for name, shape in whole.items()}
    counts = {part: sum(n for name, n in sizes.items() if re.search(word, name)) for part, word in _PARTS.items()}
    return {part: count for part, count in counts.items() if count}


def active_parameters(model: ModelConfig) -> int:
    """The parameters that a token pays FLOPs for (see the top of this file)."""
    parts = count_parameters(model)
    experts, kind = parts.pop("experts", 0), model.feed_forward
    if isinstance(kind, TokenChoiceConfig):
        experts = experts * kind.top_k // kind.num_experts
    elif isinstance(kind, MixtureOfTokensConfig):
        experts //= kind.group_size
    head = model.vocab_size * model.d_model if model.tie_embeddings else 0
    return sum(parts.values()) - parts["embeddings"] + experts + head


@functools.lru_cache(maxsize=64)
def _shapes(model: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


# --- bytes ------------------------------------------------------------------------------------------------------------


_MANY = 1_000_003  # the length of a scan that is only traced: no other dimension is as large


@functools.lru_cache(maxsize=64)
def _trace_kept(model: ModelConfig, kind: FeedForwardConfig, sublayer: str) -> tuple[float, int]:
    """What x + sublayer(norm(x)) keeps in each block of a stack: bytes per row, bytes whatever the batch."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Block(model, kind, rngs=nnx.Rngs(params=0))))
    stack = jax.tree.map(lambda a: jax.ShapeDtypeStruct((_MANY, *a.shape), a.dtype), state)

    def step(x: jax.Array, state: nnx.State) -> tuple[jax.Array, None]:
        block = nnx.merge(graph, state)
        norm = getattr(block, sublayer + "_norm", lambda x: x)
        extra = {"segments": jnp.zeros(x.shape[:2], int)} if sublayer == "attention" else {}
        out = getattr(block, sublayer)(norm(x), **extra)
        return x + getattr(out, "y", out), None

    def residuals(stack: nnx.State, x: jax.Array) -> list[jax.Array]:
        return jax.tree.leaves(jax.vjp(lambda stack, x: jax.lax.scan(step, x, stack)[0], stack, x)[1])

    def size(rows: int) -> int:
        x = jax.ShapeDtypeStruct((rows, model.context_length, model.d_model), model.dtype)
        jaxpr = jax.make_jaxpr(residuals)(stack, x).jaxpr
        # The parameters themselves are there anyway; what is not stacked is a constant.
        kept = {v for v in jaxpr.outvars if not isinstance(v, jax.extend.core.Literal)} - set(jaxpr.invars)
        return sum(math.prod(v.aval.shape[1:]) * v.aval.dtype.itemsize for v in kept if v.aval.shape[:1] == (_MANY,))

    g = getattr(kind, "group_size", 1)
    if isinstance(kind, TokenChoiceConfig):
        g = max(1, kind.routing_group_tokens // model.context_length)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):  # whatever mesh the caller has set
        one, two = size(g), size(2 * g)
    return (two - one) / g, 2 * one - two


def kept_bytes(model: ModelConfig, rows: int) -> dict[str, int]:
    """Bytes that a microbatch of `rows` rows keeps for its backward pass, by part; a sublayer's norm is part of it.

    With `remat: blocks`: the input of each period of blocks, and all that one period, the largest, keeps at a time.
    """
    itemsize = jnp.dtype(model.dtype).itemsize
    hidden = rows * model.context_length * model.d_model * itemsize
    parts: Counter[str] = Counter()
    largest = 0  # of the periods, with `remat`
    # All that a block depends on, so that equal blocks are traced once.
    base = dataclasses.replace(model, moe_blocks="all", feed_forward=DenseConfig(), attention_kernel="xla")
    instead = 0  # of scores, what a kernel keeps of a row: their float32 sums; splash its output in its own layout, too
    if model.attention_kernel in FUSED:
        base = dataclasses.replace(base, remat="attention")
        instead = model.num_heads * model.context_length * 4
        instead += hidden // rows if model.attention_kernel == "splash" else 0
    elif model.remat == "blocks":
        base = dataclasses.replace(base, remat="none")
    for period, repeats in scan_groups(model):
        here: Counter[str] = Counter()
        for kind in period:
            traced = {"attention": _trace_kept(base, DenseConfig(), "attention")}
            traced[kind.kind] = _trace_kept(base, kind, "feed_forward")
            for name, (per_row, copies) in traced.items():
                here.update({name: round(per_row * rows), "copies of parameters": copies})
            here["attention"] += rows * instead
        if model.remat == "blocks":
            here, largest = Counter({"block inputs": hidden}), max(largest, here.total())
        parts.update({name: repeats * size for name, size in here.items()})
    if largest:
        parts["one period at a time"] = largest
    if model.final_norm:
        parts["final norm"] = round(_trace_kept(base, DenseConfig(), "attention_norm")[0] * rows)
    # The loss keeps the gradients of what it reads, which its forward pass makes.
    parts["head"] = hidden + model.d_model * model.vocab_size * jnp.dtype(model.param_dtype).itemsize
    return dict(parts)


def memory_bytes(config: Config) -> dict[str, int]:
    """Bytes of a training step by part: what is there throughout, and what a microbatch keeps."""
    m, t = config.model, config.training
    counted = sum(count_parameters(m).values())
    parameters = counted * jnp.dtype(m.param_dtype).itemsize
    optimizer = make_optimizer(t.optimizer, t.steps)
    state = jax.tree.leaves(jax.eval_shape(optimizer.init, _shapes(m)))
    parts = {"parameters": parameters, "optimizer state": sum(leaf.size * leaf.dtype.itemsize for leaf in state)}
    parts["gradients"] = parameters
    if t.gradient_accumulation_steps > 1:  # summed in float32, whatever the parameters are
        parts["accumulated gradients"] = counted * jnp.promote_types(m.param_dtype, jnp.float32).itemsize
    return parts | {"kept for backward": sum(kept_bytes(m, t.batch_size // t.gradient_accumulation_steps).values())}


# --- a whole experiment -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Description:
    """An experiment in numbers; units and conventions are at the top of this file.

    sizes: of the blocks, the groups, the step and the run. parameters, flops (forward, per token), memory (bytes) and
    kept (bytes per microbatch) are by part. mixing_share: FLOPs of mixing over those of the experts. policies: what
    keeping more or less would cost, (FLOPs per token computed again, bytes kept per microbatch); `policy` is in force.
    """

    sizes: dict[str, int | float | str]
    parameters: dict[str, int]
    total_parameters: int
    active_parameters: int
    flops: dict[str, float]
    forward_flops_per_token: float
    training_flops_per_token: float
    training_flops: float
    mixing_share: float
    memory: dict[str, int]
    kept: dict[str, int]
    policy: str
    policies: dict[str, tuple[float, int]]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """Plain text for a terminal."""
        total, forward, now = self.total_parameters, self.forward_flops_per_token, {self.policy: " *"}
        sizes = {**self.sizes, "FLOPs_per_run": f"{self.training_flops:.3e}"}
        counts = {**self.parameters, "total": total, "active": self.active_parameters}
        flops = {**self.flops, "forward": forward, "training, 3 x forward": self.training_flops_per_token}
        flops["computed again"] = self.policies[self.policy][0]
        memory = {**self.memory, **{f"  of it {name}": size for name, size in self.kept.items()}}
        choices = [(n + now.get(n, ""), again / 1e6, kept / 2**20) for n, (again, kept) in self.policies.items()]
        return [
            *table("Sizes", [(name.replace("_", " "), size) for name, size in sizes.items()]),
            *table("Parameters", [(name, n, f"{n / total:.1%}") for name, n in counts.items()]),
            *table("MFLOPs per token", [(name, n / 1e6, f"{n / forward:.1%}") for name, n in flops.items()]),
            *([f"  mixing costs {self.mixing_share:.1%} of the experts' FLOPs", ""] if self.mixing_share else []),
            *table("MiB, of all devices together", [(name, size / 2**20) for name, size in memory.items()]),
            *table("What to keep for backward (* now)", [("", "MFLOPs again", "MiB kept"), *choices]),
        ]


def describe(config: Config) -> Description:
    """The experiment in numbers, in a second or two. `config` must be valid (`config.check`)."""
    m, t, kind = config.model, config.training, config.model.feed_forward
    counts, flops, tokens = count_parameters(m), forward_flops(m), t.batch_size * m.context_length
    steps, rows = t.steps, t.batch_size // t.gradient_accumulation_steps
    sizes: dict[str, int | float | str] = dict(Counter(f"{block.kind}_blocks" for block in m.block_kinds()))
    choices = {"remat: none": dataclasses.replace(m, remat="none")}
    if isinstance(kind, MixtureOfTokensConfig):
        g, e = kind.group_size, kind.num_experts
        sizes |= {"group_size_G": g, "experts_E": e, "expert_dim_F": kind.hidden_dim(m.d_ff)}
        if kind.expert_dim is None:
            sizes["expert_dim_rule"] = f"E F = G (d_ff - shared_expert_dim) = {g * (m.d_ff - kind.shared_expert_dim):,}"
        sizes |= {"granularity_E/G": e // g if e % g == 0 else e / g, "groups_per_batch": t.batch_size // g}
        sizes["groups_per_microbatch"] = rows // g
        choices = {
            f"save_for_backward: {s}": dataclasses.replace(
                m, remat="none", feed_forward=dataclasses.replace(kind, save_for_backward=s)
            )
            for s in ("nothing", "pre_activations", "all")
        }
    if isinstance(kind, TokenChoiceConfig):
        sizes |= {"experts_E": kind.num_experts, "expert_dim_F": kind.hidden_dim(m.d_ff), "choices_k": kind.top_k}
        sizes["routing_group_tokens_T"] = kind.routing_group_tokens
        if kind.capacity_factor is not None:
            of = (kind.routing_group_tokens, kind.top_k, kind.num_experts, kind.capacity_factor)
            sizes["capacity_C"] = routing.capacity(*of)
    sizes |= {"windows_per_step": t.batch_size, "tokens_per_step": tokens}
    sizes |= {"steps": steps, "windows_per_run": t.batch_size * steps, "tokens_per_run": tokens * steps}
    choices["remat: attention"] = dataclasses.replace(m, remat="attention")
    choices["remat: blocks"] = dataclasses.replace(m, remat="blocks")
    return Description(
        sizes=sizes,
        parameters=counts,
        total_parameters=sum(counts.values()),
        active_parameters=active_parameters(m),
        flops=flops,
        forward_flops_per_token=sum(flops.values()),
        training_flops_per_token=flops_per_token(config),
        training_flops=flops_per_token(config) * tokens * steps,
        mixing_share=flops.get("mixing", 0) / (flops.get("experts", 0) + flops.get("shared experts", 0) or 1),
        memory=memory_bytes(config),
        kept=kept_bytes(m, rows),
        policy=next(name for name, choice in choices.items() if choice == m),
        policies={n: (recomputed_flops(c), sum(kept_bytes(c, rows).values())) for n, c in choices.items()},
    )


def table(title: str, rows: Sequence[tuple[str | float, ...]]) -> list[str]:
    forms = {int: "{:,}", float: "{:,.2f}", str: "{}"}
    texts = [[forms[type(value)].format(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return [title, *("  " + "  ".join([t[0].ljust(widths[0]), *map(str.rjust, t[1:], widths[1:])]) for t in texts), ""]


# --- what a device can do ---------------------------------------------------------------------------------------------

# JAX's device kinds, and the dense peak in TFLOP/s of (bfloat16, float32) matrix products. float32 products run at
# JAX's default precision: as TF32 on these GPUs, in one bfloat16 pass on TPUs (docs.jax.dev, "Matmul precision").
# NVIDIA's data sheets print the rates with sparsity, which are twice these.
_PEAKS = [
    ("NVIDIA A100-SXM4-40GB, NVIDIA A100-SXM4-80GB, NVIDIA A100 80GB PCIe", 312, 156),  # NVIDIA A100 data sheet
    ("NVIDIA H100 80GB HBM3", 989, 494),  # NVIDIA H100 data sheet, SXM
    ("NVIDIA H100 PCIe", 756, 378),  # NVIDIA H100 data sheet of 2022, PCIe
    ("NVIDIA H200", 989, 494),  # NVIDIA H200 data sheet, SXM
    ("NVIDIA B200", 2250, 1125),  # NVIDIA HGX B200 specifications, an eighth
    ("TPU v4", 275, 275),  # Google Cloud documentation, "TPU v4", peak compute per chip; so the next
    ("TPU v5 lite, TPU v5e", 197, 197),  # "TPU v5e"
    ("TPU v5, TPU v5p", 459, 459),  # "TPU v5p"
    ("TPU v6 lite, TPU v6e", 918, 918),  # "TPU v6e"
]


def peak_flops(device: jax.Device | str, dtype: str) -> float | None:
    """Dense peak of one device, or device kind, in FLOP/s, for products of arrays of `dtype`; None where unknown."""
    wanted = device if isinstance(device, str) else device.device_kind
    for kinds, bfloat16, float32 in _PEAKS:
        if wanted in kinds.split(", ") and dtype in ("bfloat16", "float32"):
            return 1e12 * (bfloat16 if dtype == "bfloat16" else float32)
    return None
