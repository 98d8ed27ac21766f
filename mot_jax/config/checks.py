"""Validation of a whole config before anything is built: all errors at once."""

from __future__ import annotations

import dataclasses
import math
import sys
import typing
from collections.abc import Callable, Iterator
from typing import Any

from mot_jax.config.fields import (
    CheckpointConfig,
    CompanionsConfig,
    Config,
    DataConfig,
    DenseConfig,
    ExpertChoiceConfig,
    ExpertThresholdConfig,
    FeedForwardConfig,
    HashConfig,
    LossWeights,
    MeshConfig,
    MixingConfig,
    MixtureOfTokensConfig,
    ModelConfig,
    ReluRoutingConfig,
    SoftMoEConfig,
    ThresholdConfig,
    TokenChoiceConfig,
    TrainingConfig,
)
from mot_jax.config.hints import leaves, matches, options, type_words
from mot_jax.config.kernels import attention_error, kernel_errors
from mot_jax.config.renamed import new_value
from mot_jax.errors import UserError


def check(config: Config) -> None:
    """Raise `UserError` with one line for each error of `config`: field, value, rule, and a value that works."""
    errors = list(_type_errors(config, ""))
    if not errors:
        errors = [*_range_errors(config), *_mesh_errors(config.mesh), *_consistency_errors(config)]
    if errors:
        raise UserError(*errors)


def check_part(part: Any, path: str = "") -> None:
    """Raise `UserError` if a field of a config object that is used by itself has a wrong type or value.

    For constructors and functions that take a part of a config from Python: a misspelt word would otherwise select the
    last branch of a layer. Of a `ModelConfig`, combinations of its fields are checked as well.

    Args:
        part: a config dataclass. Unlike that of an experiment, its dtypes may be float64, for tests of the numerics.
        path: the name of `part` in messages, with a dot at the end.
    """
    dtypes = {name: "float32" for name in ("dtype", "param_dtype") if getattr(part, name, None) == "float64"}
    part = dataclasses.replace(part, **dtypes)
    errors = list(_type_errors(part, path)) or list(_range_errors(part, path))
    if isinstance(part, ModelConfig):
        errors = errors or list(_model_errors(part))
    if errors:
        raise UserError(*errors)


# --- types and ranges of single fields --------------------------------------------------------------------------------


def _type_errors(group: Any, path: str) -> Iterator[str]:
    hints = typing.get_type_hints(type(group))
    for field in dataclasses.fields(group):
        name, value = f"{path}{field.name}", getattr(group, field.name)
        if value_now := new_value(name, value):
            yield f"{name} = {value!r}: is now {value_now!r}; try {value_now!r}"
        elif not matches(value, hints[field.name]):
            yield f"{name} = {value!r}: must be {type_words(hints[field.name])}; try {_default(field)}"
        elif dataclasses.is_dataclass(value):
            yield from _type_errors(value, name + ".")


def _default(field: dataclasses.Field) -> str:
    default = field.default
    return type(default).__name__ + "()" if dataclasses.is_dataclass(default) else repr(default)


_LARGEST = 3.4028234e38  # of float32

# (minimum, maximum) by the last part of a field's name. All other numbers must be finite in float32 and not
# negative.
_RANGES: dict[str, tuple[float, float]] = dict.fromkeys(
    "num_blocks d_model d_ff num_heads num_kv_heads context_length vocab_size loss_chunk num_experts group_size "
    "expert_dim steps batch_size gradient_accumulation_steps log_every validate_every checkpoint_every max_skipped "
    "max_to_keep validation_windows final_validation_windows top_k routing_group_tokens slots_per_expert".split(),
    (1, sys.maxsize),
)
_RANGES |= {"seed": (0, 2**32 - 1), "beta1": (0, 0.999999), "beta2": (0, 0.999999), "min_lr_ratio": (0, 1)}
_RANGES |= {"l1_weight": (1e-12, 1e6), "l1_factor": (1, _LARGEST)}
_RANGES |= {"wait_seconds": (1, 10**6), "heartbeat_seconds": (1, 10**6)}
_RANGES |= {"mask_rate": (1e-3, 1), "rotary_base": (1, _LARGEST)}
_RANGES |= dict.fromkeys(["clip_norm", "cut", "norm_epsilon", "epsilon", "capacity_factor"], (1e-30, _LARGEST))


