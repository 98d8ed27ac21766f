"""A config with another feed-forward kind at the same cost.

The number of experts E and the number k of them that process a token stay, so that one width remains to be chosen:
`expert_dim`, or `d_ff` of a dense model. Soft MoE has k S slots for a sequence of S tokens, k S / E of an expert, not
its default of S / E: then its experts also process k vectors per token. The width follows from the cost that is to be
equal:

`layer_flops`: FLOPs of the whole layer: router, mixing and experts.
`expert_flops`: FLOPs of the experts only. If they follow the paper's rule E F = G d_ff, these are the FLOPs of a dense
    layer of width `d_ff`.
`parameters`: parameters of the whole model.

FLOPs are *useful* ones: k experts process each token. With a capacity, empty slots are executed as well; expert choice
executes products that only move tokens, and ReLU routing all experts. `rows` has both numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import rich.console
import rich.table

from mot_jax.config import Config, DenseConfig, FeedForwardConfig, MixtureOfTokensConfig, TrainingConfig, check
from mot_jax.cost.feed_forward import feed_forward_cost, trainable_kinds
from mot_jax.cost.flops import forward_flops, idle_flops, tokens_at_once
from mot_jax.cost.parameters import count_parameters, parameter_shapes
from mot_jax.errors import UserError, nearest
from mot_jax.modes import with_kind

By = Literal["layer_flops", "expert_flops", "parameters"]
WIDTH_MULTIPLE = 8
TOLERANCE = 0.02
# Fields that a kind takes over from the kind before, if both have them.
_COMMON_FIELDS = ("routing_group_tokens", "controller_init_scale", "w_in_init_scale", "w_out_init_scale")


def matched(config: Config, kind: str, by: By) -> Config:
    """Return `config` with `kind` as its feed-forward layer, at the cost of the layer that it replaces.

    The width is the multiple of 8 with the nearest cost. A shared expert stays as wide as it is, and the factors of the
    initial values stay too. The batches stay the same if the groups of the new kind divide those of the config.
    Options of training that belong to the old kind are removed. The config's own kind is returned as it is.

    Args:
        config: an experiment with any kind.
        kind: the name of a kind that trains, such as `token_choice`.
        by: the cost that is to be equal.

    Raises:
        UserError: `config`, `kind` or `by` is invalid, the kind cannot replace the layer, or no multiple of 8 costs the
            same within 2 %.
    """
    check(config)
    kinds = trainable_kinds()
    if kind not in kinds:
        raise UserError(f"kind = {kind!r}: no such feed-forward kind that trains{nearest(kind, kinds)}")
    if by not in get_args(By):
        raise UserError(f"by = {by!r}: must be {' or '.join(map(repr, get_args(By)))}{nearest(by, get_args(By))}")
    changed = _nearest(config, kind, by)
    excess = remainder(config, changed, by)
    if abs(excess) > TOLERANCE:
        field, width = width_of(changed)
        cost = "parameters than the model" if by == "parameters" else f"{by} than the layer"
        size = f"has {abs(excess):.1%} {'more' if excess > 0 else 'fewer'} {cost} of the config"
        rule = f"must be within {TOLERANCE:.0%} at a multiple of {WIDTH_MULTIPLE}"
        raise UserError(f"{field} = {width} of kind {kind}: {size}; {rule}; try {_advice(config, kind, by)}")
    return changed


def remainder(config: Config, changed: Config, by: By) -> float:
    """Return the cost of `changed` beyond that of `config`, as a fraction of the latter: 0 if they are equal.

    FLOPs are summed over the blocks, since `d_ff` is also the width of the dense layers outside `moe_blocks`, and are
    divided by those of the replaced layers.
    """
    if changed == config:
        return 0.0
    if by == "parameters":
        counts = [sum(count_parameters(c.model).values()) for c in (config, changed)]
        return (counts[1] - counts[0]) / counts[0]
    replaced = difference = 0.0
    for old, new in zip(config.model.block_kinds(), changed.model.block_kinds(), strict=True):
        costs = feed_forward_cost(config.model, old), feed_forward_cost(changed.model, new)
        before, after = (cost.flops() if by == "layer_flops" else cost.expert_flops() for cost in costs)
        difference += after - before
        replaced += before if type(old) is not type(new) else 0
    return difference / replaced


def rows(config: Config, by: By) -> list[dict[str, Any]]:
    """Return a row for each kind that trains: its width and its costs, or the `reason` why it cannot replace the layer.

    FLOPs are those of the forward pass per token, of a layer of the kind and of the whole model. Where `executed` ones
    differ, they include empty slots, gates of 0 and products that only move tokens, and exclude dropped tokens.
    """
    by_kind = []
    for kind in trainable_kinds():
        row: dict[str, Any] = {"kind": kind, "is_config": kind == config.model.feed_forward.kind}
        try:
            by_kind.append(row | _costs(config, matched(config, kind, by), by))
        except UserError as error:
            by_kind.append(row | {"reason": "; ".join(error.faults)})
    return by_kind


def _costs(config: Config, changed: Config, by: By) -> dict[str, Any]:
    model, (field, width) = changed.model, width_of(changed)
    total = sum(forward_flops(model).values())
    layer = feed_forward_cost(model, model.feed_forward, tokens_at_once(changed))
    return {
        "field": field,
        "width": width,
        "parameters": sum(count_parameters(model).values()),
        "layer_flops": layer.flops(),
        "model_flops": total,
        "executed_layer_flops": layer.executed_flops(),
        "executed_model_flops": total + idle_flops(changed),
        "remainder": remainder(config, changed, by),
    }


def show(config: Config, by: By, by_kind: Sequence[dict[str, Any]]) -> None:
    """Print `rows` as a table, and below it the kinds that cannot replace the layer."""
    _, num_experts, top_k = _sizes(config)
    print(f"Feed-forward kinds matched by {by} with E = {num_experts}, k = {top_k} (* this config)")
    executed = "executed, where it differs: with empty slots, gates of 0 and dispatch, without drops"
    print(f"MFLOPs per token of the forward pass; {executed}")
    table = rich.table.Table(box=None, pad_edge=False)
    for name in ("kind", "width", "parameters", "layer", "model", "executed layer", "executed model", "remainder"):
        table.add_column(name, justify="left" if name in ("kind", "width") else "right")
    for row in by_kind:
        name = row["kind"] + (" *" if row["is_config"] else "")
        table.add_row(name, *(["-"] * 7 if "reason" in row else _cells(row)))
    console = rich.console.Console(highlight=False)
    console.width = 10_000  # a line for each kind, which a narrow terminal wraps
    with console.capture() as lines:
        console.print(table)
    print("\n".join(line.rstrip() for line in lines.get().splitlines()))
    for row in by_kind:
        if "reason" in row:
            print(f"{row['kind']}: {row['reason']}")


def _cells(row: dict[str, Any]) -> Iterator[str]:
    yield f"{row['field'].rpartition('.')[2]} {row['width']:,}"
    yield f"{row['parameters']:,}"
    for name in ("layer_flops", "model_flops"):
        yield f"{row[name] / 1e6:,.3f}"
    for name in ("layer_flops", "model_flops"):
        executed = row[f"executed_{name}"]
        yield f"{executed / 1e6:,.3f}" if executed != row[name] else ""
    yield f"{row['remainder']:+.2%}" if row["remainder"] else "0"


def width_of(config: Config) -> tuple[str, int]:
    """Return the name and the value of the field that is the width of the feed-forward layers."""
    kind, d_ff = config.model.feed_forward, config.model.d_ff
    if isinstance(kind, DenseConfig):
        return "model.d_ff", d_ff
    return "model.feed_forward.expert_dim", kind.hidden_dim(d_ff)


def _with_width(config: Config, width: int) -> Config:
    kind, model = config.model.feed_forward, config.model
    if isinstance(kind, DenseConfig):
        model = dataclasses.replace(model, d_ff=width)
    else:
        model = dataclasses.replace(model, feed_forward=dataclasses.replace(kind, expert_dim=width))
    return dataclasses.replace(config, model=model)


def _nearest(config: Config, kind: str, by: By) -> Config:
    """Return `config` with `kind`, of the width with the nearest cost. Every cost is an affine function of it."""
    if kind == config.model.feed_forward.kind:
        return config
    narrow = _with_width(_replaced(config, kind), WIDTH_MULTIPLE)
    check(narrow)
    excess = [remainder(config, _with_width(narrow, width), by) for width in (WIDTH_MULTIPLE, 2 * WIDTH_MULTIPLE)]
    multiple = max(1, int(1 - excess[0] / (excess[1] - excess[0])))
    candidates = (_with_width(narrow, WIDTH_MULTIPLE * n) for n in (multiple, multiple + 1))
    return min(candidates, key=lambda changed: abs(remainder(config, changed, by)))


def _replaced(config: Config, kind: str) -> Config:
    """Return `config` with a layer of another kind, and with the fields outside of the model that this requires."""
    old, model = config.model.feed_forward, config.model
    group_size, num_experts, top_k = _sizes(config)
    new = trainable_kinds()[kind].flop_matched(group_size, num_experts, model.context_length)
    if new is None:
        raise UserError(f"kind = {kind!r}: its cost has no `flop_matched`, so that it has no equal; try another kind")
    values: dict[str, Any] = {"num_experts": num_experts, "top_k": top_k, "group_size": group_size}
    # k slots for each token, as k experts process a token of the other kinds.
    values["slots_per_expert"] = max(1, round(top_k * model.context_length / num_experts))
    values["routing_group_tokens"] = config.group_size * model.context_length
    values["shared_expert_dim"] = old.shared_dim(model.d_ff) or getattr(new, "shared_expert_dim", 0)
    values |= {name: getattr(old, name) for name in _COMMON_FIELDS if hasattr(old, name)}
    fields = {field.name for field in dataclasses.fields(new)}
    new = dataclasses.replace(new, **{name: value for name, value in values.items() if name in fields})
    changed = with_other_layer(config, new)
    if all(type(a) is type(b) for a, b in zip(model.block_kinds(), changed.model.block_kinds(), strict=True)):
        raise UserError(
            f"model.moe_blocks = {model.moe_blocks!r}: must name a block, whose layer is replaced; try 'all'"
        )
    return _with_order(changed, config.group_size)


def with_other_layer(config: Config, kind: FeedForwardConfig) -> Config:
    """Return `config` with a layer of another kind in place of its own, trained from initial values.

    It has no option of training that belongs to the old layer. Dense layers have the biases that those outside of
    `moe_blocks` have, and these, next to a new kind, have the biases of the dense layers that it replaces.
    """
    old, model = config.model.feed_forward, config.model
    if isinstance(kind, DenseConfig):
        kind, model = DenseConfig(model.dense_bias), dataclasses.replace(model, dense_bias=True)
    elif isinstance(old, DenseConfig):
        model = dataclasses.replace(model, dense_bias=old.bias)
    training = dataclasses.replace(
        config.training, transition_from=None, transition_router=TrainingConfig.transition_router
    )
    changed = with_kind(dataclasses.replace(config, model=model, training=training), kind)
    return with_parameters_of_multipliers(changed)


def _with_order(changed: Config, group_size: int) -> Config:
    """Return the config with batches of groups of `group_size`, if its own groups divide these."""
    data = dataclasses.replace(changed.data, shuffle_group_size=None)
    changed = dataclasses.replace(changed, data=data)
    if changed.group_size == group_size or group_size % changed.group_size:
        return changed
    return dataclasses.replace(changed, data=dataclasses.replace(data, shuffle_group_size=group_size))


def with_parameters_of_multipliers(config: Config) -> Config:
    """Return the config without multipliers of the learning rate that no parameter has, such as a controller's."""
    optimizer = config.training.optimizer
    if not optimizer.multipliers:
        return config
    names = [*parameter_shapes(config.model)]
    multipliers = tuple((part, f) for part, f in optimizer.multipliers if any(part in name for name in names))
    optimizer = dataclasses.replace(optimizer, multipliers=multipliers)
    return dataclasses.replace(config, training=dataclasses.replace(config.training, optimizer=optimizer))


