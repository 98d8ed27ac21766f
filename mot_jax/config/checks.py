"""All faults of a config at once, in words, before anything is built."""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mot_jax.config.fields import (
    Config,
    DenseConfig,
    FeedForwardConfig,
    MixingConfig,
    MixtureOfTokensConfig,
    ModelConfig,
    TokenChoiceConfig,
)
from mot_jax.config.hints import leaves, matches, type_words
from mot_jax.config.renamed import new_value
from mot_jax.errors import UserError

if TYPE_CHECKING:
    import jax


def check(config: Config) -> None:
    """Raises `UserError` with every fault of `config`."""
    faults = list(_type_faults(config, ""))
    if not faults:
        faults = [*_range_faults(config), *_size_faults(config)]
    if faults:
        raise UserError(*faults)


def _type_faults(value: Any, path: str) -> Iterator[str]:
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        name, item = f"{path}{field.name}", getattr(value, field.name)
        if value_now := new_value(name, item):
            yield f"{name} = {item!r}: is now {value_now!r}; try {value_now!r}"
        elif not matches(item, hints[field.name]):
            yield f"{name} = {item!r}: must be {type_words(hints[field.name])}; the default is {_default(field)}"
        elif dataclasses.is_dataclass(item):
            yield from _type_faults(item, name + ".")


def _default(field: dataclasses.Field) -> str:
    default = field.default
    return type(default).__name__ + "()" if dataclasses.is_dataclass(default) else repr(default)


# (least, most) by the last part of a field's name; other numbers are finite and not negative.
_RANGES: dict[str, tuple[float, float]] = dict.fromkeys(
    "num_blocks d_model d_ff num_heads num_kv_heads context_length vocab_size loss_chunk num_experts group_size "
    "expert_dim steps batch_size gradient_accumulation_steps log_every validate_every checkpoint_every max_to_keep "
    "validation_windows top_k routing_group_tokens".split(),
    (1, sys.maxsize),
)
_RANGES |= {"seed": (0, 2**32 - 1), "beta1": (0, 0.999999), "beta2": (0, 0.999999), "min_lr_ratio": (0, 1)}
_RANGES |= {"preempted_exit_code": (3, 255), "wait_seconds": (1, 10**6), "heartbeat_seconds": (1, 10**6)}
_RANGES |= {"mask_rate": (1e-3, 1), "rotary_base": (1, sys.float_info.max)}
_RANGES |= dict.fromkeys(
    ["clip_norm", "cut", "norm_epsilon", "epsilon", "capacity_factor"], (1e-30, sys.float_info.max)
)


