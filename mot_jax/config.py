"""Experiment configuration: frozen dataclasses, checked whole before anything is built.

A `Config` is plain data. `check` returns every fault at once, in words; `to_json` and `from_json` are strict and
versioned; each field says whether it is part of a run's identity (see `identity_changes`).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

FORMAT_VERSION = 1


class ConfigError(ValueError):
    """A mistake of the user's. Each fault is one line: the field, the value, the rule, a value that would work."""

    def __init__(self, *faults: str):
        super().__init__("\n".join(faults))
        self.faults = faults


def nearest(name: str, names: typing.Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest of `names`, or all of them if none is close."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; there is {', '.join(names)}"


def _free(default: Any) -> Any:
    """A field that may differ when a run is resumed: it changes no number of the training."""
    return dataclasses.field(default=default, metadata={"resume": "free"})


def _extendable(default: Any) -> Any:
    """A field that may grow when a run is resumed."""
    return dataclasses.field(default=default, metadata={"resume": "extendable"})


@dataclasses.dataclass(frozen=True)
class MixingConfig:
    """How the tokens of a group are mixed (PAPER.md sections 2 and 3).

    merge: where the mixing weights come from: `softmax` of the controller's logits over the group; `uniform`, 1/G, not
        learned; `one_hot`, each expert takes its first arg-max token (the limit of temperature 0).
    temperature: T of softmax(logits / T); 0 is the one-hot limit.
    """

    merge: Literal["softmax", "uniform", "one_hot"] = "softmax"
    temperature: float = 1.0


@dataclasses.dataclass(frozen=True)
class DenseConfig:
    """A dense feed-forward layer of width `d_ff`; `bias`: biases on both linear maps, as in the paper's."""

    kind: ClassVar[str] = "dense"
    bias: bool = True


@dataclasses.dataclass(frozen=True)
class MixtureOfTokensConfig:
    """A Mixture-of-Tokens layer.

    group_size: G, the number of sequences whose tokens at one position are mixed.
    num_experts: E, the number of experts, and of mixtures per group and position.
    expert_dim: F, the hidden width of an expert; None is the paper's rule E F = G (d_ff - shared_dim), which costs the
        FLOPs of the dense layer.
    flop_matched: refuse an `expert_dim` that breaks that rule.
    shared_dim: the hidden width of a dense expert beside the mixture that sees every token; 0 for none.
    *_init_scale: multiplies the standard deviation of the model's init for that matrix.
    saved: what is kept from the forward to the backward pass besides the layer's input and the mixing weights:
        `nothing`, the experts' `pre_activations`, or `all` (mixtures and expert outputs as well). What is not kept is
        computed again.
    """

    kind: ClassVar[str] = "mixture_of_tokens"
    group_size: int = 32
    num_experts: int = 32
    expert_dim: int | None = None
    flop_matched: bool = False
    shared_dim: int = 0
    mixing: MixingConfig = MixingConfig()
    controller_init_scale: float = 1.0
    w_in_init_scale: float = 1.0
    w_out_init_scale: float = 1.0
    saved: Literal["nothing", "pre_activations", "all"] = "pre_activations"

    def hidden_dim(self, d_ff: int) -> int:
        """F: `expert_dim` as given, or by the rule for the dense width `d_ff`."""
        if self.expert_dim is not None:
            return self.expert_dim
        return self.group_size * (d_ff - self.shared_dim) // self.num_experts


FeedForwardConfig = DenseConfig | MixtureOfTokensConfig


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Every matrix starts with standard deviation sqrt(scale / fan_in) (PAPER.md section 5).

    fan_in is 1 for the embeddings. `cut`: a truncated normal's absolute bound; None means two standard deviations.
    """

    distribution: Literal["truncated_normal", "normal", "uniform"] = "truncated_normal"
    scale: float = 0.1
    cut: float | None = 0.2


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A causal pre-LayerNorm decoder with learned positions and an untied head.

    moe_blocks: the blocks whose feed-forward layer is `feed_forward`; all others are dense.
    dtype: of activations and matrix products; logits, softmax, norms and loss are float32 at least.
    remat: `blocks` keeps only each block's input for the backward pass.
    loss_chunk: sequence positions whose logits exist at one time; divides context_length.
    """

    num_blocks: int = 4
    d_model: int = 256
    d_ff: int = 1024
    num_heads: int = 4
    context_length: int = 256
    vocab_size: int = 257
    feed_forward: FeedForwardConfig = MixtureOfTokensConfig()
    moe_blocks: Literal["all", "last_half", "every_other"] | tuple[int, ...] = "all"
    final_norm: bool = False
    norm_epsilon: float = 1e-5
    init: InitConfig = InitConfig()
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "blocks"] = "none"
    loss_chunk: int = 64

    def block_kinds(self) -> list[FeedForwardConfig]:
        """The feed-forward layer of each block."""
        dense = self.feed_forward if isinstance(self.feed_forward, DenseConfig) else DenseConfig()
        chosen = {
            "all": range(self.num_blocks),
            "last_half": range(self.num_blocks // 2, self.num_blocks),
            "every_other": range(1, self.num_blocks, 2),
        }
        moe = self.moe_blocks if isinstance(self.moe_blocks, tuple) else chosen[self.moe_blocks]
        return [self.feed_forward if i in moe else dense for i in range(self.num_blocks)]

    @property
    def group_size(self) -> int:
        """Rows that must stay together: G, or 1 for a model that mixes nothing."""
        return getattr(self.feed_forward, "group_size", 1)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The text.

    corpus, tokenizer: names, see `mot_jax.data`.
    group_size: rows that the shuffle gives to different documents; None is the model's group size. A dense twin that is
        to see the same batches as its MoT sets it.
    directory: where prepared text is kept; None is `~/.cache/mot_jax`.
    validation_windows: score at most that many windows of the validation split; None is all of them.
    """

    corpus: str = "python_source/stdlib"
    tokenizer: str = "bytes"
    group_size: int | None = None
    directory: str | None = _free(None)
    validation_windows: int | None = _free(None)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with global-norm clipping; linear warm-up, then a cosine to `final_fraction` of the learning rate."""

    learning_rate: float = 1e-3
    warmup_steps: int = 100
    final_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 0.5


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The training run. `batch_size` counts sequences of the whole mesh; `accumulation` splits it into microbatches."""

    steps: int = _extendable(1000)
    batch_size: int = 64
    accumulation: int = 1
    seed: int = 0
    optimizer: OptimizerConfig = OptimizerConfig()
    log_every: int = _free(10)
    validate_every: int = _free(100)
    checkpoint_every: int = _free(100)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one may be -1, which takes the devices that are left."""

    data: int = _free(-1)
    expert: int = _free(1)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """`keep`: how many of the newest checkpoints stay."""

    keep: int = _free(2)


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """`sample_tokens`: length of the text sampled at the end of a run; 0 samples none."""

    tensorboard: bool = _free(True)
    sample_tokens: int = _free(200)


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()


# --- checks -----------------------------------------------------------------------------------------------------------


def check(config: Config) -> None:
    """Raises `ConfigError` with every fault of `config`."""
    faults = list(_type_faults(config, ""))
    if not faults:
        faults = [*_range_faults(config), *_size_faults(config)]
    if faults:
        raise ConfigError(*faults)


def _type_faults(value: Any, path: str) -> Iterator[str]:
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        name, item = f"{path}{field.name}", getattr(value, field.name)
        if not _matches(item, hints[field.name]):
            yield f"{name} = {item!r}: must be {type_words(hints[field.name])}; the default is {_default(field)}"
        elif dataclasses.is_dataclass(item):
            yield from _type_faults(item, name + ".")


def _default(field: dataclasses.Field) -> str:
    default = field.default
    return type(default).__name__ + "()" if dataclasses.is_dataclass(default) else repr(default)


def _options(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _matches(value: Any, hint: Any) -> bool:
    for option in _options(hint):
        if typing.get_origin(option) is Literal:
            if value in typing.get_args(option) and isinstance(value, str):
                return True
        elif typing.get_origin(option) is tuple:
            if isinstance(value, tuple) and all(_matches(item, typing.get_args(option)[0]) for item in value):
                return True
        elif option is float:
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return True
        elif isinstance(value, option) and not (option is int and isinstance(value, bool)):
            return True
    return False


def field_names(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, type) of every field that is not itself a group of fields."""
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if dataclasses.is_dataclass(item):
            yield from field_names(item, f"{path}{field.name}.")
        else:
            yield path + field.name, hints[field.name]


def type_words(hint: Any) -> str:
    """A type in words, for messages."""
    words = []
    for option in _options(hint):
        if typing.get_origin(option) is Literal:
            words += [repr(v) for v in typing.get_args(option)]
        elif typing.get_origin(option) is tuple:
            words.append("a tuple of " + typing.get_args(option)[0].__name__)
        else:
            words.append("None" if option is type(None) else option.__name__)
    return " or ".join(words)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """(dotted name, field, value) of every field that is not itself a group of fields."""
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if dataclasses.is_dataclass(item):
            yield from _leaves(item, f"{path}{field.name}.")
        else:
            yield path + field.name, field, item


_MINIMUM = {"expert_dim": 1, "group_size": 1, "validation_windows": 1, "norm_epsilon": 1e-12, "epsilon": 1e-30}
_MINIMUM |= dict.fromkeys(["num_blocks", "d_model", "d_ff", "num_heads", "context_length", "loss_chunk"], 1)
_MINIMUM |= dict.fromkeys(["num_experts", "steps", "batch_size", "accumulation", "log_every", "keep"], 1)
_MINIMUM |= dict.fromkeys(["vocab_size", "validate_every", "checkpoint_every"], 1)
_AT_MOST_ONE = {"beta1", "beta2", "final_fraction"}


def _range_faults(config: Config) -> Iterator[str]:
    for name, _, value in _leaves(config):
        last = name.rpartition(".")[2]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if name.startswith("mesh."):
            if value < 1 and value != -1:
                yield f"{name} = {value}: must be at least 1, or -1 for the devices that are left; try -1"
        elif value < _MINIMUM.get(last, 0) or value != value:
            yield f"{name} = {value}: must be at least {_MINIMUM.get(last, 0)}; try {max(_MINIMUM.get(last, 0), 1)}"
        elif last in _AT_MOST_ONE and value > 1:
            yield f"{name} = {value}: must be at most 1; try {0.1 if last == 'final_fraction' else 0.9}"
        elif name == "training.optimizer.clip_norm" and value == 0:
            yield f"{name} = {value}: must be above 0; try 0.5"
    if config.mesh.data == config.mesh.expert == -1:
        yield "mesh.data = -1, mesh.expert = -1: only one axis may take the devices that are left; try mesh.expert = 1"


def _size_faults(config: Config) -> Iterator[str]:
    m, t = config.model, config.training
    if m.num_heads and m.d_model % max(m.num_heads, 1):
        good = next(h for h in range(m.num_heads, 0, -1) if m.d_model % h == 0)
        yield f"model.num_heads = {m.num_heads}: must divide model.d_model = {m.d_model}; try {good}"
    if m.loss_chunk and m.context_length % max(m.loss_chunk, 1):
        good = next(c for c in range(min(m.loss_chunk, m.context_length), 0, -1) if m.context_length % c == 0)
        yield f"model.loss_chunk = {m.loss_chunk}: must divide model.context_length = {m.context_length}; try {good}"
    if isinstance(m.moe_blocks, tuple):
        for i in m.moe_blocks:
            if not 0 <= i < m.num_blocks:
                yield f"model.moe_blocks = {m.moe_blocks}: {i} is not a block; they are 0 to {m.num_blocks - 1}"
    if isinstance(m.feed_forward, MixtureOfTokensConfig):
        yield from _mixture_faults(m, m.feed_forward)
    multiple = m.group_size * t.accumulation
    if multiple > 0 and t.batch_size % multiple:
        yield batch_fault(config, 1)
    if config.data.group_size and config.data.group_size % max(m.group_size, 1):
        yield (
            f"data.group_size = {config.data.group_size}: must be a multiple of "
            f"model.feed_forward.group_size = {m.group_size}; try {m.group_size}"
        )


def _mixture_faults(model: ModelConfig, kind: MixtureOfTokensConfig) -> Iterator[str]:
    name = "model.feed_forward"
    width = model.d_ff - kind.shared_dim
    if width < 1:
        yield f"{name}.shared_dim = {kind.shared_dim}: must be below model.d_ff = {model.d_ff}; try {model.d_ff // 4}"
        return
    wanted = kind.group_size * width
    rule = f"num_experts x expert_dim = group_size x (d_ff - shared_dim) = {wanted}"
    if kind.num_experts < 1 or kind.group_size < 1:
        return
    if kind.expert_dim is None and wanted % kind.num_experts:
        good = min((e for e in range(1, wanted + 1) if wanted % e == 0), key=lambda e: abs(e - kind.num_experts))
        yield f"{name}.num_experts = {kind.num_experts}: must divide {wanted} by the rule {rule}; try {good}"
    if kind.flop_matched and kind.expert_dim is not None and kind.num_experts * kind.expert_dim != wanted:
        yield f"{name}.expert_dim = {kind.expert_dim}: breaks the rule {rule} that flop_matched asks for; try None"


def batch_fault(config: Config, shards: int) -> str:
    """The fault of a batch that does not split into whole groups on `shards` devices."""
    t, group_size = config.training, config.model.group_size
    multiple = group_size * t.accumulation * shards
    parts = f"group size {group_size} x accumulation {t.accumulation}" + (f" x shards {shards}" if shards > 1 else "")
    good = max(1, round(t.batch_size / multiple)) * multiple
    return f"training.batch_size = {t.batch_size}: must be a multiple of {parts} = {multiple}; try {good}"


# --- JSON -------------------------------------------------------------------------------------------------------------


def to_json(config: Config) -> str:
    """The whole config as JSON text; a feed-forward kind carries its tag as `kind`."""
    return json.dumps({"version": FORMAT_VERSION, **_encode(config)}, indent=1) + "\n"


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        kind = {"kind": value.kind} if hasattr(value, "kind") else {}
        return kind | {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return list(value) if isinstance(value, tuple) else value


def from_json(text: str) -> Config:
    """The config of `to_json`. Raises ConfigError on unknown or mistyped fields and on another format version."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"config.json, line {error.lineno}: not JSON ({error.msg}); restore it or start anew") from None
    version = data.pop("version", None) if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise ConfigError(f"version = {version}: this mot_jax reads version {FORMAT_VERSION} of config.json")
    config = _decode(data, Config, "")
    check(config)
    return config


def _decode(data: Any, hint: Any, path: str) -> Any:
    classes = [option for option in _options(hint) if dataclasses.is_dataclass(option)]
    if not classes:
        return tuple(data) if isinstance(data, list) else data
    if not isinstance(data, dict):
        raise ConfigError(f"{path} = {data!r}: must be a group of fields")
    data = dict(data)
    if len(classes) > 1:
        kinds = {c.kind: c for c in classes}
        kind = str(data.pop("kind", None))
        if kind not in kinds:
            raise ConfigError(f"{path}.kind = {kind!r}: no such kind{nearest(kind, kinds)}")
        classes = [kinds[kind]]
    hints = typing.get_type_hints(classes[0])
    names = [f.name for f in dataclasses.fields(classes[0])]
    for name in data:
        if name not in names:
            raise ConfigError(f"{'.'.join(filter(None, [path, name]))}: no such field{nearest(name, names)}")
    return classes[0](**{k: _decode(v, hints[k], ".".join(filter(None, [path, k]))) for k, v in data.items()})


# --- resuming ---------------------------------------------------------------------------------------------------------


def identity_changes(old: Config, new: Config) -> list[str]:
    """One line for each field in which `new` may not continue a run that `old` began."""
    before = {name: (field, value) for name, field, value in _leaves(old)}
    changes = []
    if type(old.model.feed_forward) is not type(new.model.feed_forward):
        return [f"model.feed_forward is {old.model.feed_forward.kind} there and {new.model.feed_forward.kind} here"]
    for name, field, value in _leaves(new):
        was = before[name][1]
        rule = field.metadata.get("resume", "identity")
        if value == was or rule == "free":
            continue
        if rule == "identity":
            changes.append(f"{name}: {was!r} there, {value!r} here; it is part of a run's identity")
        elif value < was:
            changes.append(f"{name}: {was!r} there, {value!r} here; a run can be extended, not cut short")
    return changes
