"""All faults of a config at once, in words, before anything is built."""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Iterator
from typing import Any

from mot_jax.config.fields import Config, ConfigError, MixtureOfTokensConfig, ModelConfig
from mot_jax.config.hints import leaves, matches, type_words


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
        if not matches(item, hints[field.name]):
            yield f"{name} = {item!r}: must be {type_words(hints[field.name])}; the default is {_default(field)}"
        elif dataclasses.is_dataclass(item):
            yield from _type_faults(item, name + ".")


def _default(field: dataclasses.Field) -> str:
    default = field.default
    return type(default).__name__ + "()" if dataclasses.is_dataclass(default) else repr(default)


# (least, most) by the last part of a field's name; other numbers are finite and not negative.
_RANGES: dict[str, tuple[float, float]] = dict.fromkeys(
    "num_blocks d_model d_ff num_heads context_length vocab_size loss_chunk num_experts group_size expert_dim steps "
    "batch_size accumulation log_every validate_every checkpoint_every keep validation_windows".split(),
    (1, sys.maxsize),
)
_RANGES |= {"seed": (0, 2**32 - 1), "beta1": (0, 0.999999), "beta2": (0, 0.999999), "final_fraction": (0, 1)}
_RANGES |= dict.fromkeys(["clip_norm", "cut", "norm_epsilon", "epsilon"], (1e-30, sys.float_info.max))


def _range_faults(config: Config) -> Iterator[str]:
    for name, _, _, value in leaves(config):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        least, most = _RANGES.get(name.rpartition(".")[2], (0, sys.float_info.max))
        if name.startswith("mesh."):
            if value < 1 and value != -1:
                yield f"{name} = {value}: must be at least 1, or -1 for the devices that are left; try 1"
        elif not least <= value <= most:
            limit = f"at least {least}" if not value >= least else f"at most {most}"
            yield f"{name} = {value}: must be {limit}; try {min(max(least, 1), most)}"
    if config.mesh.data == config.mesh.expert == -1:
        yield "mesh.data = -1, mesh.expert = -1: only one axis may take the devices that are left; try mesh.expert = 1"


def _size_faults(config: Config) -> Iterator[str]:
    m = config.model
    if min(m.num_heads, m.d_model) > 0 and m.d_model % m.num_heads:
        good = next(h for h in range(m.num_heads, 0, -1) if m.d_model % h == 0)
        yield f"model.num_heads = {m.num_heads}: must divide model.d_model = {m.d_model}; try {good}"
    if min(m.loss_chunk, m.context_length) > 0 and m.context_length % m.loss_chunk:
        good = next(c for c in range(min(m.loss_chunk, m.context_length), 0, -1) if m.context_length % c == 0)
        yield f"model.loss_chunk = {m.loss_chunk}: must divide model.context_length = {m.context_length}; try {good}"
    if isinstance(m.moe_blocks, tuple):
        there = tuple(i for i in m.moe_blocks if 0 <= i < m.num_blocks)
        if there != m.moe_blocks:
            yield f"model.moe_blocks = {m.moe_blocks}: must be blocks, which are 0 to {m.num_blocks - 1}; try {there}"
    if isinstance(m.feed_forward, MixtureOfTokensConfig):
        yield from _mixture_faults(m, m.feed_forward)
    if config.data.group_size and config.data.group_size % max(m.group_size, 1):
        yield (
            f"data.group_size = {config.data.group_size}: must be a multiple of "
            f"model.feed_forward.group_size = {m.group_size}; try {m.group_size}"
        )
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, group_size=None))
    yield from batch_faults(config, 1)


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
    divides = wanted % kind.num_experts == 0
    if divides and (kind.expert_dim is None or not kind.flop_matched):
        return
    good = min((e for e in range(1, wanted + 1) if wanted % e == 0), key=lambda e: abs(e - kind.num_experts))
    if kind.expert_dim is None:
        yield f"{name}.num_experts = {kind.num_experts}: must divide {wanted} by the rule {rule}; try {good}"
    if kind.flop_matched and kind.expert_dim is not None and kind.num_experts * kind.expert_dim != wanted:
        advice = "None" if divides else f"{name}.expert_dim = None, {name}.num_experts = {good}"
        yield f"{name}.expert_dim = {kind.expert_dim}: breaks the rule {rule} that flop_matched asks for; try {advice}"


def batch_faults(config: Config, shards: int) -> Iterator[str]:
    """The fault of a batch that does not split into whole groups on `shards` devices, if it does not."""
    t, group_size = config.training, config.group_size
    multiple = group_size * t.accumulation * shards
    if multiple < 1 or t.batch_size % multiple == 0:  # below 1, other faults tell of it
        return
    parts = f"group size {group_size} x accumulation {t.accumulation}" + (f" x shards {shards}" if shards > 1 else "")
    good = max(1, round(t.batch_size / multiple)) * multiple
    yield f"training.batch_size = {t.batch_size}: must be a multiple of {parts} = {multiple}; try {good}"