def _range_faults(config: Config) -> Iterator[str]:
    for name, _, _, value in leaves(config):
        if isinstance(value, tuple) and name != "model.moe_blocks":
            yield from _tuple_faults(name, value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        least, most = _RANGES.get(name.rpartition(".")[2], (0, sys.float_info.max))
        if name.startswith("mesh.") and not name.endswith("_seconds"):
            if value < 1 and value != -1:
                yield f"{name} = {value}: must be at least 1, or -1 for the devices that are left; try 1"
        elif not least <= value <= most:
            limit = f"at least {least}" if not value >= least else f"at most {most}"
            yield f"{name} = {value}: must be {limit}; try {min(max(least, 1), most)}"
    rest = [name for name, size in vars(config.mesh).items() if size == -1 and not name.endswith("_seconds")]
    if len(rest) > 1:
        both = ", ".join(f"mesh.{name} = -1" for name in rest)
        yield f"{both}: only one axis may take the devices that are left; try mesh.{rest[-1]} = 1"


def _tuple_faults(name: str, items: tuple) -> Iterator[str]:
    """Numbers in tuples and in pairs: finite and not negative; weights not 0 either."""
    least = 1e-30 if name == "data.weights" else 0
    for item in items:
        number = item[-1] if isinstance(item, tuple) else item
        if not isinstance(number, str) and not least <= number <= sys.float_info.max:
            good = tuple(i for i in items if i != item)
            yield f"{name} = {items}: {number} must be finite and {'above' if least else 'at least'} 0; try {good}"


def _size_faults(config: Config) -> Iterator[str]:
    m, d = config.model, config.data
    yield from _divisor_faults("model.num_heads", m.num_heads, "model.d_model", m.d_model)
    if m.positions == "rotary" and m.num_heads > 0 and m.d_model % (2 * m.num_heads):
        odd = m.d_model / m.num_heads
        yield f"model.positions = 'rotary': needs an even d_model / num_heads, {odd:g} here; try 'learned'"
    yield from _divisor_faults("model.num_kv_heads", m.num_kv_heads or 1, "model.num_heads", m.num_heads)
    width = m.d_model // max(m.num_heads, 1)
    if fault := attention_fault(m.attention_kernel, m.context_length, width, m.dtype):
        yield f"model.{fault}"
    yield from _divisor_faults("model.loss_chunk", m.loss_chunk, "model.context_length", m.context_length)
    if isinstance(m.moe_blocks, tuple):
        there = tuple(i for i in m.moe_blocks if 0 <= i < m.num_blocks)
        if there != m.moe_blocks:
            yield f"model.moe_blocks = {m.moe_blocks}: must be blocks, which are 0 to {m.num_blocks - 1}; try {there}"
    if isinstance(m.feed_forward, DenseConfig) and not m.dense_bias:
        yield "model.dense_bias = False: is for models of two kinds; a dense one has model.feed_forward.bias; try True"
    if isinstance(m.feed_forward, MixtureOfTokensConfig):
        yield from _mixture_faults(m, m.feed_forward)
    elif config.training.upcycle_from is not None:
        yield (
            f"training.upcycle_from = {config.training.upcycle_from!r}: model.feed_forward must be a Mixture of "
            f"Tokens, and is {m.feed_forward.kind}; try None"
        )
    if isinstance(m.feed_forward, TokenChoiceConfig):
        yield from _token_choice_faults(m, m.feed_forward)
    if config.training.losses.mixing_entropy:
        mixing = getattr(m.feed_forward, "mixing", MixingConfig("uniform"))
        if not mixing.uses_temperature:
            weight = config.training.losses.mixing_entropy
            yield f"training.losses.mixing_entropy = {weight}: model.feed_forward learns no mixing weights; try 0"
    if not isinstance(m.feed_forward, TokenChoiceConfig):
        for name in ("load_balancing", "router_z"):
            if weight := getattr(config.training.losses, name):
                yield f"training.losses.{name} = {weight}: is for model.feed_forward of kind token_choice; try 0"
    if not d.corpus:
        yield "data.corpus = (): must name a corpus; try ('python_source/stdlib',)"
    elif d.weights and len(d.weights) != len(d.corpus):
        yield (
            f"data.weights = {d.weights}: must be one number for each of the {len(d.corpus)} of data.corpus, or none; "
            f"try {(1,) * len(d.corpus)}"
        )
    rows, what = max(
        (m.group_size, "model.feed_forward.group_size"), (m.sequences_per_routing_group, "the rows of a routing group")
    )
    if d.shuffle_group_size and d.shuffle_group_size % max(rows, 1):
        yield f"data.shuffle_group_size = {d.shuffle_group_size}: must be a multiple of {what} = {rows}; try {rows}"
        config = dataclasses.replace(config, data=dataclasses.replace(d, shuffle_group_size=None))
    yield from _batch_faults(config)


def _divisor_faults(name: str, value: int, of: str, whole: int) -> Iterator[str]:
    """The fault of a `value` that does not divide `whole`. Where one is below 1, other faults tell of it."""
    if min(value, whole) > 0 and whole % value:
        good = next(n for n in range(min(value, whole), 0, -1) if whole % n == 0)
        yield f"{name} = {value}: must divide {of} = {whole}; try {good}"


def attention_fault(kernel: str, length: int, width: int, dtype: str) -> str | None:
    """What attention over `length` positions, in heads of this width, asks for that its kernel does not do."""
    fault = None
    if kernel == "splash" and length % 128:
        fault = f"takes a multiple of 128 positions, and context_length = {length}"
    if kernel == "cudnn":
        if dtype != "bfloat16":
            fault = f"computes in bfloat16, and dtype = {dtype!r}"
        elif width % 8 or width > 128:
            fault = f"takes heads of a multiple of 8 up to 128, and d_model / num_heads = {width}"
        elif length % 2:
            fault = f"takes an even number of positions, and context_length = {length}"
    return fault and f"attention_kernel = {kernel!r}: {fault}; try 'auto'"


def platform_faults(config: Config, device: jax.Device) -> Iterator[str]:
    """Kernels that training asks for on devices of another kind."""
    kernel = config.model.attention_kernel
    wanted = {"splash": "tpu", "cudnn": "gpu"}.get(kernel, device.platform)
    if device.platform != wanted:
        words = f"is for devices of platform {wanted}, not {device.platform}"
        yield f"model.attention_kernel = {kernel!r}: {words}; try 'auto'"
    if not kernel_runs_on(config.model.feed_forward, device):
        kernel = getattr(config.model.feed_forward, "kernel", "xla")
        words = f"is for TPU v5e, v5p and later, not {device.device_kind}"
        yield f"model.feed_forward.kernel = {kernel!r}: {words}; try 'xla'"


def kernel_runs_on(kind: FeedForwardConfig, device: jax.Device) -> bool:
    """Whether a layer's kernel, if it has one, is for such devices: a core of older TPUs has 16 MiB, too few."""
    takes = device.platform == "tpu" and device.device_kind not in ("TPU v2", "TPU v3", "TPU v4")
    return takes or getattr(kind, "kernel", "xla") == "xla"


def without_kernel(kind: FeedForwardConfig) -> FeedForwardConfig:
    """The same layer, computed by XLA."""
    return dataclasses.replace(kind, kernel="xla") if isinstance(kind, MixtureOfTokensConfig) else kind


def mixing_faults(c: MixingConfig) -> Iterator[str]:
    """The combinations that mean nothing."""
    if c.controllers != "shared" and not c.emit_has_own_softmax:
        yield f"controllers = {c.controllers!r}: emit = {c.emit!r} reads none of its own; try 'shared'"
    if c.base_weight != "sum" and c.controllers != "common_base":
        yield f"base_weight = {c.base_weight!r}: needs controllers = 'common_base'; try 'sum'"
    if c.emit == "softmax" and c.controllers == "shared" and not c.separate_temperatures:
        yield "emit = 'softmax': with the controller and temperature of merge it is what merge has; try 'merge'"
    if c.separate_temperatures and not (c.emit_has_own_softmax and c.learned_temperature != "none"):
        yield "separate_temperatures = True: emit must have a softmax of its own, and T be learned; try False"
    if not c.uses_temperature:
        words = f"neither merge = {c.merge!r} nor emit = {c.emit!r} has a softmax"
        for name, plain in {"temperature": 1, "annealing": "none", "learned_temperature": "none"}.items():
            if getattr(c, name) != plain:
                yield f"{name} = {getattr(c, name)!r}: {words}; try {plain!r}"
        if c.straight_through:
            yield f"straight_through = True: {words}; try False"
    if c.annealing != "none" and c.annealing_steps[0] >= c.annealing_steps[1]:
        yield f"annealing_steps = {c.annealing_steps}: must be a step and a later one; try (0, 1000)"
    if c.learned_temperature != "none" and (c.annealing != "none" or c.straight_through or c.temperature == 0):
        words = "a temperature that is annealed, 0 or passed straight through cannot be learned"
        yield f"learned_temperature = {c.learned_temperature!r}: {words}; try 'none'"


def kernel_faults(kind: MixtureOfTokensConfig, gated: bool) -> Iterator[str]:
    """What a layer asks for that its kernel does not do."""
    if kind.kernel == "xla":
        return
    wrong = f"kernel = {kind.kernel!r}: "
    save_for_backward = {
        "fused_mixture": ("keeps nothing", "nothing"),
        "fused_experts": ("keeps mixtures and expert outputs", "all"),
    }
    words, needed = save_for_backward[kind.kernel]
    if kind.save_for_backward != needed:
        yield f"{wrong}{words} for the backward pass, and save_for_backward = {kind.save_for_backward!r}; try save_for_backward = {needed!r}"
    if kind.kernel == "fused_mixture" and kind.num_experts % 8:
        yield f"{wrong}takes a multiple of 8 experts, and num_experts = {kind.num_experts}; try kernel = 'xla'"
    if kind.mixing.emit != "merge":
        yield f"{wrong}emits by the merge weights, and mixing.emit = {kind.mixing.emit!r}; try kernel = 'xla'"
    if kind.mixing.groups == "within":
        yield f"{wrong}mixes across rows, and mixing.groups = 'within'; try kernel = 'xla'"
    if kind.mixing.layer_norm:
        yield f"{wrong}normalises no mixtures, and mixing.layer_norm = True; try kernel = 'xla'"
    if gated:
        yield f"{wrong}has experts without a gate, and gated = True; try kernel = 'xla'"


def _mixture_faults(model: ModelConfig, kind: MixtureOfTokensConfig, name: str = "model.feed_forward") -> Iterator[str]:
    for words in mixing_faults(kind.mixing):
        yield f"{name}.mixing.{words}"
    for words in kernel_faults(kind, model.gated):
        yield f"{name}.{words}"
    if kind.mixing.groups == "within":
        if model.objective == "causal":
            yield (
                f"{name}.mixing.groups = 'within': a token would read later tokens of its own row, which a causal "
                "model is to predict; must be across rows there; try 'across'"
            )
        yield from _divisor_faults(f"{name}.group_size", kind.group_size, "model.context_length", model.context_length)
    if fault := _shared_fault(model, kind.shared_expert_dim, name):
        yield fault
        return
    width = model.d_ff - kind.shared_expert_dim
    wanted = kind.group_size * width
    rule = f"num_experts x expert_dim = group_size x (d_ff - shared_expert_dim) = {wanted}"
    if kind.num_experts < 1 or kind.group_size < 1:
        return
    divides = wanted % kind.num_experts == 0
    if divides and (kind.expert_dim is None or not kind.flop_matched):
        return
    good = min((e for e in range(1, wanted + 1) if wanted % e == 0), key=lambda e: abs(e - kind.num_experts))
    if kind.expert_dim is None:
        yield f"{name}.num_experts = {kind.num_experts}: must divide {wanted} by the rule {rule}; try {good}"
    if kind.flop_matched and kind.expert_dim is not None and kind.num_experts * kind.expert_dim != wanted:
        advice = "None" if divides else f"{name}.expert_dim = None, {name}.num_experts = {good}"
        yield f"{name}.expert_dim = {kind.expert_dim}: breaks the rule {rule} that flop_matched asks for; try {advice}"


def _shared_fault(model: ModelConfig, width: int, name: str) -> str | None:
    if width < model.d_ff:
        return None
    return f"{name}.shared_expert_dim = {width}: must be below model.d_ff = {model.d_ff}; try {model.d_ff // 4}"


def _token_choice_faults(model: ModelConfig, kind: TokenChoiceConfig) -> Iterator[str]:
    name = "model.feed_forward"
    if kind.top_k > kind.num_experts >= 1:
        yield f"{name}.top_k = {kind.top_k}: must be at most {name}.num_experts = {kind.num_experts}; try 1"
    if fault := _shared_fault(model, kind.shared_expert_dim, name):
        yield fault
    elif kind.expert_dim is None:
        yield from _divisor_faults(
            f"{name}.top_k", kind.top_k, "d_ff - shared_expert_dim", model.d_ff - kind.shared_expert_dim
        )
    tokens, length = kind.routing_group_tokens, model.context_length
    if min(tokens, length) > 0 and length % tokens and tokens % length:
        rule = f"must divide model.context_length = {length} or be a multiple of it"
        yield f"{name}.routing_group_tokens = {tokens}: {rule}; try {max(1, round(tokens / length)) * length}"
    if kind.mixture is not None:
        yield from _mixture_faults(model, kind.mixture, f"{name}.mixture")
        for field in ("num_experts", "shared_expert_dim"):
            there, here = getattr(kind.mixture, field), getattr(kind, field)
            if there != here:
                yield f"{name}.mixture.{field} = {there}: must be that of the same weights, {here} here; try {here}"
        if min(kind.top_k, kind.mixture.num_experts) < 1:
            return
        there, here = kind.mixture.hidden_dim(model.d_ff), kind.hidden_dim(model.d_ff)
        if there != here:
            yield f"{name}.mixture.expert_dim = {there}: must be that of the same weights, {here} here; try {here}"


def _batch_faults(config: Config) -> Iterator[str]:
    """The fault of a batch that does not split into microbatches of whole groups, if it does not."""
    t, group_size = config.training, config.group_size
    multiple = group_size * t.gradient_accumulation_steps
    if multiple < 1 or t.batch_size % multiple == 0:  # below 1, other faults tell of it
        return
    parts = f"group size {group_size} x accumulation {t.gradient_accumulation_steps}"
    good = max(1, round(t.batch_size / multiple)) * multiple
    yield f"training.batch_size = {t.batch_size}: must be a multiple of {parts} = {multiple}; try {good}"