def _sizes(config: Config) -> tuple[int, int, int]:
    """Return G, E and k = max(1, E / G); of a kind without groups, G = E / k; of a dense model, G of its batches."""
    kind, defaults = config.model.feed_forward, MixtureOfTokensConfig()
    num_experts, top_k = getattr(kind, "num_experts", defaults.num_experts), getattr(kind, "top_k", None)
    over_tokens = getattr(kind, "over", None) == "tokens"  # then expert choice does not use its group size
    group_size = None if over_tokens else getattr(kind, "group_size", None)
    if group_size is None:
        of_batches = config.group_size if config.group_size > 1 else defaults.group_size
        group_size = of_batches if top_k is None else max(1, num_experts // top_k)
    return group_size, num_experts, top_k or max(1, num_experts // group_size)


def _advice(config: Config, kind: str, by: By) -> str:
    """Return a change after which some multiple of 8 is within the tolerance."""
    for other in get_args(By):
        if _can_match(config, kind, other):
            return f"by = {other!r}"
    model, replaced = config.model, config.model.feed_forward
    expert_dim, shared = (getattr(replaced, name, None) for name in ("expert_dim", "shared_expert_dim"))
    for factor in (2**n for n in range(1, 17)):  # the wider the layer, the less a multiple of 8 differs from it
        if expert_dim:
            field, width = "model.feed_forward.expert_dim", factor * expert_dim
            wider = _with_width(config, width)
        else:  # the width of experts follows from d_ff - shared_expert_dim
            field, width = "model.d_ff", (shared or 0) + factor * (model.d_ff - (shared or 0))
            wider = dataclasses.replace(config, model=dataclasses.replace(model, d_ff=width))
        if _can_match(wider, kind, by):
            return f"{field} = {width}"
    return "another kind"


def _can_match(config: Config, kind: str, by: By) -> bool:
    try:
        check(config)
        return abs(remainder(config, _nearest(config, kind, by), by)) <= TOLERANCE
    except UserError:
        return False