def _range_errors(group: Any, path: str = "") -> Iterator[str]:
    for name, _, _, value in leaves(group, path):
        if isinstance(value, tuple) and not name.endswith("moe_blocks"):
            yield from _tuple_errors(name, value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        minimum, maximum = _RANGES.get(name.rpartition(".")[2], (0, _LARGEST))
        if name.startswith("mesh.") and not name.endswith("_seconds"):
            if value < 1 and value != -1:
                yield f"{name} = {value}: must be at least 1, or -1 for all remaining devices; try 1"
        elif name.endswith("preempted_exit_code"):
            if not 4 <= value <= 200 or value in (127, 130):
                rule = "must be from 4 to 200, but not 127 or 130"
                yield f"{name} = {value}: {rule}, since launch/ restarts no run after the others; try 143"
        elif not minimum <= value <= maximum:
            limit = f"at least {minimum}" if not value >= minimum else f"at most {maximum}"
            yield f"{name} = {value}: must be {limit}; try {min(max(minimum, 1), maximum)}"


def _mesh_errors(mesh: MeshConfig) -> Iterator[str]:
    remaining = [name for name, size in vars(mesh).items() if size == -1 and not name.endswith("_seconds")]
    if len(remaining) > 1:
        assignments = ", ".join(f"mesh.{name} = -1" for name in remaining)
        yield f"{assignments}: only one axis may take all remaining devices; try mesh.{remaining[-1]} = 1"


def _tuple_errors(name: str, items: tuple) -> Iterator[str]:
    """Numbers in tuples and in pairs must be finite and not negative; weights must not be 0 either."""
    minimum = 1e-30 if name == "data.weights" else 0

    def is_valid(item: Any) -> bool:
        number = item[-1] if isinstance(item, tuple) else item
        return isinstance(number, str) or minimum <= number <= _LARGEST

    for item in items:
        if not is_valid(item):
            number = item[-1] if isinstance(item, tuple) else item
            if name == "data.weights":  # one for each corpus
                valid = tuple(i if is_valid(i) else 1.0 for i in items)
            else:
                valid = tuple(i for i in items if is_valid(i))
            limit = "above 0" if minimum else "at least 0"
            yield f"{name} = {items}: {number} must be finite and {limit}; try {valid}"


# --- combinations of fields -------------------------------------------------------------------------------------------


def _consistency_errors(config: Config) -> Iterator[str]:
    yield from _model_errors(config.model)
    length = config.model.context_length
    yield from _divisor_errors("model.loss_chunk", config.model.loss_chunk, "model.context_length", length)
    yield from _training_errors(config.training, config.model)
    yield from _checkpoint_errors(config.checkpoint, config.training)
    yield from _data_errors(config.data)
    model, data = config.model, config.data
    sequences, source = max(
        (model.group_size, "model.feed_forward.group_size"),
        (model.sequences_per_routing_group, "the sequences of a routing group"),
    )
    if data.shuffle_group_size and data.shuffle_group_size % max(sequences, 1):
        rule = f"must be a multiple of {source} = {sequences}"
        yield f"data.shuffle_group_size = {data.shuffle_group_size}: {rule}; try {sequences}"
        config = dataclasses.replace(config, data=dataclasses.replace(data, shuffle_group_size=None))
    yield from _batch_errors(config)


def _model_errors(model: ModelConfig) -> Iterator[str]:
    yield from _divisor_errors("model.num_heads", model.num_heads, "model.d_model", model.d_model)
    if model.positions == "rotary" and model.num_heads > 0 and model.d_model % (2 * model.num_heads):
        quotient = model.d_model / model.num_heads
        yield f"model.positions = 'rotary': requires an even d_model / num_heads, which is {quotient:g}; try 'learned'"
    yield from _divisor_errors("model.num_kv_heads", model.num_kv_heads or 1, "model.num_heads", model.num_heads)
    head_dim = model.d_model // max(model.num_heads, 1)
    if error := attention_error(model.attention_kernel, model.context_length, head_dim, model.dtype):
        yield f"model.{error}"
    if isinstance(model.moe_blocks, tuple):
        valid = tuple(i for i in model.moe_blocks if 0 <= i < model.num_blocks)
        if valid != model.moe_blocks:
            rule = f"must be indices of blocks, 0 to {model.num_blocks - 1}"
            yield f"model.moe_blocks = {model.moe_blocks}: {rule}; try {valid}"
    yield from layer_errors(model)
    if rules := _MODEL_RULES.get(type(model.feed_forward)):
        yield from rules(model, model.feed_forward)


def _checkpoint_errors(checkpoint: CheckpointConfig, training: TrainingConfig) -> Iterator[str]:
    every = training.checkpoint_every
    if checkpoint.keep_every % every:
        rule = f"must be a multiple of training.checkpoint_every = {every}"
        multiple = -(-checkpoint.keep_every // every) * every
        yield f"checkpoint.keep_every = {checkpoint.keep_every}: {rule}; try {multiple}"
    if checkpoint.keep_best and every % training.validate_every:
        rule = f"requires that training.validate_every = {training.validate_every} divides training.checkpoint_every"
        yield f"checkpoint.keep_best = {checkpoint.keep_best}: {rule}; try training.validate_every = {every}"


def _training_errors(training: TrainingConfig, model: ModelConfig) -> Iterator[str]:
    kind, losses = model.feed_forward, training.losses
    if training.upcycle_from is not None and not isinstance(kind, MixtureOfTokensConfig):
        rule = f"requires model.feed_forward of kind mixture_of_tokens, and it is {kind.kind}"
        yield f"training.upcycle_from = {training.upcycle_from!r}: {rule}; try None"
    for name, default in vars(LossWeights()).items():
        if name not in ("head_z", *kind.losses) and (weight := getattr(losses, name)) != default:
            kinds = " or ".join(k.kind for k in options(FeedForwardConfig) if name in k.losses)
            yield f"training.losses.{name} = {weight}: requires model.feed_forward of kind {kinds}; try {default:g}"
    if losses.mixing_entropy and isinstance(kind, MixtureOfTokensConfig) and not kind.mixing.uses_temperature:
        rule = "model.feed_forward has no softmax mixing weights"
        yield f"training.losses.mixing_entropy = {losses.mixing_entropy}: {rule}; try 0"


def _data_errors(data: DataConfig) -> Iterator[str]:
    if not data.corpus:
        yield "data.corpus = (): must name a corpus; try ('python_source/stdlib',)"
    elif data.weights and len(data.weights) != len(data.corpus):
        rule = f"must be one number for each of the {len(data.corpus)} of data.corpus, or empty"
        yield f"data.weights = {data.weights}: {rule}; try {(1,) * len(data.corpus)}"


def _batch_errors(config: Config) -> Iterator[str]:
    """The error of a batch that does not split into microbatches of whole groups."""
    t, group_size = config.training, config.group_size
    multiple = group_size * t.gradient_accumulation_steps
    if multiple < 1 or t.batch_size % multiple == 0:  # numbers below 1 have errors of their own
        return
    factors = f"group size {group_size} x accumulation {t.gradient_accumulation_steps}"
    nearest = max(1, round(t.batch_size / multiple)) * multiple
    yield f"training.batch_size = {t.batch_size}: must be a multiple of {factors} = {multiple}; try {nearest}"


def _divisor_errors(name: str, value: int, whole_name: str, whole: int) -> Iterator[str]:
    """The error of a `value` that does not divide `whole`. Numbers below 1 have errors of their own."""
    if min(value, whole) > 0 and whole % value:
        divisor = next(n for n in range(min(value, whole), 0, -1) if whole % n == 0)
        yield f"{name} = {value}: must divide {whole_name} = {whole}; try {divisor}"


# --- feed-forward kinds -----------------------------------------------------------------------------------------------


def mixing_errors(c: MixingConfig) -> Iterator[str]:
    """Combinations of mixing fields that have no meaning."""
    if c.controllers != "shared" and not c.emit_has_own_softmax:
        yield f"controllers = {c.controllers!r}: emit = {c.emit!r} has no controller of its own; try 'shared'"
    if c.base_weight != "sum" and c.controllers != "common_base":
        yield f"base_weight = {c.base_weight!r}: requires controllers = 'common_base'; try 'sum'"
    if c.emit == "softmax" and c.controllers == "shared" and not c.separate_temperatures:
        yield "emit = 'softmax': equals the merge weights if controller and temperature are shared; try 'merge'"
    if c.separate_temperatures and not (c.emit_has_own_softmax and c.learned_temperature != "none"):
        yield "separate_temperatures = True: requires an emit softmax of its own and a learned temperature; try False"
    if not c.uses_temperature:
        rule = f"neither merge = {c.merge!r} nor emit = {c.emit!r} has a softmax"
        for name, default in {"temperature": 1, "annealing": "none", "learned_temperature": "none"}.items():
            if getattr(c, name) != default:
                yield f"{name} = {getattr(c, name)!r}: {rule}; try {default!r}"
        if c.straight_through:
            yield f"straight_through = True: {rule}; try False"
    if c.annealing != "none" and c.annealing_steps[0] >= c.annealing_steps[1]:
        yield f"annealing_steps = {c.annealing_steps}: must be a step and a later one; try (0, 1000)"
    if c.learned_temperature != "none" and (c.annealing != "none" or c.straight_through or c.temperature == 0):
        rule = "a temperature with annealing, of 0 or with straight_through cannot be learned"
        yield f"learned_temperature = {c.learned_temperature!r}: {rule}; try 'none'"


def _dense_errors(model: ModelConfig, kind: DenseConfig) -> Iterator[str]:
    if not model.dense_bias:
        rule = "applies to the blocks outside moe_blocks; a dense model has model.feed_forward.bias"
        yield f"model.dense_bias = False: {rule}; try True"


def _mixture_errors(model: ModelConfig, kind: MixtureOfTokensConfig, name: str = "model.feed_forward") -> Iterator[str]:
    if kind.mixing.groups == "within":
        if model.objective == "causal":
            yield (
                f"{name}.mixing.groups = 'within': mixes a token with later tokens of its sequence, which a causal "
                "model has to predict; must be 'across' there; try 'across'"
            )
        yield from _divisor_errors(f"{name}.group_size", kind.group_size, "model.context_length", model.context_length)


def _mixture_layer_errors(
    model: ModelConfig, kind: MixtureOfTokensConfig, name: str = "model.feed_forward"
) -> Iterator[str]:
    for error in mixing_errors(kind.mixing):
        yield f"{name}.mixing.{error}"
    for error in kernel_errors(kind, model.gated):
        yield f"{name}.{error}"
    if width_error := _shared_expert_error(model, kind.shared_expert_dim, name):
        yield width_error
        return
    product = kind.group_size * (model.d_ff - kind.shared_expert_dim)
    rule = f"num_experts x expert_dim = group_size x (d_ff - shared_expert_dim) = {product}"
    if kind.num_experts < 1 or kind.group_size < 1:
        return
    divides = product % kind.num_experts == 0
    if divides and (kind.expert_dim is None or not kind.flop_matched):
        return
    divisor = min((e for e in range(1, product + 1) if product % e == 0), key=lambda e: abs(e - kind.num_experts))
    if kind.expert_dim is None:
        yield f"{name}.num_experts = {kind.num_experts}: must divide {product}, by the rule {rule}; try {divisor}"
    if kind.flop_matched and kind.expert_dim is not None and kind.num_experts * kind.expert_dim != product:
        advice = "None" if divides else f"{name}.expert_dim = None, {name}.num_experts = {divisor}"
        yield f"{name}.expert_dim = {kind.expert_dim}: breaks the rule {rule} of flop_matched; try {advice}"


def _shared_expert_error(model: ModelConfig, width: int, name: str) -> str | None:
    if width < model.d_ff:
        return None
    return f"{name}.shared_expert_dim = {width}: must be below model.d_ff = {model.d_ff}; try {model.d_ff // 4}"


_WithTopK = TokenChoiceConfig | ExpertThresholdConfig | ExpertChoiceConfig | ReluRoutingConfig | HashConfig


def _top_k_errors(model: ModelConfig, kind: _WithTopK) -> Iterator[str]:
    """Experts per token that exceed the experts, or the width of the dense layer."""
    name = "model.feed_forward"
    if kind.top_k > kind.num_experts >= 1:
        yield f"{name}.top_k = {kind.top_k}: must be at most {name}.num_experts = {kind.num_experts}; try 1"
        return
    if kind.shared_expert_dim is None:  # which follows from the other widths
        return
    if error := _shared_expert_error(model, kind.shared_expert_dim, name):
        yield error
    elif kind.expert_dim is None:
        width = model.d_ff - kind.shared_expert_dim
        yield from _divisor_errors(f"{name}.top_k", kind.top_k, "d_ff - shared_expert_dim", width)


def _routing_group_errors(model: ModelConfig, kind: TokenChoiceConfig | ExpertThresholdConfig) -> Iterator[str]:
    tokens, length = kind.routing_group_tokens, model.context_length
    if min(tokens, length) > 0 and length % tokens and tokens % length:
        rule = f"must divide model.context_length = {length} or be a multiple of it"
        multiple = max(1, round(tokens / length)) * length
        yield f"model.feed_forward.routing_group_tokens = {tokens}: {rule}; try {multiple}"


def _token_choice_layer_errors(model: ModelConfig, kind: TokenChoiceConfig) -> Iterator[str]:
    yield from _top_k_errors(model, kind)
    if kind.balance == "bias" and kind.scores == "softmax":
        rule = "requires scores = 'sigmoid', since softmax scores of many experts are smaller than a step of the bias"
        yield f"model.feed_forward.balance = 'bias': {rule}; try 'loss'"


def _token_choice_errors(model: ModelConfig, kind: TokenChoiceConfig) -> Iterator[str]:
    name = "model.feed_forward"
    yield from _routing_group_errors(model, kind)
    if kind.mixture is not None:
        yield from _mixture_layer_errors(model, kind.mixture, f"{name}.mixture")
        yield from _mixture_errors(model, kind.mixture, f"{name}.mixture")
        sizes = {field: getattr(kind.mixture, field) for field in ("num_experts", "shared_expert_dim")}
        expected = {field: getattr(kind, field) for field in sizes}
        if min(kind.top_k, kind.mixture.num_experts) >= 1:
            sizes["expert_dim"] = kind.mixture.hidden_dim(model.d_ff)
            expected["expert_dim"] = kind.hidden_dim(model.d_ff)
        for field, size in sizes.items():
            if size != expected[field]:
                rule = f"must be that of {name}, which has the same weights"
                yield f"{name}.mixture.{field} = {size}: {rule}; try {expected[field]}"


def _expert_threshold_layer_errors(model: ModelConfig, kind: ExpertThresholdConfig) -> Iterator[str]:
    name = "model.feed_forward"
    yield from _top_k_errors(model, kind)
    if kind.shared_expert_dim is None and kind.expert_dim is None:
        if kind.top_k >= model.d_ff >= 2:
            yield f"{name}.top_k = {kind.top_k}: must be below model.d_ff = {model.d_ff}; try 1"
        elif model.d_ff == 1:
            yield f"{name}.shared_expert_dim = None: requires model.d_ff of 2 or more, and it is 1; try 0"


def _expert_threshold_errors(model: ModelConfig, kind: ExpertThresholdConfig) -> Iterator[str]:
    yield from _routing_group_errors(model, kind)
    sequences, size = kind.routed_sequences(model.context_length), kind.mixed_sequences
    if size > 1 and max(sequences, size) % min(sequences, size):
        rule = f"must divide the {sequences} sequences of a routing group or be a multiple of them"
        yield f"model.feed_forward.group_size = {size}: {rule}; try {sequences}"


def _expert_choice_errors(model: ModelConfig, kind: ExpertChoiceConfig) -> Iterator[str]:
    if kind.over == "tokens" and model.objective == "causal":
        yield (
            "model.feed_forward.over = 'tokens': whether an expert takes a token depends on later tokens of its "
            "sequence, which a causal model has to predict; must be 'batch' there; try 'batch'"
        )
    source = "group_size" if kind.over == "batch" else "model.context_length"
    candidates, name = kind.candidates(model.context_length), "model.feed_forward.capacity_factor"
    if min(candidates, kind.top_k, kind.num_experts) < 1:  # which have errors of their own
        return
    if round(kind.capacity_factor * kind.top_k * candidates / kind.num_experts, 6) < 1:
        smallest = math.ceil(10_000 * kind.num_experts / (kind.top_k * candidates)) / 10_000
        rule = f"must be at least num_experts / (top_k x {source}) = {smallest}, or top_k larger"
        yield f"{name} = {kind.capacity_factor}: {rule}, since an expert takes a whole token; try {smallest}"


def _hash_errors(model: ModelConfig, kind: HashConfig) -> Iterator[str]:
    if kind.vocab_size not in (None, model.vocab_size):
        rule = f"must be model.vocab_size = {model.vocab_size}"
        yield f"model.feed_forward.vocab_size = {kind.vocab_size}: {rule}; try None"


def _soft_moe_layer_errors(model: ModelConfig, kind: SoftMoEConfig) -> Iterator[str]:
    if error := _shared_expert_error(model, kind.shared_expert_dim, "model.feed_forward"):
        yield error


def _soft_moe_errors(model: ModelConfig, kind: SoftMoEConfig) -> Iterator[str]:
    if model.objective == "causal":
        yield (
            "model.objective = 'causal': must be 'masked' for soft_moe layers, which mix a token with later tokens of "
            "its sequence; try 'masked'"
        )


_Rules = dict[type, Callable[[ModelConfig, Any], Iterator[str]]]
# Rules that need the widths of the model only, and so hold for a layer on its own.
_LAYER_RULES: _Rules = {
    MixtureOfTokensConfig: _mixture_layer_errors,
    CompanionsConfig: _mixture_layer_errors,
    ThresholdConfig: _mixture_layer_errors,
    TokenChoiceConfig: _token_choice_layer_errors,
    ExpertThresholdConfig: _expert_threshold_layer_errors,
    ExpertChoiceConfig: _top_k_errors,
    ReluRoutingConfig: _top_k_errors,
    HashConfig: _top_k_errors,
    SoftMoEConfig: _soft_moe_layer_errors,
}
# Those that need its other fields.
_MODEL_RULES: _Rules = {
    DenseConfig: _dense_errors,
    MixtureOfTokensConfig: _mixture_errors,
    CompanionsConfig: _mixture_errors,
    ThresholdConfig: _mixture_errors,
    TokenChoiceConfig: _token_choice_errors,
    ExpertThresholdConfig: _expert_threshold_errors,
    ExpertChoiceConfig: _expert_choice_errors,
    HashConfig: _hash_errors,
    SoftMoEConfig: _soft_moe_errors,
}


def layer_errors(model: ModelConfig) -> Iterator[str]:
    """The errors of `model.feed_forward` that depend on the widths of the model only."""
    if rules := _LAYER_RULES.get(type(model.feed_forward)):
        yield from rules(model, model.feed_forward)
